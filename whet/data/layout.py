"""The layout of a packed file: its datasets, its attributes, and the check that a file has them.

Files come from strangers: nothing here trusts one, and whatever later code would silently misread
is an error. `check_file` looks at all but the rows, `scan_rows` goes once through these.
`docs/file_format.md` describes every field.
"""

import json
import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import h5py
import numpy as np

from whet.errors import UserError

FORMAT_VERSION = 1
KINDS = {
    "text": "documents that stand alone, which whet sft and whet pretrain train",
    "preferences": "pairs of a chosen and a rejected reply, which whet reward and whet dpo train",
    "labels": "replies labelled good or bad, which whet dpo --loss kto trains",
    "rollout": "sampled replies with their rewards, which whet grpo and whet ppo write and train",
}
"""What the documents of a file are to each other: its attribute `kind`."""
ATTRIBUTES = {
    "format_version": int,
    "kind": str,
    "context_length": int,
    "vocab_size": int,
    "pad_id": int,
    "tokenizer_hash": str,
    "template_hash": str,
    "chat": dict,
    "sources": list,
    "source_sha256": list,
    "settings": dict,
    "account": dict,
    "ends": list,
    "totals": list,
    "places": list,
}
"""The attributes that later code reads, and their types."""
REFUSAL = {"source": str, "line": int, "kind": str, "reason": str}
"""The JSON objects of `refusals`."""
DATASETS = (
    "tokens", "loss_mask", "segment_ids", "loss_tokens", "documents", "refusals",
    "scores", "margins", "labels", "logp", "advantages", "rewards",
    "values", "returns", "token_advantages",
)  # fmt: skip

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

LARGEST_ID = 2**31 - 1
LARGEST_WEIGHT = 1e30  # float32 holds it


class Rows(NamedTuple):
    """Some rows of the file; B is their number, T the context length."""

    tokens: np.ndarray  # (B, T) int32
    loss_mask: np.ndarray  # (B, T) float32: the loss weight of the token at this place
    segment_ids: np.ndarray  # (B, T) int32: 0 padding, 1.. the documents of the row


class Scan(NamedTuple):
    """What one pass over all N rows finds."""

    weights: np.ndarray  # (N,) float64, the sum of each row's `shifted_weight`
    ids: tuple[int, int]  # the smallest and the largest token id
    documents: np.ndarray  # (D,) DOCUMENT, from the segments alone: source -1, line 0


def check_file(path: str, file: h5py.File, attrs: dict[str, Any], kinds: Collection[str]) -> None:
    """Refuse what later code would misread, as far as it shows without reading the rows."""
    for name in file:
        _check_place(path, file, name)
    version = attrs.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: has format version {version}, this Whet reads {FORMAT_VERSION}; "
            "prepare it again with `whet prepare`"
        )
    shapes = {}
    for name, types in (("tokens", "iu"), ("loss_mask", "biuf"), ("segment_ids", "iu")):
        if name not in file and name == "segment_ids":
            continue
        data = file.get(name)
        if data is None:
            raise UserError(f"{path}: has no dataset {name!r}; see docs/file_format.md")
        if data.ndim != 2 or data.dtype.kind not in types:
            raise UserError(
                f"{path}: {name} must be numbers of shape (rows, context length), "
                f"got {data.dtype} of shape {data.shape}"
            )
        shapes[name] = data.shape
    if len(set(shapes.values())) > 1:
        raise UserError(f"{path}: shapes differ: {shapes}")
    shape = shapes["tokens"]
    if 0 in shape:
        raise UserError(f"{path}: holds no rows (shape {shape})")
    weights = file.get("loss_tokens")
    if weights is not None and (weights.shape != shape[:1] or weights.dtype.kind not in "iuf"):
        raise UserError(f"{path}: loss_tokens must have one number for each row")
    if attrs.get("context_length", shape[1]) != shape[1]:
        said = attrs["context_length"]
        raise UserError(f"{path}: context_length is {said}, and rows have {shape[1]}")
    kind = attrs.get("kind", "text")
    if kind not in kinds:
        what = KINDS.get(kind, "of a kind that this Whet does not know")
        raise UserError(f"{path}: holds {what}; expected {' or '.join(KINDS[k] for k in kinds)}")
    if kind == "rollout" and (missing := {"ends", "totals", "places"} - attrs.keys()):
        raise UserError(f"{path}: a rollout without {', '.join(sorted(missing))}: it is damaged")


