"""Adapter files in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Names in them are the family's own (`families.py`). Where a family joins matrices that Whet keeps
apart (GPT-2's and Phi-3's queries, keys and values), the adapters are joined as well: the A one
above the other, the B as blocks on a diagonal, so that rank and alpha grow by the number of parts.
New embedding rows are PEFT's `trainable_token_indices`. PEFT itself is the tests' oracle.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from whet.errors import UserError
from whet.hub import find_model
from whet.model.atomic import read_json, write_json, written_aside
from whet.model.checkpoint import SavesTokenizer, load_backbone_from_ckpt
from whet.model.decoder import Transformer
from whet.model.embedding import TrainableRows, grow_embedding
from whet.model.families import Place, place_modules
from whet.model.hf_keys import LARGEST
from whet.model.lora import LINEARS, LoRA, LoRALinear, adapters, linears, set_module
from whet.model.peft_config import CONFIG, PeftConfig, read_peft_config
from whet.model.weights import open_safetensors, read_into

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ROWS = "token_adapter.trainable_tokens_delta"


def is_adapter(path: Path) -> bool:
    """Whether `path` is a directory that holds an adapter and no whole model."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def base_of(directory: Path) -> tuple[str, str | None]:
    """The model (path or Hub name) that the adapter in `directory` belongs to, and its revision."""
    values = read_json(directory / CONFIG)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not base or not isinstance(base, str):
        raise UserError(
            f"{directory / CONFIG}: base_model_name_or_path is {base!r}; expected the model that "
            "the adapter belongs to"
        )
    return base, None if revision is None or Path(base).exists() else str(revision)


def find_base(directory: Path, *, quiet: bool = False) -> Path:
    """Where the base of the adapter in `directory` lies; downloaded if need be."""
    name, revision = base_of(directory)
    return find_model(name, revision, quiet=quiet)


def tokenizer_home(path: Path) -> Path:
    """Where the tokenizer of the model at `path` lies: there, or with the base of an adapter that
    has none, as PEFT saves them."""
    if is_adapter(path) and not (path / "tokenizer.json").is_file():
        return find_base(path)
    return path


