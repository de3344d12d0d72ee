"""What an adapter's file holds besides the adapters of linear layers.

These are whole matrices (`modules_to_save`, and those that PEFT adds when the vocabulary was
resized), trained token rows, and adapters of the embedding or the head, which are merged at once.

PEFT gives a module that is trained whole a copy of its own. So where the base ties its head to the
embedding and the adapter changes one of the two, they are two matrices from then on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from whet.errors import UserError
from whet.model.decoder import Transformer
from whet.model.embedding import TrainableRows, resize_embedding, untie
from whet.model.hf.checkpoint import file_places
from whet.model.hf.families import by_family_name, place_modules
from whet.model.hf.weights import in_memory, read_into
from whet.model.lora.lora import LoRALinear
from whet.model.lora.peft_config import PeftConfig

PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"
_COPIES = ("modules_to_save.", "", "base_layer.", "token_adapter.base_layer.", "original_module.")
"""What PEFT writes before the `weight` of a whole module; the first that is there holds."""


def put_whole(
    model: Transformer, config: PeftConfig, tensors: dict[str, Tensor], vocab_size: int
) -> list[str]:
    """Take all but the adapters of linear layers out of `tensors`, into `model`.

    The model gets the rows of its new matrices, and at least `vocab_size`. Returns the names of
    tensors that `config` speaks of and `tensors` lacks. Raises UserError for what does not fit.
    """
    ends = {n: place.name for n, place in place_modules(model.config, ["embed", "head"]).items()}
    whole = {name: _take(tensors, f"{module}.weight") for name, module in ends.items()}
    _resize(model, whole, vocab_size)
    _put_bases(model, config, ends, whole)
    missing = []
    for name, module in ends.items():
        missing += _put_adapter(model, name, module, config, tensors)
    missing += _put_rows(model, ends, config, tensors)
    missing += _put_modules(model, config, tensors)
    return missing


def _take(tensors: dict[str, Tensor], parameter: str) -> Tensor | None:
    """The whole `parameter` under any of PEFT's names; all of these are taken out."""
    module, _, kind = parameter.rpartition(".")
    found = [tensors.pop(f"{PREFIX}{module}.{copy}{kind}", None) for copy in _COPIES]
    return next((tensor for tensor in found if tensor is not None), None)


def _resize(model: Transformer, whole: Mapping[str, Tensor | None], vocab_size: int) -> None:
    sizes = [tensor.shape[0] for tensor in whole.values() if tensor is not None and tensor.dim()]
    replaced = len(sizes) == 2 or (len(sizes) == 1 and not hasattr(model, "head"))
    rows = max([vocab_size, *sizes])
    if rows > model.config.vocab_size or (replaced and len(set(sizes)) == 1):
        resize_embedding(model, rows)


def _put_bases(
    model: Transformer,
    config: PeftConfig,
    ends: Mapping[str, str],
    whole: Mapping[str, Tensor | None],
) -> None:
    """Whole matrices of embedding and head. Those that are not trained replace the base's, which a
    tied head shares; a trained one is a copy."""
    given = {name: tensor for name, tensor in whole.items() if tensor is not None}
    tied = model.config.tied
    if tied and len(given) == 2 and torch.equal(given["embed"], given["head"]):
        del given["head"]
        _copy(model.embed, given.pop("embed"), ends["embed"])
    plain = [name for name in given if not config.trained_whole(ends[name])]
    if tied and len(plain) == 2:
        raise UserError(
            f"its {ends['embed']} and {ends['head']} differ, but the base has one matrix for both; "
            "open it by PEFT, and merge it there"
        )
    for name in plain:
        _copy(model.embed if tied else getattr(model, name), given.pop(name), ends[name])
    for name, tensor in given.items():
        untie(model)
        _copy(getattr(model, name), tensor, ends[name])


def _copy(module: Any, tensor: Tensor, name: str) -> None:
    check_shape(tensor, module.weight.shape, name)
    module.weight.data.copy_(tensor)


