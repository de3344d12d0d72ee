"""A tiny packed file and a tiny model directory, made from code: what training tests run on."""

import dataclasses
from pathlib import Path

import numpy as np

from whet.chat.chat import Chat
from whet.chat.tokenizer import Tokenizer, train_tokenizer
from whet.data.store import DOCUMENT, new_store
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.hf.checkpoint import save_model

T = 24
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "sum", "of", "plus")


def tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 ids."""
    return train_tokenizer([" ".join(WORDS)] * 4, 300)


def chat() -> Chat:
    """That tokenizer with the plain template."""
    return Chat(tokenizer())


def model_directory(
    path: Path,
    *,
    seed: int = 0,
    width: int = 16,
    layers: int = 2,
    max_positions: int = 32,
    init_std: float | None = None,
) -> Path:
    """A random Llama-like model of some ten thousand parameters, with its tokenizer."""
    tok = chat()
    sizes = {"n_kv_heads": 1, "mlp_width": 32, "max_positions": max_positions}
    config = llama(tok.tokenizer.vocab_size, width, layers, 2, **sizes)
    model = Transformer(dataclasses.replace(config, init_std=init_std or config.init_std))
    init_weights(model, seed)
    save_model(model, path, tok, {"stage": "test"})
    return path


def packed_file(
    path: Path,
    *,
    n_rows: int = 10,
    seed: int = 0,
    weighted: bool = False,
    empty_rows: tuple[int, ...] = (),
) -> Path:
    """Rows of one to three documents with uneven masks; `empty_rows` have nothing trained."""
    rng = np.random.default_rng(seed)
    tok = tokenizer()
    tokens = np.zeros((n_rows, T), np.int32)
    mask = np.zeros((n_rows, T), np.float32)
    segments = np.zeros((n_rows, T), np.int32)
    documents, line = [], 0
    for row in range(n_rows):
        start = 0
        for segment in range(1, rng.integers(2, 5)):
            length = min(int(rng.integers(3, 12)), T - start)
            if length < 3:
                break
            here = slice(start, start + length)
            tokens[row, here] = rng.integers(1, tok.vocab_size, length)
            trained = rng.random(length) < 0.6
            if row not in empty_rows:
                trained[-1] = True
                mask[row, here] = trained
                if weighted:
                    mask[row, here] *= rng.choice([0.25, 0.5, 1.0, 1.5], length)
            segments[row, here] = segment
            line += 1
            count = int((mask[row, here][1:] != 0).sum())
            documents.append((row, start, length, count, line % 2, line, 0))
            start += length
    with new_store(
        path,
        n_rows,
        T,
        weighted=weighted,
        attrs={
            "vocab_size": tok.vocab_size,
            "tokenizer_hash": tok.hash,
            "sources": ["data/a.jsonl", "data/b.jsonl"],
        },
    ) as store:
        store.write_rows(tokens, mask, segments)
        store.write_documents(np.array(documents, DOCUMENT))
    return path