def _check_place(path: str, file: h5py.File, name: str) -> None:
    """Refuse links, and data that lie in other files: a file from a stranger must not read
    what else is on this machine. And groups, and shapes of which nothing was ever written."""
    hard = isinstance(file.get(name, getlink=True), h5py.HardLink)
    data = file.get(name) if hard else None
    if data is None or (isinstance(data, h5py.Dataset) and (data.external or data.is_virtual)):
        raise UserError(
            f"{path}: {name!r} leads out of its place in the file; refused: do not "
            "use this file unless you know where it comes from"
        )
    if name not in DATASETS:
        return
    if not isinstance(data, h5py.Dataset):
        raise UserError(f"{path}: {name!r} is a group; expected a dataset")
    if data.size and not _is_written(data):
        raise UserError(
            f"{path}: {name} says that its shape is {data.shape}, and the file holds less"
        )


def _is_written(data: h5py.Dataset) -> bool:
    """Whether the file holds all of a dataset: HDF5 reads what was never written as zeros."""
    if data.chunks is None:
        return int(data.id.get_storage_size()) >= data.size * data.dtype.itemsize
    needed = math.prod(-(-n // c) for n, c in zip(data.shape, data.chunks, strict=True))
    return int(data.id.get_num_chunks()) == needed


def read_attributes(file: h5py.File) -> dict[str, Any]:
    """The attributes as they were given to `StoreWriter.set_attrs`, all of them what JSON can say.

    Of those that Whet does not know, others are left out. Raises ValueError for one that it knows.
    """
    found = {}
    for name in file.attrs:
        expected = ATTRIBUTES.get(name)
        try:
            value = file.attrs[name]
            value = value.decode() if isinstance(value, bytes) else value
            value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
            if isinstance(value, str) and value[:1] in ("{", "[") and expected is not str:
                value = json.loads(value)
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError, OSError):
            if expected is None:
                continue
            raise ValueError(f"attribute {name} cannot be read") from None
        if expected and (not isinstance(value, expected) or isinstance(value, bool)):
            raise ValueError(f"attribute {name} is {value!r:.60}, expected {expected.__name__}")
        found[name] = value
    return found


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


def segment_documents(segments: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The runs of equal, non-zero `segments` (B, T) as a table of documents."""
    n_rows, width = segments.shape
    begins = np.ones(segments.shape, bool)
    np.not_equal(segments[:, 1:], segments[:, :-1], out=begins[:, 1:])
    start = np.flatnonzero(begins)
    length = np.diff(start, append=n_rows * width)
    trained = np.add.reduceat(mask.reshape(-1) != 0, start, dtype=np.int64)
    found = np.zeros(len(start), DOCUMENT)
    found["row"], found["start"] = np.divmod(start, width)
    found["length"], found["trained"], found["source"] = length, trained, -1
    return found[segments.reshape(-1)[start] != 0]


def scan_rows(
    path: str,
    blocks: Iterable[tuple[int, Rows]],
    *,
    vocab_size: int | None,
    weights: np.ndarray | None,
    documents: np.ndarray,
) -> Scan:
    """Check all rows and sum up what they hold.

    `blocks` are (number of the first row, rows as they are stored: of any type). What else the file
    says must agree: `weights` are its `loss_tokens`, None where it has none, and
    `documents` is its table, empty where it has none. Raises UserError that names the first place.
    """
    sums, found, ends = [], [], []
    rows_of_table = np.ascontiguousarray(documents["row"])  # searched for each block
    for first, rows in blocks:
        _check_values(path, first, rows, vocab_size)
        ends.append((int(rows.tokens.min()), int(rows.tokens.max())))
        own = segment_documents(rows.segment_ids, rows.loss_mask)
        _check_segments(path, first, rows, own)
        own["row"] += first
        sums.append(row_weights(rows.loss_mask, rows.segment_ids))
        if len(documents):
            end = first + len(rows.tokens)
            part = slice(*np.searchsorted(rows_of_table, (first, end)))
            _check_table(path, documents[part], own, first, end)
        else:
            found.append(own)
    total = np.concatenate(sums)
    if weights is not None and not (same := np.isclose(weights, total, rtol=1e-5, atol=0)).all():
        row = int(np.argmin(same))
        raise UserError(
            f"{path}: loss_tokens[{row}] is {weights[row]:g}, and the mask of this row adds up to "
            f"{total[row]:g}; without loss_tokens it is computed"
        )
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return Scan(total, (low, high), np.concatenate(found) if found else documents)


def _check_table(path: str, said: np.ndarray, own: np.ndarray, first: int, end: int) -> None:
    """The table's entries `said` of rows first..end must be the documents of their segments."""
    if len(said) == len(own):
        same = [(said[column] == own[column]) for column in ("row", "start", "length")]
        if np.all(same):
            return
    raise UserError(
        f"{path}: documents and segment_ids disagree within the rows {first} to {end - 1}"
    )


def _check_values(path: str, first: int, rows: Rows, vocab_size: int | None) -> None:
    """Tokens must be ids, masks finite weights."""
    limit = LARGEST_ID if vocab_size is None else vocab_size - 1
    if place := _outside(rows.tokens, 0, limit):
        of = "" if vocab_size is None else f" of the vocabulary of {vocab_size:,}"
        raise _wrong(path, "tokens", rows.tokens, first, place, f"expected a token id{of}")
    if place := _outside(rows.loss_mask, 0, LARGEST_WEIGHT):
        expected = "expected finite weights of 0 or more"
        raise _wrong(path, "loss_mask", rows.loss_mask, first, place, expected)


def _check_segments(path: str, first: int, rows: Rows, documents: np.ndarray) -> None:
    """Segments must count the documents of a row, and padding must have no weight."""
    number = np.arange(len(documents))
    number += 1 - np.searchsorted(documents["row"], documents["row"])
    said = rows.segment_ids[documents["row"], documents["start"]]
    if (said != number).any():
        wrong = int(np.argmax(said != number))
        place = (int(documents["row"][wrong]), int(documents["start"][wrong]))
        expected = f"expected {number[wrong]}: documents of a row count 1, 2, … and padding is 0"
        raise _wrong(path, "segment_ids", rows.segment_ids, first, place, expected)
    lost = (rows.segment_ids == 0) & (rows.loss_mask != 0)
    if lost.any():
        place = _first(lost)
        expected = "but segment_ids is 0, which is padding; documents of a row count from 1"
        raise _wrong(path, "loss_mask", rows.loss_mask, first, place, expected)


Place = tuple[int, int]
"""(row, place of the row)"""


def _outside(values: np.ndarray, low: float, high: float) -> Place | None:
    """The first place whose value is not within low..high (NaN never is), None if all are."""
    if values.min() >= low and values.max() <= high:
        return None
    return _first(~((values >= low) & (values <= high)))


def _first(where: np.ndarray) -> Place:
    row, place = np.argwhere(where)[0]
    return int(row), int(place)


def _wrong(
    path: str, name: str, values: np.ndarray, first: int, place: Place, expected: str
) -> UserError:
    at = f"{name}[{first + place[0]}, {place[1]}]"
    return UserError(f"{path}: {at} is {float(values[place]):.10g}; {expected}")
