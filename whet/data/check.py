"""What an HDF5 file must be to be read as a packed file, as far as it shows without its rows.

Files come from strangers: nothing here trusts one. What the rows hold is checked by
`whet.data.rows.scan_rows`.
"""

import json
import math
from collections.abc import Collection
from typing import Any

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
