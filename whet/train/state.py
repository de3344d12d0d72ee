"""The training state by which a run resumes: atomic, checked, loadable on any number of ranks.

    state/step_00000200/
        shard-00001-….safetensors   weights and optimizer moments, some files a rank
        facts.json                  step, recent gradient norms, lengths of the run's files, …
        manifest.json               size and SHA-256 of each file above

A save is written aside under a name that starts with a dot, flushed, hashed, renamed, and the
folder flushed; so a folder with the final name is complete unless the disk itself lost something,
which the hashes show. torch's distributed checkpointing writes safetensors here: unlike its default
format, that needs no pickle to be read. Nothing random is saved: all of it is a function of (seed,
step, rank).
"""

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from whet.errors import UserError
from whet.files import flush, write_json
from whet.train.distributed import Ranks, from_first, unwrap
from whet.train.optim import create_state, plain_tensors

FORMAT_VERSION = 1
HASH_CHUNK_BYTES = 1 << 22
FILE_BYTES = 1 << 27
"""What a file of a state holds at most, unless one tensor is larger."""


@dataclasses.dataclass
class Facts:
    """What a run knows about itself besides its tensors."""

    step: int = 0
    """Optimizer steps taken (skipped ones count)."""
    evaluated: int = -1
    """The last step at which an evaluation was completed and logged."""
    total_steps: int = 0
    """Of the run."""
    decay_step: int = -1
    """Where the learning rate begins to fall: a run can be made longer from this step's state."""
    best_step: int = -1
    best_value: float | None = None
    """Of the metric that decides (`Stage.best`), at `best_step`."""
    recent_norms: list[float] = dataclasses.field(default_factory=list)
    spikes_in_a_row: int = 0
    incident_step: int = -1
    """The last step that was not applied; the state it can be replayed from is kept."""
    tokens: int = 0
    """Tokens processed so far, without padding."""
    seconds: float = 0.0
    """Time spent in steps so far."""
    lengths: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes of each appended file of the run folder at this step; a resume cuts them to it."""
    data: str = ""
    """Fingerprint of the training data."""
    dev: str = ""
    """Fingerprint of the dev data."""
    frozen: str = ""
    """Fingerprint of the weights that are not trained, and so not in the state."""


def tensors_of(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """Name -> the live tensors (weights that train, and optimizer state), sharing their storage."""
    names = {id(p): name for name, p in unwrap(model).named_parameters() if p.requires_grad}
    by_id = {id(p): p for p in unwrap(model).parameters() if p.requires_grad}
    tensors = {f"model.{name}": by_id[key].detach() for key, name in names.items()}
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            for key, value in entries.items():
                # A step counter has no dimension; the safetensors reader of DCP needs one.
                value = value.reshape(1) if value.ndim == 0 else value
                tensors |= plain_tensors(f"optimizer.{names[id(parameter)]}.{key}", value)
    return tensors


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy on the CPU, from which a state is saved while training goes on."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(StagingOptions(False, False, False, False))
    staged = stager.stage(tensors)
    stager.close()
    return staged  # type: ignore[return-value]  # a Future only where it is asked for


def save_state(
    states: Path, tensors: dict[str, torch.Tensor], facts: Facts, ranks: Ranks
) -> Path | None:
    """Write one state under `states`; all ranks call it. Returns its path on rank 0.

    Raises OSError or torch's CheckpointException when the disk refuses; nothing is left then.
    """
    final = states / f"step_{facts.step:08d}"
    aside = states / f".saving_{final.name}"
    _make_empty(aside, ranks)
    writer = dcp.HuggingFaceStorageWriter(str(aside), files_of(tensors), save_distributed=True)
    try:
        # DCP says that one process is one process; the filter is no harm to other threads.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(
            tensors,
            storage_writer=writer,
            process_group=ranks.background,
            no_dist=ranks.size == 1,
        )
        if not ranks.first:
            return None
        write_json(aside / "facts.json", dataclasses.asdict(facts))
        _write_manifest(aside)
        if final.exists():  # damaged and passed over, or this run's own of a moment ago
            _remove(final)
        os.replace(aside, final)
        flush(states)
        return final
    except BaseException:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def files_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number (from 1) of the file that each tensor goes to; the same on all ranks.

    A file is put together in memory, twice, before it is written: in one file, a state would take
    three times its size.
    """
    files, file, held = dict[str, int](), 1, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if held and held + nbytes > FILE_BYTES:
            file, held = file + 1, 0
        files[name] = file
        held += nbytes
    return files


