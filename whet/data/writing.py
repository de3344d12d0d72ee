"""Encoded examples wait in a spool; those that are selected become rows of the packed file.

Tokens wait in a nameless temporary file beside the output, which vanishes with the process, however
it ends; what is known of them, some 250 bytes for each conversation, waits in memory.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from whet.chat.certificate import Refusal
from whet.data.encoding import CONVERSATION, EXAMPLE, KIND_NAMES, RUN, EncodedBlock
from whet.data.mixing import Selection
from whet.data.packing import pack
from whet.data.store import DOCUMENT, new_store
from whet.errors import UserError
from whet.flags.prepare import Config
from whet.progress import track

ROWS_AT_ONCE = 256
KEPT_REFUSALS = 10_000
"""Refusals that are kept with their texts; all of them are counted."""
TABLES = {"conversations": CONVERSATION, "examples": EXAMPLE, "runs": RUN}
"""The arrays of a block that are joined, and the types of their entries."""


class Spool:
    """Blocks in, in order; afterwards the tables, and the tokens of any example."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError, here and later, if nothing can be written there."""
        self._folder = folder
        with self._as_user_error():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".whet-tokens-")  # noqa: SIM115
        self._tables = {name: [np.zeros(0, dtype)] for name, dtype in TABLES.items()}
        self._counts: Counter[str] = Counter()  # conversations, runs and tokens so far
        self.refusals: list[Refusal] = []
        self.refused: Counter[tuple[int, str]] = Counter()  # by source and kind
        self.lines: Counter[int] = Counter()  # read, by source
        self.notes: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()  # records that have a field which nothing reads
        self.renamed: Counter[str] = Counter()  # records that have a field of `--fields`

    @property
    def n_tokens(self) -> int:
        """Tokens so far."""
        return self._counts["tokens"]

    def add(self, block: EncodedBlock) -> None:
        """Take over a block; its numbers are shifted to follow those already here."""
        counted = {"conversation": "conversations", "first_run": "runs", "offset": "tokens"}
        for column, name in counted.items():
            block.examples[column] += self._counts[name]
            self._counts[name] += len(getattr(block, name))
        for name, blocks in self._tables.items():
            blocks.append(getattr(block, name))
        with self._as_user_error():
            self._file.write(block.tokens.astype("<i4", copy=False).data)
        self.lines[block.source] += block.lines
        for name in ("notes", "unused", "renamed"):
            getattr(self, name).update(getattr(block, name))
        for refusal in block.refusals:
            self.refused[block.source, refusal.kind] += 1
            if len(self.refusals) < KEPT_REFUSALS:
                self.refusals.append(refusal)

    def refused_by_kind(self) -> Counter[str]:
        """How many lines were refused, over all sources."""
        kinds: Counter[str] = Counter()
        for (_, kind), n in self.refused.items():
            kinds[kind] += n
        return kinds

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All conversations, examples and runs; ends the adding."""
        with self._as_user_error():
            self._file.flush()
        conversations, examples, runs = map(np.concatenate, self._tables.values())
        return conversations, examples, runs

    def tokens(self, offset: int, length: int) -> np.ndarray:
        """Tokens offset..offset+length, int32."""
        return np.frombuffer(os.pread(self._file.fileno(), 4 * length, 4 * offset), "<i4")

    @contextmanager
    def _as_user_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--out: {self._folder} cannot be written: {error.strerror}; nothing is left there"
            ) from None

    def close(self) -> None:
        """Let go of the tokens."""
        with suppress(OSError):  # what could not be written is tried again
            self._file.close()


@dataclass(frozen=True)
class Tables:
    """The tables of all examples (`whet.data.encoding`), their tokens, and what becomes of them."""

    config: Config
    paths: tuple[str, ...]
    """Of the sources."""
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

    @property
    def cuts(self) -> bool:
        """Whether nothing more than now can be made to fit by cutting."""
        return self.config.overlong == "truncate" or self.kind == "preferences"

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
    attrs: Mapping[str, Any],
    refusals: Sequence[Refusal],
    quiet: bool = False,
) -> int:
    """Pack the examples `members`, each as often as it has copies, and write them with the
    attributes `attrs`; returns the number of rows."""
    kind, config = tables.kind, tables.config
    size = 2 if kind == "preferences" else 1  # examples that stand side by side
    units = members.reshape(-1, size)
    units = np.repeat(units, tables.selection.copies[units[:, 0]], axis=0)
    lengths = tables.selection.kept[units]
    packing = pack(lengths.sum(1), config.context_length, config.seed)
    order = np.lexsort((packing.start, packing.row))
    starts = packing.start[order, None] + np.cumsum(lengths[order], axis=1) - lengths[order]
    which, rows = units[order].ravel(), np.repeat(packing.row[order], size)
    documents = _documents(tables, which, rows, starts.ravel())
    weighted = bool(np.any(tables.runs["weight"] != 1))
    n_rows, width = packing.n_rows, config.context_length
    attrs = {**attrs, "kind": kind}
    with (
        new_store(path, n_rows, width, weighted=weighted, attrs=attrs) as writer,
        track(f"Writing {Path(path).name}", n_rows, "rows", quiet) as progress,
    ):
        for first in range(0, n_rows, ROWS_AT_ONCE):
            n = min(ROWS_AT_ONCE, n_rows - first)
            begin, end = np.searchsorted(rows, (first, first + n))
            own = documents[begin:end].copy()
            own["row"] -= first
            rows_of_block = _rows(tables, which[begin:end], own, (n, width), attrs["pad_id"])
            writer.write_rows(*rows_of_block)
            progress.advance(n)
        writer.write_documents(documents)
        left_out = [
            {"source": r.source, "line": r.line, "kind": r.kind, "reason": r.message}
            for r in refusals
        ]
        writer.write_texts("refusals", [json.dumps(r, ensure_ascii=False) for r in left_out])
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
