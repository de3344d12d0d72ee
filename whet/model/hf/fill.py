"""A model from its configuration and the weights that are stored for it."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from whet.config import problems
from whet.errors import UserError
from whet.model.config import ModelConfig
from whet.model.decoder import Transformer
from whet.model.hf import families
from whet.model.hf.weights import PROGRESS_FROM_BYTES, READERS, Stored, empty_on_cpu, read_into
from whet.progress import track

_SHOWN = 5


def empty_model(config: ModelConfig) -> Transformer:
    """The model of `config` without values (on the meta device): costs neither time nor memory."""
    with torch.device("meta"), _NoInitialValues():
        return Transformer(config)


class _NoInitialValues(TorchFunctionMode):
    """Skips `torch.nn.init`: random values on the meta device load 800 modules, two seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def fill_model(
    config: ModelConfig,
    stored: dict[str, Stored],
    places: dict[str, families.Place],
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    quiet: bool,
) -> Transformer:
    """The model of `config` with the values `stored`, found at `places`, cast to `dtype`.

    `path` is named in errors. `stored` is emptied. Raises UserError if any weight is missing, left
    over or of another shape than the configuration says.
    """
    embedding = stored.get(places["embed.weight"].name)
    if embedding is not None:
        name = str(embedding.dtype).removeprefix("torch.")
        said = {} if {"dtype", "torch_dtype"} & set(config.hf) else {"torch_dtype": name}
        config = dataclasses.replace(config, hf={**config.hf, **said}, file_dtype=name)
    model = empty_model(config)
    grouped = families.by_family_name(places)
    _check(model, grouped, stored, path)
    model = model.to(dtype)
    memory = {name: _memory(p, device) for name, p in model.named_parameters()}
    model.load_state_dict(memory, assign=True)
    total = sum(entry.nbytes for entry in stored.values())
    quiet = quiet or total < PROGRESS_FROM_BYTES

    def read(file_name: str) -> float:
        source = stored.pop(file_name)  # what was read is let go
        for name, place in grouped[file_name].items():
            read_into(memory[name], source, place.begin, place.transposed)
        return source.nbytes / 1e9

    with (
        track(f"Opening {path}", total / 1e9, "GB", quiet=quiet) as progress,
        _one_thread_each(),
        ThreadPoolExecutor(READERS) as readers,
    ):
        for done in readers.map(read, grouped):
            progress.advance(done)
    _check_tied_head(model, stored, path)
    return model


def _memory(parameter: Tensor, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty_like(parameter, device=device)
    return empty_on_cpu(parameter.shape, parameter.dtype)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Readers convert small pieces: threads of torch's own within each would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(
    model: nn.Module,
    grouped: dict[str, dict[str, families.Place]],
    stored: dict[str, Stored],
    path: Path,
) -> None:
    """Every weight is there, nothing is left over, every shape is the configuration's."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = []
    for file_name, parts in grouped.items():
        first_shape = shapes[next(iter(parts))]
        expected = (sum(shapes[name][0] for name in parts), *first_shape[1:])
        if next(iter(parts.values())).transposed:
            expected = expected[::-1]
        if file_name in stored and stored[file_name].shape != expected:
            shape = list(stored[file_name].shape)
            wrong.append(f"{file_name} is {shape}, by the configuration {list(expected)}")
        elif file_name in stored and not stored[file_name].dtype.is_floating_point:
            wrong.append(f"{file_name} holds {stored[file_name].dtype}, quantised: not supported")
    missing = [name for name in grouped if name not in stored]
    tied = {"lm_head.weight", "head.weight"} - set(grouped)
    surplus = [
        name
        for name in stored
        if name not in grouped and not name.endswith(families.IGNORED) and name not in tied
    ]
    found = [f"{path}: {what}" for what in wrong[:_SHOWN]]
    if missing:
        found.append(f"{path}: missing weights: {_listed(missing)}; nothing is initialised instead")
    if surplus:
        found.append(f"{path}: weights that the configuration has no use for: {_listed(surplus)}")
    problems(found)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _check_tied_head(model: Transformer, stored: dict[str, Stored], path: Path) -> None:
    """Some files of tied models hold the head once more: it must be the embedding."""
    head = stored.get("lm_head.weight") or stored.get("head.weight")
    if head is None or not model.config.tied:
        return
    same = head.shape == tuple(model.embed.weight.shape)
    for begin in range(0, len(model.embed.weight) if same else 0, 4096):
        rows = model.embed.weight[begin : begin + 4096]
        again = torch.empty_like(rows)
        read_into(again, head, begin)
        same = same and torch.equal(again, rows)
    if not same:
        raise UserError(
            f"{path}: config.json says tie_word_embeddings, but lm_head.weight is not the "
            "embedding; set tie_word_embeddings to false if the head is to be used"
        )
