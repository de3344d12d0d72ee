"""Generated sheets: what a packed file could hold, without packing one."""

import numpy as np

from whet.data.store import DOCUMENT
from whet.report.sheet import Refusal, Sheet, SourceAccount

WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from "
    "which one you all were her she there would their we him been has when who will no more if out "
    "so said what up its about into than them can only other time new some could these two may "
    "first then do any like my now over such our man me even most made after also did many off "
    "before must well back through years much where your way down should because long each just"
).split()
NASTY = "</script><script>document.title='broken'</script><!-- <b>&amp;"


def vocabulary() -> list[str]:
    """A vocabulary with words, newlines, right-to-left text and text that wants to be HTML."""
    texts = ["<pad>", "<|im_start|>", "<|im_end|>", "↵\n", NASTY, " שלום", " 東京", "."]
    return texts + [" " + word for word in WORDS]


def sheet(n_rows: int = 6, width: int = 128, seed: int = 0) -> Sheet:
    """`n_rows` rows of `width` tokens: documents of questions (context) and answers (trained)."""
    rng = np.random.default_rng(seed)
    texts = vocabulary()
    tokens = np.zeros((n_rows, width), np.int32)
    mask = np.zeros((n_rows, width), np.float32)
    found = []
    for row in range(n_rows):
        start = 0
        while (length := int(rng.integers(20, max(width // 3, 21)))) <= width - start:
            ids = rng.integers(7, len(texts), length)
            ids[0], ids[-1], ids[3], ids[5] = 1, 2, 3, 4 + len(found) % 3
            context = int(rng.integers(8, length - 4))
            tokens[row, start : start + length] = ids
            mask[row, start + context : start + length] = 1
            found.append((row, start, length, length - context, len(found) % 3, len(found) // 3 + 1, 0))
            start += length
    documents = np.array(found, DOCUMENT)
    sources = ["data/gsm8k/train.jsonl", "data/chat/oasst.jsonl", "data/chat/<b>odd</b>.jsonl"]
    return Sheet(
        title="sft_packed.h5",
        tokens=tokens,
        mask=mask,
        documents=documents,
        sources=sources,
        index=tokens,
        texts=texts,
        lengths=documents["length"],
        fills=np.bincount(documents["row"], documents["length"], n_rows).astype(np.int64),
        trained=int(mask.sum()),
        facts={"tokenizer": "models/<i>base</i>", "template": "5f3c9a1b", "seed": "0"},
        accounts=[_account(name, documents[documents["source"] == s]) for s, name in enumerate(sources)],
        refusals=[
            Refusal(sources[0], 17, "turn 2: content is a number, expected text"),
            Refusal(sources[2], 4, f"turn 1: role {NASTY!r} is not known"),
        ],
        refused=2,
    )


def _account(name: str, documents: np.ndarray) -> SourceAccount:
    tokens, trained = int(documents["length"].sum()), int(documents["trained"].sum())
    return SourceAccount(name, len(documents), tokens + 300, trained, tokens - trained, 100, 200)
