"""Selected examples -> rows -> the packed file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from whet.data.mixing import Selection
from whet.data.packing import pack
from whet.data.spool import Spool
from whet.data.store import DOCUMENT, StoreWriter
from whet.progress import track

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Encoded:
    """The tables of all examples (`whet.data.encoding`), their tokens, and what becomes of them."""

    spool: Spool
    conversations: np.ndarray
    examples: np.ndarray
    runs: np.ndarray
    selection: Selection

    def trained(self) -> np.ndarray:
        """Trained tokens in the kept part of each example, (examples,) int64."""
        owner = np.repeat(np.arange(len(self.examples)), self.examples["n_runs"])
        inside = self.runs["end"] <= self.selection.kept[owner]
        tokens = (self.runs["end"] - self.runs["start"]) * inside
        counted = np.bincount(owner, tokens, minlength=len(self.examples))
        return counted.astype(np.int64)


def write_packed(
    path: str | Path,
    encoded: Encoded,
    members: np.ndarray,
    *,
    context_length: int,
    pad_id: int,
    seed: int,
    attrs: Mapping[str, Any],
    refusals: list[str],
    quiet: bool = False,
) -> int:
    """Pack the examples `members`, each as often as it has copies, and write them; returns rows."""
    copies = encoded.selection.copies[members]
    which = np.repeat(members, copies)
    lengths = encoded.selection.kept[which]
    packing = pack(lengths, context_length, seed)
    order = np.lexsort((packing.start, packing.row))
    which, rows = which[order], packing.row[order]
    documents = _documents(encoded, which, rows, packing.start[order])
    weighted = bool(np.any(encoded.runs["weight"] != 1))
    n_rows = packing.n_rows
    with (
        StoreWriter(path, n_rows, context_length, weighted=weighted, attrs=attrs) as writer,
        track(f"Writing {Path(path).name}", n_rows, "rows", quiet) as progress,
    ):
        for first in range(0, n_rows, ROWS_AT_ONCE):
            n = min(ROWS_AT_ONCE, n_rows - first)
            begin, end = np.searchsorted(rows, (first, first + n))
            blank = _blank(n, context_length, pad_id)
            _fill(blank, encoded, which[begin:end], documents[begin:end], first)
            writer.write_rows(*blank)
            progress.advance(n)
        writer.write_documents(documents)
        writer.write_texts("refusals", refusals)
    return n_rows


def _documents(
    encoded: Encoded, which: np.ndarray, rows: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """The table of documents of the file: one for each of `which`, in the order of the rows."""
    conversations = encoded.conversations[encoded.examples["conversation"][which]]
    documents = np.zeros(len(which), DOCUMENT)
    documents["row"] = rows
    documents["start"] = starts
    documents["length"] = encoded.selection.kept[which]
    documents["trained"] = encoded.trained()[which]
    documents["source"] = conversations["source"]
    documents["line"] = conversations["line"]
    documents["part"] = encoded.examples["part"][which]
    return documents


def _blank(n: int, context_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, loss mask and segments of `n` rows of padding."""
    shape = (n, context_length)
    tokens = np.full(shape, pad_id, np.int32)
    return tokens, np.zeros(shape, np.float32), np.zeros(shape, np.int32)


def _fill(
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    encoded: Encoded,
    which: np.ndarray,
    documents: np.ndarray,
    first_row: int,
) -> None:
    """Put the examples `which` to where `documents` says; `first_row` is the number of rows[0]."""
    tokens, mask, segments = rows
    examples = encoded.examples[which]
    segment, last_row = 0, -1
    for example, document in zip(examples.tolist(), documents.tolist(), strict=True):
        _, _, offset, _, first_run, n_runs = example
        number, start, length = document[:3]
        row = number - first_row
        segment = segment + 1 if row == last_row else 1
        last_row = row
        tokens[row, start : start + length] = encoded.spool.tokens(offset, length)
        segments[row, start : start + length] = segment
        for begin, end, weight in encoded.runs[first_run : first_run + n_runs].tolist():
            if end <= length:
                mask[row, start + begin : start + end] = weight
