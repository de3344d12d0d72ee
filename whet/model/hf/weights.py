"""Weight files: safetensors into a model's own memory and back, `.pt` without pickles."""

import contextlib
import json
import math
import mmap
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whet.errors import UserError
from whet.files import replaced_folder, write_json
from whet.flags.choices import SaveDtype
from whet.progress import track

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_WEIGHTS = re.compile(r"(adapter_)?model\.safetensors|model-\d{5}-of-\d{5}\.safetensors")
PROGRESS_FROM_BYTES = 2_000_000_000
"""Smaller models are open before a bar could be read."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The floating-point numbers of safetensors; others count as bytes, which nothing here reads."""
READERS = min(4, os.cpu_count() or 1)
"""Threads that read and convert at once."""
_BLOCK_BYTES = 1 << 24
"""What a reader maps of a file at once: mapped pages count as memory of the process."""
_HUGE = 1 << 21


@dataclass(frozen=True)
class Stored:
    """One tensor, in a safetensors `file` under `name` or in memory as `tensor`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None
    name: str = ""
    tensor: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def in_memory(tensors: dict[str, Tensor]) -> dict[str, Stored]:
    """The same description for tensors that are loaded already."""
    return {
        name: Stored(tuple(tensor.shape), tensor.dtype, tensor=tensor)
        for name, tensor in tensors.items()
    }


def open_directory(directory: Path) -> dict[str, Stored]:
    """Describe every tensor of a model directory without reading its values.

    Reads `model.safetensors`, or the shards named by `model.safetensors.index.json`. Raises
    UserError for a missing or damaged file, a name that two shards hold, a tensor that the index
    promises and its shard lacks, and an index that points outside the directory.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return open_safetensors(single)
    if not index.is_file():
        pickled = [*directory.glob("pytorch_model*.bin"), *directory.glob("*.pth")]
        why = f"only {pickled[0].name}, a pickle, which can run code" if pickled else "neither"
        raise UserError(
            f"{directory}: expected {SINGLE} or {INDEX}, found {why}; "
            "download or convert the model in safetensors form"
        )
    return _open_shards(directory, index)


def _open_shards(directory: Path, index: Path) -> dict[str, Stored]:
    weight_map = _read_index(index)
    found: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        shard = directory / name
        if not os.path.isfile(shard):  # which takes impossible names, too
            raise UserError(f"{index}: names the shard {name}, which is missing; download it again")
        for key, stored in open_safetensors(shard).items():
            if key in found:
                raise UserError(f"{shard}: holds {key}, which {found[key].file} holds, too")
            found[key] = stored
    lost = sorted(set(weight_map) - set(found))
    if lost:
        raise UserError(f"{index}: {weight_map[lost[0]]} should hold {lost[0]}, but does not")
    return found


def _read_index(index: Path) -> dict[str, str]:
    """The index's {tensor: shard file name}; every shard must lie in the index's own directory."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{index}: expected JSON with a "weight_map"; download it again') from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: its weight_map is empty or not a table; download it again")
    for name in weight_map.values():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or name in ("", "..")
            or "\\" in name
        ):
            raise UserError(
                f"{index}: points to {name!r}, outside of its own directory; "
                "refused: do not use this model unless you know where it comes from"
            )
    return weight_map


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Describe the tensors of one safetensors file. Raises UserError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _describe(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None


def _describe(path: Path, name: str, part: Any) -> Stored:
    dtype = _DTYPES.get(part.get_dtype(), torch.uint8)
    return Stored(tuple(part.get_shape()), dtype, file=path, name=name)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: truncated or damaged: {why}; download or copy it again")


def empty_on_cpu(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As torch.empty, on pages of 2 MB where Linux has them.

    New memory is made zero page by page when it is first written: by 4 KB that takes three times
    as long as reading a file of the same size from the system's cache does.
    """
    count = math.prod(shape)
    whole = count * dtype.itemsize // _HUGE * _HUGE  # a page more would count as used memory
    if not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, count * dtype.itemsize + _HUGE, flags=private)
    begin = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % _HUGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, begin, whole)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)


