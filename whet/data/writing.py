"""Selected examples -> rows -> the packed file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from whet.data.encoding import KIND_NAMES
from whet.data.mixing import Selection
from whet.data.packing import pack
from whet.data.spool import Spool
from whet.data.store import DOCUMENT, new_store
from whet.progress import track

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Tables:
    """The tables of all examples (`whet.data.encoding`), their tokens, and what becomes of them."""

    spool: Spool
    conversations: np.ndarray
    examples: np.ndarray
    runs: np.ndarray
    selection: Selection

    @property
    def kind(self) -> str:
        """What the examples of a conversation are to each other: the same for all."""
        kinds = self.conversations["kind"]
        return KIND_NAMES[int(kinds[0]) if len(kinds) else 0]

    @cached_property
    def trained(self) -> np.ndarray:
        """Trained tokens in the kept part of each example, (examples,) int64."""
        owner = np.repeat(np.arange(len(self.examples)), self.examples["n_runs"])
        inside = self.runs["end"] <= self.selection.kept[owner]
        tokens = (self.runs["end"] - self.runs["start"]) * inside
        counted = np.bincount(owner, tokens, minlength=len(self.examples))
        return counted.astype(np.int64)


def write_packed(
    path: str | Path,
    tables: Tables,
    members: np.ndarray,
    *,
    context_length: int,
    pad_id: int,
    seed: int,
    attrs: Mapping[str, Any],
    refusals: Sequence[Mapping[str, Any]],
    quiet: bool = False,
) -> int:
    """Pack the examples `members`, each as often as it has copies, and write them; returns rows."""
    kind = tables.kind
    size = 2 if kind == "preferences" else 1  # examples that stand side by side
    units = members.reshape(-1, size)
    units = np.repeat(units, tables.selection.copies[units[:, 0]], axis=0)
    lengths = tables.selection.kept[units]
    packing = pack(lengths.sum(1), context_length, seed)
    order = np.lexsort((packing.start, packing.row))
    starts = packing.start[order, None] + np.cumsum(lengths[order], axis=1) - lengths[order]
    which, rows = units[order].ravel(), np.repeat(packing.row[order], size)
    documents = _documents(tables, which, rows, starts.ravel())
    weighted = bool(np.any(tables.runs["weight"] != 1))
    n_rows = packing.n_rows
    attrs = {**attrs, "kind": kind}
    with (
        new_store(path, n_rows, context_length, weighted=weighted, attrs=attrs) as writer,
        track(f"Writing {Path(path).name}", n_rows, "rows", quiet) as progress,
    ):
        for first in range(0, n_rows, ROWS_AT_ONCE):
            n = min(ROWS_AT_ONCE, n_rows - first)
            begin, end = np.searchsorted(rows, (first, first + n))
            own = documents[begin:end].copy()
            own["row"] -= first
            shape = (n, context_length)
            writer.write_rows(*_rows(tables, which[begin:end], own, shape, pad_id))
            progress.advance(n)
        writer.write_documents(documents)
        writer.write_texts("refusals", [json.dumps(r, ensure_ascii=False) for r in refusals])
        for name, values in _values(tables, units[order]).items():
            writer.write_numbers(name, values)
    return n_rows


def _values(tables: Tables, units: np.ndarray) -> dict[str, np.ndarray]:
    """What the data say of the documents (U, size) beside their tokens, by the name in the file."""
    said = tables.conversations[tables.examples["conversation"][units[:, 0]]]
    if tables.kind == "labels":
        return {"labels": said["scores"][:, 0]}
    if tables.kind == "preferences":
        return {"margins": said["margin"], "scores": said["scores"].ravel()}
    return {}


def _documents(
    tables: Tables, which: np.ndarray, rows: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """The table of documents of the file: one for each of `which`, in the order of the rows."""
    conversations = tables.conversations[tables.examples["conversation"][which]]
    documents = np.zeros(len(which), DOCUMENT)
    documents["row"] = rows
    documents["start"] = starts
    documents["length"] = tables.selection.kept[which]
    documents["trained"] = tables.trained[which]
    documents["source"] = conversations["source"]
    documents["line"] = conversations["line"]
    documents["part"] = tables.examples["part"][which]
    return documents


def _rows(
    tables: Tables, which: np.ndarray, documents: np.ndarray, shape: tuple[int, int], pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, loss mask and segments (B, T) of rows that hold the examples `which`.

    `documents` are their entries in the table, with `row` counted from the first of these rows.
    All documents are placed at once: one by one, this would be the slowest part of preparing.
    """
    tokens = np.full(shape, pad_id, np.int32).ravel()
    mask = np.zeros(tokens.shape, np.float32)
    segments = np.zeros(tokens.shape, np.int32)
    begin = documents["row"] * shape[1] + documents["start"]
    length = documents["length"].astype(np.int64)
    examples = tables.examples[which]

    places = _ranges(begin, length)
    pairs = zip(examples["offset"].tolist(), length.tolist(), strict=True)
    tokens[places] = np.concatenate([tables.spool.tokens(offset, n) for offset, n in pairs])
    first_of_row = np.searchsorted(documents["row"], documents["row"])
    segments[places] = np.repeat(np.arange(len(which)) - first_of_row + 1, length)

    n_runs = examples["n_runs"].astype(np.int64)
    runs = tables.runs[_ranges(examples["first_run"], n_runs)]
    owner = np.repeat(np.arange(len(which)), n_runs)
    inside = runs["end"] <= length[owner]  # not cut off by --overlong truncate
    runs, owner = runs[inside], owner[inside]
    trained = (runs["end"] - runs["start"]).astype(np.int64)
    mask[_ranges(begin[owner] + runs["start"], trained)] = np.repeat(runs["weight"], trained)
    return tokens.reshape(shape), mask.reshape(shape), segments.reshape(shape)


def _ranges(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The numbers begin[0], begin[0] + 1, … (length[0] of them), then those of begin[1], …"""
    first = np.cumsum(length) - length
    return np.repeat(begin - first, length) + np.arange(int(length.sum()))
