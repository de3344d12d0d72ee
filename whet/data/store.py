"""The packed file, `sft_packed.h5`: rows of tokens with their loss mask, and where they came from.

`docs/file_format.md` describes every field. `StoreWriter` writes a file block by block under a
temporary name, so its memory does not grow with the data and nothing half-written is ever found
under the file's own name. `PackedStore` reads it, and any HDF5 file that has `tokens` and
`loss_mask`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import h5py
import numpy as np

from whet.errors import UserError

FORMAT_VERSION = 1
DOCUMENT = np.dtype(
    [
        ("row", "<i8"),
        ("start", "<i4"),
        ("length", "<i4"),
        ("trained", "<i4"),
        ("source", "<i4"),
        ("line", "<i8"),
        ("part", "<i4"),
    ]
)
"""One document: tokens start..start+length of `row`; `trained` of them have a weight; it was read
from line `line` (from 1) of `attrs["sources"][source]`; `part` counts the examples of one line."""

PACKED = ("HDF5 file", h5py.is_hdf5)
"""What a new packed file may replace: a `whet.files.Kind`."""

SCAN_ROWS = 1024  # rows that are read at once where the whole file is gone through


class Rows(NamedTuple):
    """Some rows of the file; B is their number, T the context length."""

    tokens: np.ndarray  # (B, T) int32
    loss_mask: np.ndarray  # (B, T) float32: the loss weight of the token that stands here
    segment_ids: np.ndarray  # (B, T) int32: 0 padding, 1.. the documents of the row


def shifted_weight(loss_mask: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """The weight (B, T) float32 with which each place predicts the token after it.

    Place t of a document is trained to say the document's token t+1, with the mask of t+1. The
    last place of a document predicts nothing: what follows belongs to another document. So the
    mask of a document's first token has no effect.
    """
    weight = np.zeros(loss_mask.shape, np.float32)
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    np.multiply(loss_mask[:, 1:], same, out=weight[:, :-1], casting="unsafe")
    return weight


def row_weights(loss_mask: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """`loss_tokens` of some rows: (B,) float64 sums of their `shifted_weight`."""
    return shifted_weight(loss_mask, segment_ids).sum(axis=1, dtype=np.float64)


class StoreWriter:
    """Write a packed file of `n_rows` rows; use it in a `with` block.

    Rows come in order, in blocks of any size; attributes and tables at any time. The file gets its
    name when the block ends without an exception and all rows were written; otherwise nothing
    stays.
    """

    def __init__(
        self,
        path: str | Path,
        n_rows: int,
        context_length: int,
        *,
        weighted: bool = False,
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """`weighted`: keep the mask as float32, for weights other than 0 and 1."""
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._written = 0
        mask_bytes = 4 if weighted else 1
        place_bytes = 4 + mask_bytes + (4 if context_length > np.iinfo(np.uint16).max else 2)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _check_room(self.path, n_rows * (context_length * place_bytes + 8))
            # v110 is the first format whose attributes may be longer than 64 KB.
            self._file = h5py.File(self._temporary, "w", libver="v110")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error}); see --out") from None
        shape = (n_rows, context_length)
        self._tokens = self._dataset("tokens", shape, "<i4")
        self._mask = self._dataset("loss_mask", shape, "<f4" if weighted else "u1")
        wide = context_length > np.iinfo(np.uint16).max
        self._segments = self._dataset("segment_ids", shape, "<i4" if wide else "<u2")
        self._loss_tokens = self._dataset("loss_tokens", (n_rows,), "<f8")
        self.set_attrs({"format_version": FORMAT_VERSION, "context_length": context_length})
        self.set_attrs(attrs or {})

    def _dataset(self, name: str, shape: tuple[int, ...], dtype: Any) -> h5py.Dataset:
        # Without times the same data give the same bytes.
        return self._file.create_dataset(name, shape, dtype, track_times=False)

    def write_rows(
        self, tokens: np.ndarray, loss_mask: np.ndarray, segment_ids: np.ndarray
    ) -> None:
        """Append rows, each array (B, T); their `loss_tokens` are computed here."""
        rows = slice(self._written, self._written + len(tokens))
        if rows.stop > len(self._tokens):
            raise ValueError(f"{rows.stop} rows written into a file of {len(self._tokens)}")
        # Converted here: HDF5's own conversion is several times slower than numpy's.
        self._tokens[rows] = tokens.astype(self._tokens.dtype, copy=False)
        self._mask[rows] = loss_mask.astype(self._mask.dtype, copy=False)
        self._segments[rows] = segment_ids.astype(self._segments.dtype, copy=False)
        self._loss_tokens[rows] = row_weights(loss_mask, segment_ids)
        self._written = rows.stop

    def write_documents(self, documents: np.ndarray) -> None:
        """The table of documents, dtype `DOCUMENT`, sorted by row and start."""
        table = self._dataset("documents", documents.shape, DOCUMENT)
        table[...] = documents

    def write_texts(self, name: str, texts: Sequence[str]) -> None:
        """A dataset of texts, for instance one JSON object for each refused line."""
        table = self._dataset(name, (len(texts),), h5py.string_dtype())
        if texts:
            table[...] = np.array(texts, dtype=object)

    def set_attrs(self, attrs: Mapping[str, Any]) -> None:
        """Numbers and texts as they are, anything else as JSON."""
        for key, value in attrs.items():
            if not isinstance(value, str | int | float):
                value = json.dumps(value, ensure_ascii=False)
            self._file.attrs[key] = value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        complete = self._written == len(self._tokens)
        try:
            self._file.close()
            if kind is None and complete:
                os.replace(self._temporary, self.path)
                return
        except (OSError, RuntimeError) as refused:  # HDF5 writes much of it only now
            kind, error = OSError, refused
        self._temporary.unlink(missing_ok=True)
        if kind is None:
            raise ValueError(f"{self.path}: only {self._written} rows were written")
        if issubclass(kind, OSError):
            found = re.search("error message = '(.*?)'", str(error))  # HDF5 tells much around it
            reason = found[1] if found else str(error)
            raise UserError(f"{self.path}: cannot be written: {reason}; see --out") from None


def _check_room(path: Path, nbytes: int) -> None:
    """Raise UserError if the disk has no room for `nbytes`: HDF5 can crash where it runs full."""
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise UserError(
            f"{path}: needs {nbytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free on its disk; "
            "see --out"
        )


class PackedStore:
    """A packed file, opened for reading.

    Holds no tokens in memory, only one number per row and, once asked for, the documents table.
    Pickles by its path, so that worker processes open the file for themselves. Raises UserError for
    a file that is missing, is not HDF5, or does not hold what it should.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise UserError(f"{path}: is a directory; expected a packed file of `whet prepare`")
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; `whet prepare` makes packed files")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise UserError(f"{path}: is not a readable HDF5 file ({error})") from None
        with self._undamaged():
            self.attrs: dict[str, Any] = {k: _attribute(v) for k, v in self._file.attrs.items()}
            self._check()
        self._tokens: h5py.Dataset = self._file["tokens"]
        self._mask: h5py.Dataset = self._file["loss_mask"]
        self._segments: h5py.Dataset | None = self._file.get("segment_ids")

    def __reduce__(self) -> tuple[type["PackedStore"], tuple[Path]]:
        return PackedStore, (self.path,)

    def __len__(self) -> int:
        return int(self._tokens.shape[0])

    @property
    def context_length(self) -> int:
        """T, the places of a row."""
        return int(self._tokens.shape[1])

    @cached_property
    def loss_tokens(self) -> np.ndarray:
        """(N,) float64: the summed weight of each row, after the shift of `shifted_weight`."""
        if "loss_tokens" in self._file:
            with self._undamaged():
                return np.asarray(self._file["loss_tokens"][...], np.float64)
        parts = []
        for start, rows in self._blocks():
            wrong = ~(rows.loss_mask >= 0) | np.isinf(rows.loss_mask)
            if wrong.any():
                row, place = np.argwhere(wrong)[0]
                raise UserError(
                    f"{self.path}: loss_mask[{start + row}, {place}] is "
                    f"{rows.loss_mask[row, place]:g}; expected finite weights of 0 or more"
                )
            parts.append(row_weights(rows.loss_mask, rows.segment_ids))
        return np.concatenate(parts)

    @cached_property
    def id_range(self) -> tuple[int, int]:
        """The smallest and the largest token id of all places; reads the whole file."""
        ends = [(int(rows.tokens.min()), int(rows.tokens.max())) for _, rows in self._blocks()]
        return min(low for low, _ in ends), max(high for _, high in ends)

    @cached_property
    def documents(self) -> np.ndarray:
        """The documents table, dtype `DOCUMENT`, by row and start; empty if the file has none."""
        if "documents" not in self._file:
            return np.zeros(0, DOCUMENT)
        with self._undamaged():
            table = self._file["documents"]
            if table.ndim != 1 or table.dtype.names != DOCUMENT.names:
                raise ValueError("documents is not the table of docs/file_format.md")
            return np.asarray(table[...], DOCUMENT)

    @cached_property
    def document_rows(self) -> np.ndarray:
        """(documents,) the row of each, also where the file has no table of them."""
        if len(self.documents):
            return np.ascontiguousarray(self.documents["row"])  # numpy would copy it at each use
        if self._segments is None:
            return np.arange(len(self))
        counts = [rows.segment_ids.max(1) for _, rows in self._blocks()]
        return np.repeat(np.arange(len(self)), np.concatenate(counts))

    def document_ids(self, rows: np.ndarray) -> np.ndarray:
        """The numbers, in `documents`, of the documents of `rows`, row after row."""
        rows = np.asarray(rows, self.document_rows.dtype)
        first = np.searchsorted(self.document_rows, rows, "left")
        end = np.searchsorted(self.document_rows, rows, "right")
        ranges = [np.arange(a, b) for a, b in zip(first, end, strict=True)]
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)

    def documents_of(self, rows: np.ndarray) -> np.ndarray:
        """The entries of `documents` that lie in `rows`, row after row; none without a table."""
        return self.documents[self.document_ids(rows)] if len(self.documents) else self.documents

    @property
    def fingerprint(self) -> str:
        """Distinguishes packed files without reading all tokens."""
        digest = hashlib.sha256(self.loss_tokens.tobytes())
        digest.update(json.dumps(self.attrs, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:32]

    def numbers(self, rows: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """The number, in `documents`, of document `segments[i]` (from 1) of row `rows[i]`."""
        rows = np.asarray(rows, self.document_rows.dtype)
        return np.searchsorted(self.document_rows, rows, "left") + np.maximum(segments - 1, 0)

    @cached_property
    def sources(self) -> list[str]:
        """The files that the documents were read from; the attribute holds names, or objects with
        a `path`."""
        entries = self.attrs.get("sources")
        entries = entries if isinstance(entries, list) else []
        return [str(e.get("path", e) if isinstance(e, dict) else e) for e in entries]

    def places(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """`file` and `line` of documents; without a table the packed file and the row, from 1."""
        found = []
        for number in numbers:
            if number < len(self.documents):
                entry = self.documents[number]
                source = int(entry["source"])
                known = 0 <= source < len(self.sources)
                name = self.sources[source] if known else f"source {source}"
                found.append({"file": name, "line": int(entry["line"])})
            else:
                row = int(self.document_rows[number])
                found.append({"file": str(self.path), "line": row + 1})
        return found

    def find(self, file: str, line: int) -> np.ndarray:
        """The numbers of the documents of a line; the end of the file's name is enough.

        Raises UserError if there is no such source or document.
        """
        if len(self.documents) == 0 and Path(file).name == self.path.name:
            return np.flatnonzero(self.document_rows == line - 1)
        fits = [i for i, s in enumerate(self.sources) if s == file or s.endswith("/" + file)]
        if not fits:
            names = ", ".join(self.sources)
            raise UserError(f"{file}:{line}: no such source; there are {names}")
        table = self.documents
        found = np.flatnonzero(np.isin(table["source"], fits) & (table["line"] == line))
        if len(found) == 0:
            raise UserError(f"{file}:{line}: no document of {self.path} comes from there")
        return found

    def texts(self, name: str) -> list[str]:
        """A dataset of texts (`refusals`: a JSON object each); empty if the file has none."""
        if name not in self._file:
            return []
        with self._undamaged():
            return list(self._file[name].asstr()[...])

    def rows(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows with these numbers, in this order; a number may occur more than once."""
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of {len(self)}")
        shape = (len(wanted), self.context_length)
        dtypes = (np.int32, np.float32, np.int32)
        read = Rows(*(np.empty(shape, dtype) for dtype in dtypes))
        order = np.argsort(wanted, kind="stable")
        # One read for each run of consecutive rows: far faster than h5py's own selection by index.
        breaks = np.flatnonzero(np.diff(wanted[order]) != 1) + 1
        for run in np.split(order, breaks):
            if len(run):
                part = self._read(slice(wanted[run[0]], wanted[run[-1]] + 1))
                for target, values in zip(read, part, strict=True):
                    target[run] = values
        return read

    def _blocks(self) -> Iterator[tuple[int, Rows]]:
        """The whole file in blocks, each with the number of its first row."""
        for start in range(0, len(self), SCAN_ROWS):
            yield start, self._read(slice(start, start + SCAN_ROWS))

    def _read(self, rows: slice) -> Rows:
        with self._undamaged():
            tokens = np.asarray(self._tokens[rows], np.int32)
            mask = np.asarray(self._mask[rows], np.float32)
            if self._segments is None:
                return Rows(tokens, mask, np.ones(tokens.shape, np.int32))
            return Rows(tokens, mask, np.asarray(self._segments[rows], np.int32))

    @contextmanager
    def _undamaged(self) -> Iterator[None]:
        """Whatever the HDF5 library raises while it reads, the file is what is wrong."""
        try:
            yield
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self.path}: is damaged or not a packed file ({reason}); copy it again, or "
                "prepare it again with `whet prepare`"
            ) from None

    def _check(self) -> None:
        """Refuse what later code would misread."""
        version = self.attrs.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise UserError(
                f"{self.path}: has format version {version}, this Whet reads {FORMAT_VERSION}; "
                "prepare it again with `whet prepare`"
            )
        self._check_inside()
        shapes = {}
        for name, kinds in (("tokens", "iu"), ("loss_mask", "biuf"), ("segment_ids", "iu")):
            data = self._file.get(name)
            if data is None and name == "segment_ids":
                continue
            if not isinstance(data, h5py.Dataset):
                raise UserError(f"{self.path}: has no dataset {name!r}; see docs/file_format.md")
            if data.ndim != 2 or data.dtype.kind not in kinds:
                raise UserError(
                    f"{self.path}: {name} must be numbers of shape (rows, context length), "
                    f"got {data.dtype} of shape {data.shape}"
                )
            shapes[name] = data.shape
        if len(set(shapes.values())) > 1:
            raise UserError(f"{self.path}: shapes differ: {shapes}")
        if 0 in shapes["tokens"]:
            raise UserError(f"{self.path}: holds no rows (shape {shapes['tokens']})")
        if "loss_tokens" in self._file and self._file["loss_tokens"].shape != shapes["tokens"][:1]:
            raise UserError(f"{self.path}: loss_tokens must have one number for each row")

    def _check_inside(self) -> None:
        """Refuse links, and data that lie in other files: a file from a stranger must not read
        what else is on this machine."""
        for name in self._file:
            data = self._file.get(name) if self._is_hard(name) else None
            if data is None or (
                isinstance(data, h5py.Dataset) and (data.external or data.is_virtual)
            ):
                raise UserError(
                    f"{self.path}: {name!r} leads out of its place in the file; refused: do not "
                    "use this file unless you know where it comes from"
                )

    def _is_hard(self, name: str) -> bool:
        return isinstance(self._file.get(name, getlink=True), h5py.HardLink)


def _attribute(value: Any) -> Any:
    """An attribute as it was given to `StoreWriter.set_attrs`."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str) and value[:1] in ("{", "["):
        return json.loads(value)
    return value.item() if isinstance(value, np.generic) else value
