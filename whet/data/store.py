"""The packed file, `sft_packed.h5`: rows of tokens with their loss mask, and where they came from.

`docs/file_format.md` describes every field. `new_store` writes a file block by block, so its memory
does not grow with the data. `PackedStore` reads it, and any HDF5 file that has `tokens` and
`loss_mask`.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from whet.config import packed_file
from whet.data.layout import (
    DOCUMENT,
    FORMAT_VERSION,
    LARGEST_ID,
    REFUSAL,
    Rows,
    Scan,
    check_file,
    read_attributes,
    row_weights,
    scan_rows,
)
from whet.errors import UserError
from whet.files import full_disk_reported, replaced

PACKED = ("HDF5 file", h5py.is_hdf5)
"""What a new packed file may replace: a `whet.files.Kind`."""

SCAN_PLACES = 1 << 20  # places that are read at once where the whole file is gone through


@contextmanager
def new_store(
    path: str | Path,
    n_rows: int,
    context_length: int,
    *,
    weighted: bool = False,
    attrs: Mapping[str, Any] | None = None,
) -> Iterator["StoreWriter"]:
    """Write a packed file of `n_rows` rows: rows in order, attributes and tables at any time.

    `weighted`: keep the mask as float32, for weights other than 0 and 1. `attrs["kind"]` is a key
    of KINDS, `text` if there is none. The file gets its name when the block ends without an
    exception and all rows were written; otherwise nothing stays. Raises UserError where it cannot
    be written.
    """
    path, shape = Path(path), (n_rows, context_length)
    wide = context_length > np.iinfo(np.uint16).max
    kinds = ("<i4", "<f4" if weighted else "u1", "<i4" if wide else "<u2")
    n_bytes = n_rows * (8 + context_length * sum(np.dtype(kind).itemsize for kind in kinds))
    with (
        replaced(path) as aside,
        full_disk_reported(path, n_bytes),
        # v110 is the first format whose attributes may be longer than 64 KB.
        h5py.File(aside, "w", libver="v110") as file,
    ):
        writer = StoreWriter(file)
        for name, kind in zip(Rows._fields, kinds, strict=True):
            writer.dataset(name, shape, kind)
        writer.dataset("loss_tokens", (n_rows,), "<f8")
        writer.set_attrs({"format_version": FORMAT_VERSION, "context_length": context_length})
        writer.set_attrs(attrs or {})
        yield writer
        if writer.written < n_rows:
            raise ValueError(f"{path}: only {writer.written} rows were written")


class StoreWriter:
    """A packed file that `new_store` has begun."""

    def __init__(self, file: h5py.File) -> None:
        self.file = file
        self.written = 0

    def dataset(self, name: str, shape: tuple[int, ...], dtype: Any) -> h5py.Dataset:
        """A new dataset; without times the same data give the same bytes."""
        return self.file.create_dataset(name, shape, dtype, track_times=False)

    def write_rows(
        self, tokens: np.ndarray, loss_mask: np.ndarray, segment_ids: np.ndarray
    ) -> None:
        """Append rows, each array (B, T); their `loss_tokens` are computed here."""
        rows = slice(self.written, self.written + len(tokens))
        weights = {"loss_tokens": row_weights(loss_mask, segment_ids)}
        values = Rows(tokens, loss_mask, segment_ids)._asdict() | weights
        for name, new in values.items():
            data = self.file[name]
            if rows.stop > len(data):
                raise ValueError(f"{rows.stop} rows written into a file of {len(data)}")
            # Converted here: HDF5's own conversion is several times slower than numpy's.
            data[rows] = new.astype(data.dtype, copy=False)
        self.written = rows.stop

    def write_documents(self, documents: np.ndarray) -> None:
        """The table of documents, dtype `DOCUMENT`, sorted by row and start."""
        self.dataset("documents", documents.shape, DOCUMENT)[...] = documents

    def write_numbers(self, name: str, numbers: np.ndarray) -> None:
        """Numbers of the documents such as `labels`, of the pairs (`margins`), in their order, or
        of all places (`logp`)."""
        self.dataset(name, numbers.shape, "<f4")[...] = numbers

    def write_texts(self, name: str, texts: Sequence[str]) -> None:
        """A dataset of texts, for instance one JSON object for each refused line."""
        table = self.dataset(name, (len(texts),), h5py.string_dtype())
        if texts:
            table[...] = np.array(texts, dtype=object)

    def set_attrs(self, attrs: Mapping[str, Any]) -> None:
        """Numbers and texts as they are, anything else as JSON."""
        for key, value in attrs.items():
            if not isinstance(value, str | int | float):
                value = json.dumps(value, ensure_ascii=False)
            self.file.attrs[key] = value


class PackedStore:
    """A packed file, opened for reading.

    Holds no tokens in memory, only one number per row and, once asked for, the documents table.
    Pickles by its path, so that worker processes open the file for themselves. Raises UserError for
    a file that is missing, is not HDF5, does not hold what it should, or is of none of `kinds`.
    What only a look at every token can show is checked in one pass, `scan`, when first needed.
    """

    def __init__(self, path: str | Path, kinds: Collection[str] = ("text",)) -> None:
        self.path = Path(path)
        self._kinds = tuple(kinds)
        if wrong := packed_file(self.path):
            raise UserError(f"{path}: {wrong}")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            why = f"cannot be read ({error})" if error.errno else f"is damaged ({error})"
            if not error.errno and not h5py.is_hdf5(path):
                makes = f"`whet prepare --data {path}` makes a packed file of conversations"
                why = f"is no packed file; {makes}"
            raise UserError(f"{path}: {why}") from None
        with self._undamaged():
            self.attrs = read_attributes(self._file)
            check_file(str(self.path), self._file, self.attrs, self._kinds)
        self._tokens: h5py.Dataset = self._file["tokens"]
        self._mask: h5py.Dataset = self._file["loss_mask"]
        self._segments: h5py.Dataset | None = self._file.get("segment_ids")

    def __reduce__(self) -> tuple[type["PackedStore"], tuple[Path, tuple[str, ...]]]:
        return PackedStore, (self.path, self._kinds)

    def __len__(self) -> int:
        return int(self._tokens.shape[0])

    @property
    def context_length(self) -> int:
        """T, the places of a row."""
        return int(self._tokens.shape[1])

    @property
    def kind(self) -> str:
        """What the documents are to each other, a key of KINDS."""
        return str(self.attrs.get("kind", "text"))

    @property
    def loss_tokens(self) -> np.ndarray:
        """(N,) float64: the summed weight of each row, after the shift of `shifted_weight`."""
        return self.scan.weights

    @property
    def id_range(self) -> tuple[int, int]:
        """The smallest and the largest token id of all places."""
        return self.scan.ids

    @cached_property
    def scan(self) -> Scan:
        """What one pass over all rows finds; raises UserError for rows that cannot be trained."""
        stored = self._file["loss_tokens"][...] if "loss_tokens" in self._file else None
        size = max(1, SCAN_PLACES // self.context_length)
        return scan_rows(
            str(self.path),
            ((i, self._stored(slice(i, i + size))) for i in range(0, len(self), size)),
            vocab_size=self.attrs.get("vocab_size"),
            weights=stored,
            documents=self.documents,
        )

    @cached_property
    def documents(self) -> np.ndarray:
        """The documents table, dtype `DOCUMENT`, by row and start; empty if the file has none."""
        if "documents" not in self._file:
            return np.zeros(0, DOCUMENT)
        with self._undamaged():
            table = self._file["documents"]
            if table.ndim != 1 or table.dtype.names != DOCUMENT.names:
                raise ValueError("documents is not the table of docs/file_format.md")
            found = np.asarray(table[...], DOCUMENT)
            end = found["start"].astype(np.int64) + found["length"]
            inside = (found["row"] >= 0) & (found["row"] < len(self)) & (found["start"] >= 0)
            inside &= (found["length"] > 0) & (end <= self.context_length)
            if not inside.all():
                raise ValueError(f"documents[{np.argmin(inside)}] lies outside of the rows")
            if (np.diff(found["row"]) < 0).any():
                raise ValueError("documents are not sorted by row")
            return found

    @cached_property
    def document_rows(self) -> np.ndarray:
        """(documents,) the row of each, also where the file has no table of them."""
        table = self.documents if len(self.documents) else self.scan.documents
        return np.ascontiguousarray(table["row"])  # numpy would copy it at each use

    def documents_in(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents of `rows`, row after row: the index into `rows` of each, its number in its
        row from 1, and its number in `documents`."""
        rows = np.asarray(rows, self.document_rows.dtype)
        first, end = (np.searchsorted(self.document_rows, rows, side) for side in ("left", "right"))
        row = np.repeat(np.arange(len(rows)), end - first)
        within = np.arange(len(row)) - np.searchsorted(row, row)
        return row, within + 1, first[row] + within

    def documents_of(self, rows: np.ndarray) -> np.ndarray:
        """The entries of `documents` that lie in `rows`, row after row; none without a table."""
        return self.documents[self.documents_in(rows)[2]] if len(self.documents) else self.documents

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
        """`file` and `line` of documents; without a table the packed file and the row, from 1. Of
        pairs and labelled replies also the `side`: chosen or rejected, good or bad."""
        found: list[dict[str, Any]] = []
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
        if self.kind != "text":
            is_pair = self.kind == "preferences"  # whose chosen reply comes first
            labels = np.empty(0) if is_pair else self.values("labels", 1)
            for number, place in zip(numbers, found, strict=True):
                sides = ("chosen", "rejected") if is_pair else ("good", "bad")
                place["side"] = sides[int(number % 2 if is_pair else labels[number] == 0)]
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
        """A dataset of texts; empty if the file has none."""
        if name not in self._file:
            return []
        with self._undamaged():
            return list(self._file[name].asstr()[...])

    @cached_property
    def refusals(self) -> list[dict[str, Any]]:
        """What was left out of the file: objects of source, line, kind and reason."""
        found = []
        for number, text in enumerate(self.texts("refusals")):
            with self._undamaged():
                record = json.loads(text)
                known = isinstance(record, dict) and all(
                    isinstance(record.get(k), kind) for k, kind in REFUSAL.items()
                )
                if not known:
                    raise ValueError(f"refusals[{number}] is no object of {', '.join(REFUSAL)}")
            found.append(record)
        return found

    def values(self, name: str, documents: int) -> np.ndarray:
        """A dataset (n,) float32 that has a number for each `documents` documents; NaN: not known.

        All are NaN if the file has none.
        """
        n, left = divmod(len(self.document_rows), documents)
        if left:
            raise UserError(f"{self.path}: {name} needs {documents} documents each, {left} is over")
        if name not in self._file:
            return np.full(n, np.nan, np.float32)
        return self._numbers(name, (n,))

    def of_places(self, name: str) -> np.ndarray:
        """A dataset (rows, T) float32 that has a number for each place, whole in memory."""
        return self._numbers(name, self._tokens.shape)

    def _numbers(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        with self._undamaged():
            data = self._file[name]
            if data.dtype.kind not in ("biuf" if name == "labels" else "iuf"):
                raise ValueError(f"{name} holds {data.dtype}, expected numbers")
            found = np.asarray(data[...], np.float32)
            if found.shape != shape:
                expected = " x ".join(map(str, shape))
                raise ValueError(f"{name} has {found.shape} numbers, expected {expected}")
            return found

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
                part = self._stored(slice(wanted[run[0]], wanted[run[-1]] + 1))
                for target, values in zip(read, part, strict=True):
                    if (
                        not np.can_cast(values.dtype, target.dtype)
                        and abs(values).max() > LARGEST_ID
                    ):
                        _ = self.scan  # says which number is too large
                    target[run] = values
        return read

    def _stored(self, rows: slice) -> Rows:
        """Rows with the types of the file."""
        with self._undamaged():
            tokens, mask = self._tokens[rows], self._mask[rows]
            if self._segments is None:
                return Rows(tokens, mask, np.ones(tokens.shape, np.uint8))
            return Rows(tokens, mask, self._segments[rows])

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