def save_adapter(
    model: Transformer,
    directory: str | Path,
    lora: LoRA,
    base: str,
    tokenizer: SavesTokenizer | None,
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
    base = str(Path(base).resolve()) if Path(base).exists() else base
    config = {
        **_peft_config(model, lora, sizes, rows),
        "base_model_name_or_path": base,
        "revision": lineage.get("revision"),
    }
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with written_aside(directory, nbytes) as aside:
        safetensors.torch.save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        again = safetensors.torch.load_file(aside / WEIGHTS)
        for name, tensor in tensors.items():
            if not torch.equal(again[name], tensor):
                raise RuntimeError(f"{directory}: {name} was saved, but read back it differs")
        os.chmod(aside / WEIGHTS, 0o644)
        if tokenizer is not None:
            tokenizer.save(aside)
        write_json(aside / "whet.json", {**lineage, "vocab_size": model.config.vocab_size})
        write_json(aside / CONFIG, config)


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
    for module, names in _family_modules(model).items():
        chosen = [adapted[name] for name in names if name in adapted]
        if not chosen:
            continue
        rank, dora = len(chosen[0].a), chosen[0].magnitude is not None
        parts = [_part(model, state, name, rank, dora) for name in names]
        key = f"{_PREFIX}{module}"
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


def _family_modules(model: Transformer) -> dict[str, list[str]]:
    """{family's linear module: Whet's modules in it, in the file's order}."""
    names = [*linears(model), *(name for name, _ in adapters(model))]
    places = _places(model, names)
    grouped: dict[str, list[str]] = {}
    for name in sorted(places, key=lambda name: places[name].begin):
        grouped.setdefault(places[name].name, []).append(name)
    return grouped


def _places(model: Transformer, names: Iterable[str]) -> dict[str, Place]:
    if isinstance(model, Transformer):
        return place_modules(model.config, names)
    return {name: Place(name.removeprefix("inner.")) for name in names}  # of another architecture


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
            tensors[f"{_PREFIX}{module}.{_ROWS}"] = rows.contiguous()
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
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
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
            place.transposed for place in _places(model, dict(adapters(model))).values()
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
    other = [f".{name}" for name in _family_modules(model) if name not in chosen]
    names = set()
    for module in chosen:
        parts = module.split(".")
        ends = [parts[-1], ".".join(parts[-2:]), module]
        names.add(next(e for e in ends if not any(o.endswith(f".{e}") for o in other)))
    return sorted(names)


def open_adapter(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quiet: bool = False,
) -> Transformer:
    """The base that the adapter in `directory` names, with the adapter on it."""
    base = find_base(Path(directory), quiet=quiet)
    model = load_backbone_from_ckpt(base, dtype=dtype, device=device, quiet=quiet)
    load_adapter(model, directory)
    return model


def continue_adapter(model: Transformer, directory: Path) -> LoRA:
    """`load_adapter`, for training it further.

    Raises UserError if it holds a whole embedding or head, which Whet would not train.
    """
    whole = read_json(directory / CONFIG).get("modules_to_save")
    if whole:
        raise UserError(
            f"{directory}: holds whole matrices ({', '.join(map(str, whole))}) beside its adapter, "
            f"which can't be trained further; merge it: whet export {directory} --merge --out DIR"
        )
    return load_adapter(model, directory)


def load_adapter(model: Transformer, directory: str | Path) -> LoRA:
    """Put the adapter of `directory` on `model`, its base: frozen base, trainable adapter.

    Reads what PEFT and Whet write: LoRA, rsLoRA and DoRA on linear layers, trained token rows,
    and whole embeddings or heads (`modules_to_save`). The embedding grows if the adapter has rows
    for new tokens. Returns the settings. Raises UserError for any other kind of adapter, and for
    tensors that do not fit.
    """
    directory = Path(directory)
    config = read_peft_config(directory)
    tensors = _read_tensors(directory / WEIGHTS)
    rows = _rows_needed(config, tensors, directory)
    if isinstance(model, Transformer):
        grow_embedding(model, rows, multiple=1)
    elif rows > model.config.vocab_size:
        raise UserError(
            f"{directory}: has rows for {rows} tokens, its base for {model.config.vocab_size}; new "
            "tokens under an adapter need one of Whet's own families: merge it with PEFT"
        )
    model.requires_grad_(False)
    missing: list[str] = []
    if isinstance(model, Transformer):
        missing += _put_embeddings(model, config, tensors, directory)
    kinds = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] * config.dora))
    for module, names in _family_modules(model).items():
        keys = [f"{_PREFIX}{module}.{kind}" for kind in kinds]
        there = [key for key in keys if key in tensors]
        if not (there if config.targets is None else config.targeted(module)):
            continue
        missing += [key for key in keys if key not in tensors]
        if len(there) == len(keys):
            _put_adapter(
                model, module, names, [tensors.pop(key) for key in keys], config, directory
            )
    _refuse_misfits(missing, tensors, config, directory)
    if not isinstance(model, Transformer):
        model.try_adapters()
    adapted = dict.fromkeys(name.rpartition(".")[2] for name, _ in adapters(model))
    own = isinstance(model, Transformer)
    return LoRA(
        rank=config.rank,
        alpha=config.alpha,
        targets=",".join(k for k in (LINEARS if own else adapted) if k in adapted),
        dropout=config.dropout,
        rslora=config.rslora,
        dora=config.dora,
    )


