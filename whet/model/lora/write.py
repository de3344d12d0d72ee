"""Writing an adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Where a family joins matrices that Whet keeps apart (GPT-2's and Phi-3's queries, keys and values),
the adapters are joined as well: the A one above the other, the B as blocks on a diagonal, so that
rank and alpha grow by the number of parts.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from whet.chat.chat import Chat
from whet.files import write_json
from whet.model.decoder import Transformer
from whet.model.embedding import TrainableRows
from whet.model.hf.checkpoint import special_ids, write_generation
from whet.model.hf.families import place_modules
from whet.model.hf.weights import replaced_model
from whet.model.lora.lora import LoRA, adapters
from whet.model.lora.peft_config import CONFIG
from whet.model.lora.read import WEIGHTS, family_modules, places_of
from whet.model.lora.whole import PREFIX, ROWS


def save_adapter(
    model: Transformer,
    directory: str | Path,
    lora: LoRA,
    base: str,
    chat: Chat | None,
    lineage: dict[str, Any],
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter of `model` so that PEFT and Whet open it, whole or not at all.

    `base` is the path or Hub name of the base; a "revision" in `lineage` is the base's. `state` are
    the values if `model` does not hold them itself (FSDP). The file is read back and compared.
    Raises UserError if the disk is full.
    """
    directory = Path(directory)
    values = dict(model.state_dict() if state is None else state)
    tensors, sizes = _joined_adapters(model, values, lora.rslora)
    rows = _trained_rows(model, values, tensors)
    if has_score(model):
        tensors[f"{PREFIX}score.weight"] = values["score.weight"].detach().to("cpu", torch.float32)
    base = str(Path(base).resolve()) if Path(base).exists() else base
    config = {
        **_peft_config(model, lora, sizes, rows),
        "base_model_name_or_path": base,
        "revision": lineage.get("revision"),
    }
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with replaced_model(directory, nbytes) as aside:
        safetensors.torch.save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        again = safetensors.torch.load_file(aside / WEIGHTS)
        for name, tensor in tensors.items():
            if not torch.equal(again[name], tensor):
                raise RuntimeError(f"{directory}: {name} was saved, but read back it differs")
        os.chmod(aside / WEIGHTS, 0o644)
        if chat is not None:
            chat.save(aside)
            write_generation(aside, model.config, special_ids(chat))
        write_json(aside / "whet.json", {**lineage, "vocab_size": model.config.vocab_size})
        write_json(aside / CONFIG, config)


def has_score(model: nn.Module) -> bool:
    """Whether `model` gives scores, as only models of Whet's own families do."""
    return isinstance(model, Transformer) and model.config.score


class Size(NamedTuple):
    """What makes an adapter's scale: alpha / rank, or with rsLoRA alpha / sqrt(rank)."""

    rank: int
    alpha: float


def _joined_adapters(
    model: Transformer, state: Mapping[str, Tensor], rslora: bool
) -> tuple[dict[str, Tensor], dict[str, Size]]:
    """PEFT's tensors, and {family's module: its size}."""
    adapted = dict(adapters(model))
    tensors: dict[str, Tensor] = {}
    sizes = {}
    for module, names in family_modules(model).items():
        chosen = [adapted[name] for name in names if name in adapted]
        if not chosen:
            continue
        rank, dora = len(chosen[0].a), chosen[0].magnitude is not None
        parts = [_part(model, state, name, rank, dora) for name in names]
        key = f"{PREFIX}{module}"
        tensors[f"{key}.lora_A.weight"] = torch.cat([a for a, _, _ in parts])
        tensors[f"{key}.lora_B.weight"] = torch.block_diag(*[b for _, b, _ in parts])
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = torch.cat([m for _, _, m in parts])
        whole = rank * len(parts)
        alpha = chosen[0].scale * (math.sqrt(whole) if rslora else whole)
        sizes[module] = Size(whole, round(alpha, 9))  # rid of the division's last digit
    return tensors, sizes


def _part(
    model: Transformer, state: Mapping[str, Tensor], name: str, rank: int, dora: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, magnitude) of a module; for one without an adapter, those that change nothing."""
    if f"{name}.a" in state:
        values = [state[f"{name}.{kind}"] for kind in ("a", "b", *(["magnitude"] * dora))]
        a, b, *magnitude = [value.detach().to("cpu", torch.float32) for value in values]
        return a, b, magnitude[0] if dora else torch.empty(0)
    base: Any = model.get_submodule(name)
    lengths = torch.empty(0)
    if dora:
        lengths = state[f"{name}.weight"].detach().to("cpu", torch.float32).norm(dim=1)
    return torch.zeros(rank, base.in_features), torch.zeros(base.out_features, rank), lengths


def _trained_rows(
    model: Transformer, state: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> dict[str, list[int]]:
    """Add trained embedding rows to `tensors`; {family's module, its last name: row ids}."""
    found = {}
    for name in ("embed", "head"):
        wrapper = getattr(model, name, None)
        if isinstance(wrapper, TrainableRows):
            module = place_modules(model.config, [name])[name].name
            rows = state[f"{name}.rows"].detach().to("cpu", torch.float32)
            tensors[f"{PREFIX}{module}.{ROWS}"] = rows.contiguous()
            found[module.rpartition(".")[2]] = wrapper.ids.tolist()
    return found


def _peft_config(
    model: Transformer, lora: LoRA, sizes: dict[str, Size], rows: dict[str, list[int]]
) -> dict[str, Any]:
    """The contents of `adapter_config.json`; keys that are left out have PEFT's defaults."""
    targets = _target_names(model, sizes)
    by_target: dict[str, dict[str, Size]] = {}
    for module, size in sizes.items():
        target = next(name for name in targets if f".{module}".endswith(f".{name}"))
        by_target.setdefault(target, {})[module] = size
    patterns: dict[str, Size] = {}
    for target, found in by_target.items():
        alike = len(set(found.values())) == 1
        patterns |= {target: next(iter(found.values()))} if alike else found
    usual = Size(lora.rank, lora.alpha)
    score = has_score(model)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score else "CAUSAL_LM",
        "modules_to_save": ["score"] if score else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "rank_pattern": {key: s.rank for key, s in patterns.items() if s.rank != usual.rank},
        "alpha_pattern": {key: s.alpha for key, s in patterns.items() if s.alpha != usual.alpha},
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": any(
            place.transposed for place in places_of(model, dict(adapters(model))).values()
        ),
        "inference_mode": True,
        "trainable_token_indices": _row_ids(model, rows),
    }


def _row_ids(model: Transformer, rows: dict[str, list[int]]) -> Any:
    """`rows` as PEFT takes them: a bare list means the embedding."""
    if not rows:
        return None
    embedding = place_modules(model.config, ["embed"])["embed"].name.rpartition(".")[2]
    return rows[embedding] if set(rows) == {embedding} else rows


def _target_names(model: Transformer, chosen: Iterable[str]) -> list[str]:
    """The shortest ends of module names that PEFT needs to find exactly the modules `chosen`."""
    chosen = set(chosen)
    other = [f".{name}" for name in family_modules(model) if name not in chosen]
    names = set()
    for module in chosen:
        parts = module.split(".")
        ends = [parts[-1], ".".join(parts[-2:]), module]
        if parts[-1].isdigit():  # PEFT would find the layers' numbers, too
            ends = [module]
        names.add(next(e for e in ends if not any(o.endswith(f".{e}") for o in other)))
    return sorted(names)