def _put_adapter(
    model: Transformer, name: str, module: str, config: PeftConfig, tensors: dict[str, Tensor]
) -> list[str]:
    """Merge the adapter of the embedding or the head, if there is one, into its matrix."""
    kinds = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] * config.use_dora)]
    if name == "embed":
        kinds = ["lora_embedding_A", "lora_embedding_B"]
    keys = [f"{PREFIX}{module}.{kind}" for kind in kinds]
    there = [key for key in keys if key in tensors]
    if not there and not (config.names_targets and config.targeted(module)):
        return []
    if name == "embed" and config.use_dora:
        raise UserError(f"DoRA on {module} is not supported; merge it by PEFT")
    if len(there) < len(keys):
        return [key for key in keys if key not in tensors]
    a, b, *magnitude = [tensors.pop(key) for key in keys]
    untie(model)
    end: Any = getattr(model, name)
    scale = config.scale_of(module)
    outputs, inputs = end.weight.shape if name == "head" else end.weight.shape[::-1]
    check_shape(a, (config.rank_of(module), inputs), keys[0])
    check_shape(b, (outputs, config.rank_of(module)), keys[1])
    if name == "embed":
        end.weight.data.copy_(end.weight.float() + scale * (b @ a).t())
        return []
    layer = LoRALinear(end, len(a), scale, 0.0, bool(magnitude))
    layer.a.data.copy_(a)
    layer.b.data.copy_(b)
    if layer.magnitude is not None:
        check_shape(magnitude[0], (outputs,), keys[2])
        layer.magnitude.data.copy_(magnitude[0])
    end.weight.data.copy_(layer.merged_weight())
    return []


def _put_rows(
    model: Transformer, ends: Mapping[str, str], config: PeftConfig, tensors: dict[str, Tensor]
) -> list[str]:
    """Trained token rows; a tied head has those of the embedding unless it has others."""
    ids = {name: config.rows_of(module, name == "embed") for name, module in ends.items()}
    if model.config.tied:
        if ids["head"] and ids["head"] != ids["embed"]:
            untie(model)
        else:
            ids.pop("head")
            tensors.pop(f"{PREFIX}{ends['head']}.{ROWS}", None)
    missing = []
    for name, rows in ids.items():
        if not rows:
            continue
        key = f"{PREFIX}{ends[name]}.{ROWS}"
        if key not in tensors:
            missing.append(key)
            continue
        values = tensors.pop(key)
        check_shape(values, (len(rows), model.config.width), ends[name])
        wrapper = TrainableRows(getattr(model, name), rows)
        wrapper.rows.data.copy_(values)
        setattr(model, name, wrapper)
    return missing


def _put_modules(model: Transformer, config: PeftConfig, tensors: dict[str, Tensor]) -> list[str]:
    """Other modules that are trained whole: norms, linear layers, the score."""
    missing = []
    for parameter, parts in by_family_name(file_places(model.config)).items():
        module = parameter.rpartition(".")[0]
        if not config.trained_whole(module) or {"embed.weight", "head.weight"} & set(parts):
            continue
        found = _take(tensors, parameter)
        if found is None:
            missing.append(f"{PREFIX}{parameter}")
            continue
        values = {name: model.get_parameter(name) for name in parts}
        rows = sum(len(value) for value in values.values())
        place = next(iter(parts.values()))
        shape = (rows, *next(iter(values.values())).shape[1:])
        check_shape(found, shape[::-1] if place.transposed else shape, parameter)
        for name, place in parts.items():
            stored = in_memory({parameter: found})[parameter]
            read_into(values[name].data, stored, place.begin, place.transposed)
    return missing


def check_shape(found: Tensor, expected: Any, name: str) -> None:
    """Raise UserError if a tensor of the file is not of the shape that the base needs."""
    if tuple(found.shape) != tuple(expected):
        raise UserError(
            f"{name} is {list(found.shape)}, the base needs {list(expected)}; is it an adapter of "
            "another model?"
        )
