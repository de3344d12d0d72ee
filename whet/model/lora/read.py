"""Adapter files in PEFT's format: opened, put on their base, and trained further.

Names in them are the family's own (`families.py`). Where a family joins matrices that Whet keeps
apart (GPT-2's and Phi-3's queries, keys and values), the adapters are joined as well
(`adapter_writing.py`). New embedding rows are PEFT's `trainable_token_indices`. PEFT itself is the
tests' oracle.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from whet.errors import UserError
from whet.files import read_json
from whet.hub import find_model, is_adapter
from whet.model.decoder import Transformer
from whet.model.embedding import add_score
from whet.model.hf.families import Place, place_modules
from whet.model.hf.keys import LARGEST
from whet.model.hf.weights import open_safetensors, read_into
from whet.model.lora.lora import (
    LINEARS,
    LoRA,
    LoRALinear,
    adapters,
    freeze,
    kind_of,
    linears,
    refuse_unfit,
    set_module,
)
from whet.model.lora.peft_config import CONFIG, PeftConfig, read_peft_config
from whet.model.lora.whole import PREFIX, check_shape, put_whole

WEIGHTS = "adapter_model.safetensors"
SCORES = ("score", "classifier")
"""What PEFT saves whole of a model with a score; the second is the name in other architectures."""
_REASONS = {
    ".bias": "trained biases are not supported",
    "lora_A.weight": "is it an adapter of another model?",
    "lora_B.weight": "is it an adapter of another model?",
    ".weight": "a whole matrix that modules_to_save does not name, or of another model",
}


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


def family_modules(model: Transformer) -> dict[str, list[str]]:
    """{family's linear module: Whet's modules in it, in the file's order}."""
    names = [*linears(model), *(name for name, _ in adapters(model))]
    places = places_of(model, names)
    grouped: dict[str, list[str]] = {}
    for name in sorted(places, key=lambda name: places[name].begin):
        grouped.setdefault(places[name].name, []).append(name)
    return grouped


def places_of(model: Transformer, names: Iterable[str]) -> dict[str, Place]:
    if isinstance(model, Transformer):
        return place_modules(model.config, names)
    return {name: Place(name.removeprefix("inner.")) for name in names}  # of another architecture


def continue_adapter(model: Transformer, directory: Path) -> LoRA:
    """`load_adapter`, for training it further.

    Raises UserError if it holds whole matrices other than a score, or an adapter of the embedding
    or the head: Whet would not train these.
    """
    whole = [name for name in read_peft_config(directory).modules_to_save if name not in SCORES]
    ends = re.compile(r"(lm_head|embed_tokens|wte)\.(lora_|.*weight)|\.base_layer\.")
    if not whole and (directory / WEIGHTS).is_file():
        whole = [name for name in open_safetensors(directory / WEIGHTS) if ends.search(name)]
    if whole:
        raise UserError(
            f"{directory}: holds whole matrices ({', '.join(whole[:3])}) beside its adapter, or an "
            "adapter of the embedding or the head, which can't be trained further; merge it: "
            f"whet export {directory} --merge --out DIR"
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
    rows = _vocabulary(config, directory)
    try:
        _put_all(model, config, _read_tensors(directory / WEIGHTS), rows)
    except UserError as error:
        raise UserError(f"{directory / WEIGHTS}: {error}") from None
    adapted = dict.fromkeys(kind_of(name) for name, _ in adapters(model))
    own = isinstance(model, Transformer)
    return LoRA(
        rank=config.r,
        alpha=config.lora_alpha,
        targets=",".join(k for k in (LINEARS if own else adapted) if k in adapted),
        dropout=config.lora_dropout,
        rslora=config.use_rslora,
        dora=config.use_dora,
    )


def _put_all(
    model: Transformer, config: PeftConfig, tensors: dict[str, Tensor], vocab_size: int
) -> None:
    """Put all of `tensors` on `model`. Raises UserError if they are not those of `config`."""
    missing: list[str] = []
    if isinstance(model, Transformer):
        if config.task_type == "SEQ_CLS":
            add_score(model)
        freeze(model)
        missing += put_whole(model, config, tensors, vocab_size)
    elif vocab_size > model.config.vocab_size:
        raise UserError(
            f"rows for {vocab_size} tokens, but its base has {model.config.vocab_size}; new tokens "
            "under an adapter need one of Whet's own families: merge it with PEFT"
        )
    else:
        freeze(model)
    kinds = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] * config.use_dora))
    for module, names in family_modules(model).items():
        keys = [f"{PREFIX}{module}.{kind}" for kind in kinds]
        there = [key for key in keys if key in tensors]
        if not (there if config.target_modules is None else config.targeted(module)):
            continue
        missing += [key for key in keys if key not in tensors]
        if len(there) == len(keys):
            _put_adapter(model, module, names, [tensors.pop(key) for key in keys], config)
    _refuse_misfits(missing, tensors, config)
    if not isinstance(model, Transformer):
        refuse_unfit(model)


def _refuse_misfits(missing: list[str], left: Mapping[str, Tensor], config: PeftConfig) -> None:
    """Raise UserError if the configuration and the weights are not of one adapter: opened in part,
    it would be another one than was trained."""
    if missing:
        raise UserError(
            f"{len(missing)} tensors that {CONFIG} speaks of are missing, "
            f"such as {missing[0]}; the two files are not of one adapter, or one is damaged"
        )
    if any(name.endswith("lora_magnitude_vector") for name in left) and not config.use_dora:
        raise UserError(
            f"it holds DoRA's magnitudes, but use_dora is false in {CONFIG}; "
            "the two files are not of one adapter"
        )
    if left:
        name = next(iter(left))
        why = "is it an adapter of another model?"
        why = next((reason for end, reason in _REASONS.items() if name.endswith(end)), why)
        raise UserError(
            f"{len(left)} tensors fit no linear layer of the base that {CONFIG} names, such as "
            f"{name}; {why}"
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


def _vocabulary(config: PeftConfig, directory: Path) -> int:
    """How many rows the base's embedding must have for the adapter's token rows."""
    said = config.trainable_token_indices
    ids = [i for row_ids in said.values() for i in row_ids] if isinstance(said, dict) else said
    lineage = directory / "whet.json"
    saved = read_json(lineage).get("vocab_size", 0) if lineage.is_file() else 0
    if type(saved) is not int or not 0 <= saved < LARGEST:
        raise UserError(f"{lineage}: vocab_size is {saved!r}; expected a whole number")
    return max([saved, *(i + 1 for i in ids)])


def _put_adapter(
    model: Transformer,
    module: str,
    names: list[str],
    values: list[Tensor],
    config: PeftConfig,
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
            f"the adapter of {module} has rank {len(a)}, by {CONFIG} {rank}; the two files are not "
            "of one adapter"
        )
    check_shape(a, (rank, bases[0].in_features), f"{names[0]} lora_A")
    check_shape(b, (sum(outputs), rank), f"{names[0]} lora_B")
    for magnitude in dora:
        check_shape(magnitude, (sum(outputs),), f"{names[0]} lora_magnitude_vector")
    magnitudes = dora[0].split(outputs) if dora else [None] * len(names)
    scale = config.scale_of(module)
    for name, base, (own_a, own_b), m in zip(
        names,
        bases,
        _split(a, list(b.split(outputs))),
        magnitudes,
        strict=True,
    ):
        layer = LoRALinear(base, len(own_a), scale, config.lora_dropout, m is not None)
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