def _refuse_misfits(
    missing: list[str], left: Mapping[str, Tensor], config: PeftConfig, directory: Path
) -> None:
    """Raise UserError if the configuration and the weights are not of one adapter: opened in part,
    it would be another one than was trained."""
    if missing:
        raise UserError(
            f"{directory / WEIGHTS}: {len(missing)} tensors that {CONFIG} speaks of are missing, "
            f"such as {missing[0]}; the two files are not of one adapter, or one is damaged"
        )
    if any(name.endswith("lora_magnitude_vector") for name in left) and not config.dora:
        raise UserError(
            f"{directory / WEIGHTS}: holds DoRA's magnitudes, but use_dora is false in {CONFIG}; "
            "the two files are not of one adapter"
        )
    if left:
        raise UserError(
            f"{directory / WEIGHTS}: {len(left)} tensors fit no linear layer of the base that "
            f"{CONFIG} names, such as {next(iter(left))}; is it an adapter of another model?"
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        why = (
            f"only {pickled.name}, a pickle, which can run code" if pickled.exists() else "nothing"
        )
        raise UserError(f"{path.parent}: expected {path.name}, found {why}")
    tensors = {}
    for name, stored in open_safetensors(path).items():
        tensors[name] = torch.empty(stored.shape, dtype=torch.float32)
        read_into(tensors[name], stored)
    return tensors


def _rows_needed(config: PeftConfig, tensors: Mapping[str, Tensor], directory: Path) -> int:
    """How many rows the base's embedding must have."""
    said = config.rows
    ids = [i for row_ids in said.values() for i in row_ids] if isinstance(said, dict) else said
    lineage = directory / "whet.json"
    saved = read_json(lineage).get("vocab_size", 0) if lineage.is_file() else 0
    if type(saved) is not int or not 0 <= saved < LARGEST:
        raise UserError(f"{lineage}: vocab_size is {saved!r}; expected a whole number")
    whole = [
        t.shape[0]
        for name, t in tensors.items()
        if name.endswith(("embed_tokens.weight", "wte.weight")) and t.dim()
    ]
    return max([saved, *whole, *(i + 1 for i in ids)], default=0)


def _put_embeddings(
    model: Transformer, config: PeftConfig, tensors: dict[str, Tensor], directory: Path
) -> list[str]:
    """Take whole and partly trained embeddings and heads out of `tensors`, into `model`.

    Returns the names of trained rows that `config` speaks of and `tensors` lacks.
    """
    missing = []
    names = ["embed"] if model.config.tied else ["embed", "head"]
    for name, place in place_modules(model.config, names).items():
        module: Any = getattr(model, name)
        whole = tensors.pop(f"{_PREFIX}{place.name}.weight", None)
        if whole is not None:
            _check_shape(whole, module.weight.shape, place.name, directory)
            module.weight.data.copy_(whole)
        ids, key = config.rows_of(place.name, name == "embed"), f"{_PREFIX}{place.name}.{_ROWS}"
        if not ids:
            continue
        if key not in tensors:
            missing.append(key)
            continue
        rows = tensors.pop(key)
        _check_shape(rows, (len(ids), model.config.width), place.name, directory)
        wrapper = TrainableRows(module, ids)
        wrapper.rows.data.copy_(rows)
        setattr(model, name, wrapper)
    return missing


def _check_shape(found: Tensor, expected: Any, name: str, directory: Path) -> None:
    if tuple(found.shape) != tuple(expected):
        raise UserError(
            f"{directory / WEIGHTS}: {name} is {list(found.shape)}, the base needs "
            f"{list(expected)}; is it an adapter of another model?"
        )


def _put_adapter(
    model: Transformer,
    module: str,
    names: list[str],
    values: list[Tensor],
    config: PeftConfig,
    directory: Path,
) -> None:
    """Share one adapter of the files, (A, B) or (A, B, magnitude), among the modules `names` that
    are joined in the family's `module`."""
    found = linears(model)
    bases = [found[name] for name in names]
    outputs = [base.out_features for base in bases]
    a, b, *dora = values
    rank = config.rank_of(module)
    if a.dim() == 2 and len(a) != rank:
        raise UserError(
            f"{directory / WEIGHTS}: the adapter of {module} has rank {len(a)}, by {CONFIG} "
            f"{rank}; the two files are not of one adapter"
        )
    _check_shape(a, (rank, bases[0].in_features), f"{names[0]} lora_A", directory)
    _check_shape(b, (sum(outputs), rank), f"{names[0]} lora_B", directory)
    for magnitude in dora:
        _check_shape(magnitude, (sum(outputs),), f"{names[0]} lora_magnitude_vector", directory)
    magnitudes = dora[0].split(outputs) if dora else [None] * len(names)
    scale = config.scale_of(module)
    for name, base, (own_a, own_b), m in zip(
        names,
        bases,
        _split(a, list(b.split(outputs))),
        magnitudes,
        strict=True,
    ):
        layer = LoRALinear(base, len(own_a), scale, config.dropout, m is not None)
        layer.a.data.copy_(own_a)
        layer.b.data.copy_(own_b)
        if m is not None and layer.magnitude is not None:
            layer.magnitude.data.copy_(m)
        set_module(model, name, layer)


def _split(a: Tensor, b: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of each part: its own block if B is blocks on a diagonal, else all of A."""
    rank, rest = divmod(len(a), len(b))
    blocks = [slice(i * rank, (i + 1) * rank) for i in range(len(b))]
    mixed = any(
        part[:, other].any() for i, part in enumerate(b) for j, other in enumerate(blocks) if i != j
    )
    if len(b) == 1 or rest or not rank or mixed:
        return [(a, part) for part in b]
    return [(a[block], part[:, block]) for part, block in zip(b, blocks, strict=True)]