def saving_bytes(state_bytes: float) -> float:
    """The memory that a save takes beside the state: the copy, and a file twice (`files_of`)."""
    return state_bytes + 2 * min(state_bytes, FILE_BYTES)


def _make_empty(folder: Path, ranks: Ranks) -> None:
    """Rank 0 makes the folder; all ranks raise its OSError: one that went on would write a shard
    into a state that nobody completes, and be one save late from then on."""
    refused: OSError | None = None
    if ranks.first:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            refused = error
    refused = from_first(refused, ranks, ranks.background)
    if refused is not None:
        raise refused


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        flush(path)
    write_json(folder / "manifest.json", {"format_version": FORMAT_VERSION, "files": files})
    flush(folder)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a saved state, or None if every file is as its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
        if version != FORMAT_VERSION:
            return f"has format version {version}, this Whet reads {FORMAT_VERSION}"
        for name, expected in files.items():
            path = folder / name
            if Path(name).name != name:
                return f"its manifest names {name!r}, which is outside the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"the content of {name} has changed since it was written"
        surplus = {path.name for path in folder.iterdir()} - set(files) - {"manifest.json"}
        if surplus:
            return f"{sorted(surplus)[0]} is not in its manifest"
        if "facts.json" not in files:
            return "its manifest names no facts.json"
        read_facts(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read: {type(error).__name__}: {error}"
    return None


def read_facts(folder: Path) -> Facts:
    """Read the facts of a saved state."""
    return Facts(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))


def saved_states(states: Path) -> list[Path]:
    """The complete states under `states`, oldest first."""
    return sorted(p for p in states.glob("step_*") if p.name[5:].isdigit() and p.is_dir())


def newest_valid(states: Path, at_most: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest undamaged state (at step `at_most` or before), and a line for each passed over."""
    passed_over: list[str] = []
    for folder in reversed(saved_states(states)):
        if at_most is not None and int(folder.name[5:]) > at_most:
            continue
        found = damage(folder)
        if found is None:
            return folder, passed_over
        passed_over.append(f"{folder}: {found}; passed over")
    return None, passed_over


def load_state(
    folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ranks: Ranks
) -> Facts:
    """Read weights and optimizer state in place; all ranks call it.

    Raises UserError if the state is of another model or optimizer.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    saved = {name: item.size for name, item in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    create_state(optimizers)
    _forget_unsaved(model, optimizers, saved)
    tensors = tensors_of(model, optimizers)
    wanted = {name: tensor.shape for name, tensor in tensors.items()}
    if saved != wanted:
        names = [n for n in {**saved, **wanted} if saved.get(n) != wanted.get(n)]
        raise UserError(
            f"{folder}: does not fit this run: {names[0]} is {_shape(saved, names[0])} there and "
            f"{_shape(wanted, names[0])} here; give the flags of the run that is resumed"
        )
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    dcp.load(tensors, storage_reader=reader, no_dist=ranks.size == 1)
    return read_facts(folder)


def _forget_unsaved(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], saved: Mapping[str, object]
) -> None:
    """Before its first applied step an optimizer has no state, and so none was saved."""
    names = {id(p): name for name, p in unwrap(model).named_parameters()}
    for optimizer in optimizers:
        for parameter in list(optimizer.state):
            prefix = f"optimizer.{names[id(parameter)]}."
            if not any(name.startswith(prefix) for name in saved):
                del optimizer.state[parameter]


def _shape(shapes: dict, name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "missing"


def prune(states: Path, keep: int, facts: Facts) -> None:
    """Remove all but the newest `keep` states, the one from which the last step that was not
    applied replays, and the one from which the learning rate falls.

    States after `step`, where the run stands, are damaged ones that its resume has passed over:
    they neither count nor go.
    """
    kept = [p for p in saved_states(states) if int(p.name[5:]) <= facts.step]
    needed = [p for p in kept if int(p.name[5:]) < facts.incident_step][-1:]
    needed += [p for p in kept if int(p.name[5:]) == facts.decay_step]
    for folder in kept[: -max(1, keep)]:
        if folder not in needed:
            _remove(folder)


def remove_after(states: Path, step: int) -> None:
    """Remove the states after `step`: the run goes on from there by another schedule."""
    for folder in saved_states(states):
        if int(folder.name[5:]) > step:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Renamed first: a removal that is cut short must not look like a damaged state."""
    doomed = folder.with_name(f".removing_{folder.name}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(states: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for pattern in (".saving_*", ".removing_*"):
        for folder in states.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
