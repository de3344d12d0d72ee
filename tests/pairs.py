"""A tiny packed file of preferences or of labelled replies, made from code."""

from pathlib import Path

import numpy as np

from tests import tiny
from whet.data.layout import DOCUMENT
from whet.data.store import new_store

T = 40


def pairs_file(
    path: Path,
    *,
    n_rows: int = 6,
    seed: int = 0,
    kind: str = "preferences",
    margins: bool = False,
    learnable: bool = False,
) -> Path:
    """Rows of one or two pairs: a prompt of 3 to 5 tokens, replies of 2 to 5.

    `learnable`: chosen replies begin with token 5, rejected ones with token 6.
    """
    rng = np.random.default_rng(seed)
    tok = tiny.tokenizer()
    tokens, segments = np.zeros((2, n_rows, T), np.int32)
    mask = np.zeros((n_rows, T), np.uint8)
    documents, line = [], 0
    for row in range(n_rows):
        start = 0
        for pair in range(int(rng.integers(1, 3))):
            prompt = rng.integers(10, tok.vocab_size, int(rng.integers(3, 6)))
            line += 1
            for side in range(2):
                reply = rng.integers(10, tok.vocab_size, int(rng.integers(2, 6)))
                if learnable:
                    reply[0] = 5 + side
                ids = np.concatenate([prompt, reply])
                here = slice(start, start + len(ids))
                tokens[row, here], segments[row, here] = ids, 2 * pair + side + 1
                mask[row, start + len(prompt) : here.stop] = 1
                documents.append((row, start, len(ids), len(reply), line % 2, line, side))
                start = here.stop
    attrs = {
        "kind": kind,
        "vocab_size": tok.vocab_size,
        "tokenizer_hash": tok.hash,
        "sources": ["data/a.jsonl", "data/b.jsonl"],
    }
    with new_store(path, n_rows, T, attrs=attrs) as writer:
        writer.write_rows(tokens, mask, segments)
        writer.write_documents(np.array(documents, DOCUMENT))
        if kind == "labels":
            sides = np.arange(len(documents)) % 2
            writer.write_numbers("labels", np.where(sides == 0, 1, 0).astype(np.float32))
        elif margins:
            values = rng.random(len(documents) // 2).astype(np.float32)
            writer.write_numbers("margins", values)
    return path