def open_pt(path: Path) -> dict:
    """Read a `.pt` file by `weights_only`: tensors and plain values, never code.

    Not mapped into memory: so each tensor can be let go once it is copied.
    Raises UserError if it is damaged or holds anything that would have to be executed.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = str(error).partition("Unsupported ")[2].split("\n")[0] or "objects besides tensors"
        raise UserError(
            f"{path}: refused: it holds code or foreign objects ({what[:120]}); "
            "expected tensors and plain values only, as torch.save writes a state_dict"
        ) from None
    except Exception as error:  # torch's reader fails over damage in ways of all kinds
        raise _damaged(path, f"{type(error).__name__}: {error}".split("\n")[0][:160]) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a dict with model_state_dict, found {type(content)}")
    return content


@torch.no_grad()
def read_into(target: Tensor, stored: Stored, begin: int = 0, transpose: bool = False) -> None:
    """Fill `target` with `target.shape[0]` rows of `stored`, from row `begin` on.

    With `transpose`, the stored matrix is (inputs, outputs) and `begin` counts its columns. Values
    are cast to the dtype of `target`. Raises UserError when the file cannot be read any more.
    """
    if stored.tensor is not None:
        source = stored.tensor.t() if transpose else stored.tensor
        target.copy_(source[begin : begin + target.shape[0]] if source.dim() else source)
        return
    assert stored.file is not None
    rows = stored.shape[0] if stored.shape else 1
    step = max(1, _BLOCK_BYTES * rows // max(stored.nbytes, 1))
    count = rows if transpose else len(target) if stored.shape else 1
    for at in range(0, count, step):
        try:
            with safe_open(stored.file, framework="pt") as file:  # opened again: the old map goes
                if not stored.shape:
                    target.copy_(file.get_tensor(stored.name))
                elif transpose:
                    part = file.get_slice(stored.name)[at : at + step, begin : begin + len(target)]
                    target[:, at : at + step].copy_(part.t())
                else:
                    first, end = begin + at, begin + min(at + step, count)
                    target[at : at + step].copy_(file.get_slice(stored.name)[first:end])
        except (OSError, SafetensorError) as error:
            raise _damaged(stored.file, str(error)) from None


def saved_as(choice: SaveDtype, hf: Mapping[str, Any]) -> torch.dtype:
    """The precision to save weights in: that of the `config.json` `hf`, or another one by choice.

    `same` is float32 where the file names none, or one that weights are not kept in.
    """
    name = (hf.get("dtype") or hf.get("torch_dtype")) if choice == "same" else choice
    known = {str(t): t for t in (torch.bfloat16, torch.float16, torch.float32)}
    return known.get(f"torch.{str(name).removeprefix('torch.')}", torch.float32)


def rounding(choice: SaveDtype, config: Any) -> str | None:
    """A line for the user if saving as `same` rounds the weights that were opened, because their
    `config.json` says so."""
    written = saved_as(choice, config.hf)
    stored = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64)}
    before = stored.get(getattr(config, "file_dtype", ""))
    if choice != "same" or before is None or before.itemsize <= written.itemsize:
        return None
    name = str(written).removeprefix("torch.")
    return (
        f"the weights are {config.file_dtype}, config.json says {name}: they are saved rounded to "
        f'{name}; with "torch_dtype": "{config.file_dtype}" there, they are not'
    )


def rounded(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`value` in `dtype` (None: its own) on the CPU. Raises UserError if that makes it infinite."""
    found = value.to("cpu", dtype)
    if dtype is torch.float16 and found.isinf().any() and not value.isinf().any():
        raise UserError(
            f"{name} holds {float(value.abs().max()):,.0f}, beyond float16's largest number, "
            "65,504; save as bfloat16 or float32"
        )
    return found


def write_directory(
    directory: Path,
    sizes: Mapping[str, int],
    make: Callable[[str], Tensor],
    shard_bytes: int,
) -> None:
    """Write the tensors `make(name)`, of `sizes` bytes, as one safetensors file or as shards.

    One shard at a time is in memory; a new one begins before the present would pass `shard_bytes`.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    total = sum(sizes.values())
    with track("Saving", total / 1e9, "GB", quiet=total < PROGRESS_FROM_BYTES) as progress:
        for file_name, names in plan.filename_to_tensors.items():
            tensors, file = {name: make(name) for name in names}, directory / file_name
            safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
            os.chmod(file, 0o666 & ~_umask())  # the library writes 0600
            progress.advance(sum(sizes[name] for name in names) / 1e9)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(directory / INDEX, index)


def replaced_model(directory: Path, nbytes: int) -> AbstractContextManager[Path]:
    """A temporary directory whose model of `nbytes` replaces the one in `directory`; other files
    stay. See `replaced_folder`: a directory without its configuration is no model."""
    markers = ("config.json", "adapter_config.json")
    return replaced_folder(directory, nbytes, last=markers, outdated=_model_files)


def _model_files(directory: Path) -> list[Path]:
    """The weights of the model in `directory`; those of any other name may be another model's."""
    index: Any = None
    with contextlib.suppress(OSError, ValueError):
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    return [
        file
        for file in directory.iterdir()
        if file.name == INDEX or file.name in named or _WEIGHTS.fullmatch(file.name)
    ]


def _umask() -> int:
    """The mask that new files get; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
