"""Generated sheets: what a packed file could hold, without packing one."""

import numpy as np

from whet.data.account import SourceAccount
from whet.data.store import DOCUMENT
from whet.report.sheet import LeftOut, Sheet

WORDS = [
    start + end for start in ("b", "d", "f", "k", "l", "m", "n") for end in ("a", "ore", "ing")
]
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
            found.append(
                (row, start, length, length - context, len(found) % 3, len(found) // 3 + 1, 0)
            )
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
        accounts=[
            _account(name, documents[documents["source"] == s]) for s, name in enumerate(sources)
        ],
        left_out=[
            LeftOut(sources[0], 17, "turn 2: content is a number, expected text"),
            LeftOut(sources[2], 4, f"turn 1: role {NASTY!r} is not known"),
        ],
        left_out_counts={"the <b>line</b> is broken": 2, "exact duplicates": 12_345},
    )


def _account(name: str, documents: np.ndarray) -> SourceAccount:
    tokens, trained = int(documents["length"].sum()), int(documents["trained"].sum())
    return SourceAccount(
        name,
        lines=len(documents) + 3,
        refused={"datum": 1},
        conversations=len(documents) + 2,
        examples=len(documents),
        tokens=tokens + 300,
        trained=trained,
        context=tokens - trained,
        truncated=100,
        dropped=200,
        dropped_tokens={"exact duplicates": 200},
        dropped_examples={"exact duplicates": 2},
    )
