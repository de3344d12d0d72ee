"""Opening and saving models: model directories in the ecosystem's layout, and `.pt` files.

Nothing is forgiven in silence: a weight that is missing, left over or misshaped is an error. What
is saved is opened again and compared with what was meant to be saved, before it takes its name.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from whet.chat.chat import Chat
from whet.config import problems
from whet.errors import UserError
from whet.files import full_disk_reported, read_json, replaced, write_json
from whet.model.config import ModelConfig
from whet.model.decoder import Transformer
from whet.model.foreign_files import check_writable, write_foreign
from whet.model.hf import families, legacy
from whet.model.hf.config import from_hf, to_hf
from whet.model.hf.families import OWN_LAYOUT
from whet.model.hf.fill import empty_model, fill_model
from whet.model.hf.weights import (
    Stored,
    in_memory,
    open_directory,
    open_pt,
    replaced_model,
    rounded,
    write_directory,
)

NO_PT = "a .pt holds models of Whet's own families only; save a model directory"
_WRAPPERS = ("module.", "_orig_mod.")


def open_own(
    path: Path, dtype: torch.dtype, device: torch.device, *, quiet: bool = False
) -> Transformer:
    """Open a model of Whet's own families: a directory or `.pt` file, its weights cast to `dtype`.

    The values go from the file into the parameters, which are made without initial values: the peak
    of memory is the weights and a few megabytes. Raises UserError for what is missing or damaged,
    and if any weight is missing, left over or of another shape than the configuration says.
    """
    if path.is_dir():
        config, stored, places = _open_directory(path)
    elif path.is_file():
        config, stored, places = _open_pt(path)
    else:
        raise UserError(f"{path}: expected a model directory or a .pt file; there is no such path")
    return fill_model(config, stored, places, path, dtype, device, quiet)


def _read_config(directory: Path) -> ModelConfig:
    path = directory / "config.json"
    if not directory.is_dir():
        raise UserError(f"{directory}: expected a model directory or a .pt file")
    if not path.is_file():
        raise UserError(
            f"{directory}: no config.json, so not a model directory; "
            "is it the folder of an unfinished run, or a level too high or low?"
        )
    return _from_hf(read_json(path), path)


def _from_hf(values: dict[str, Any], path: Path) -> ModelConfig:
    try:
        return from_hf(values)
    except UserError as error:
        lines = [line.removeprefix("config.json: ") for line in str(error).splitlines()]
        raise UserError("\n".join(f"{path}: {line}" for line in lines)) from None


Opened = tuple[ModelConfig, dict[str, Stored], dict[str, families.Place]]


def _open_directory(directory: Path) -> Opened:
    config = _read_config(directory)
    stored = open_directory(directory)
    places = file_places(config)
    stored = _full_names(stored, {place.name for place in places.values()})
    embedding = places["embed.weight"].name
    if config.tied and embedding not in stored and "lm_head.weight" in stored:
        stored[embedding] = stored.pop("lm_head.weight")
    generation = directory / "generation_config.json"
    if generation.is_file():
        config = dataclasses.replace(config, generation=read_json(generation))
    return config, stored, places


def _full_names(stored: dict[str, Stored], wanted: set[str]) -> dict[str, Stored]:
    """`stored` with the prefix that some files leave out, as those of a model without its head."""
    found = dict[str, Stored]()
    for name, entry in stored.items():
        full = [f"{prefix}{name}" for prefix in ("", "model.", "transformer.")]
        meant = next((other for other in full if other in wanted and other not in stored), name)
        found[name if name in wanted else meant] = entry
    return found


def _open_pt(path: Path) -> Opened:
    content = open_pt(path)
    state = content.get("model_state_dict")
    cfg = content.get("cfg", content.get("config"))
    if not isinstance(state, dict) or not isinstance(cfg, dict):
        keys = ", ".join(sorted(map(str, content)))[:200]
        raise UserError(
            f"{path}: expected model_state_dict and cfg, found {keys or 'nothing'}; "
            "a bare state_dict does not say its sizes: open the model directory instead"
        )
    state = _plain_tensors(state, path)
    if legacy.is_legacy(state):
        config = legacy.legacy_config(cfg, state, path)
        state = legacy.legacy_state(state, path)
    else:
        config = _from_hf(cfg, path)
    own = {name: families.Place(name) for name in empty_model(config).state_dict()}
    return config, in_memory(state), own


def _plain_tensors(state: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """`state` under unwrapped names. Raises UserError for anything but tensors with a value for
    each place, and for two that have the same name."""
    found: dict[str, Tensor] = {}
    wrong = []
    for given, value in state.items():
        name = _unwrapped(str(given))
        if name in found:
            wrong.append(f"{given} and another tensor are both {name}; which one is meant?")
        if not isinstance(value, Tensor):
            wrong.append(f"holds {name}, not a tensor")
        elif value.layout != torch.strided or value.is_meta or value.is_quantized:
            what = "meta" if value.is_meta else "quantized" if value.is_quantized else value.layout
            wrong.append(f"{name} is a {what} tensor; expected one with all its values")
        elif value.is_complex():
            wrong.append(f"{name} is {value.dtype}; expected real numbers")
        else:
            found[name] = value
    problems([f"{path}: model_state_dict: {problem}" for problem in wrong])
    return found


def _unwrapped(name: str) -> str:
    """Without what DDP and torch.compile put before names, in any order."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def file_places(config: ModelConfig) -> dict[str, families.Place]:
    """{Whet's parameter name: its place in the files of a model directory}."""
    names = empty_model(config).state_dict()
    if config.family == OWN_LAYOUT:
        return {name: families.Place(name) for name in names}
    return families.place_parameters(config, names)


def check_vocabulary(config: ModelConfig, chat: Chat, where: str | Path) -> None:
    """Raise UserError if the tokenizer has ids for which the embedding has no row.

    A pad token may have none: many files declare one that the model does not know, and nothing
    here writes it.
    """
    size, pad = chat.tokenizer.vocab_size, chat.tokenizer.pad_id
    if pad == size - 1 and pad not in chat.stop_ids:
        size = max(i for i in chat.tokenizer.backend.get_vocab().values() if i != pad) + 1
    if size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has ids up to {size - 1}, the model's "
            f"embedding has {config.vocab_size} rows; use the model's own tokenizer, or train "
            "with --chat_template, which grows the embedding"
        )


def save_model(
    model: Any,
    directory: str | Path,
    chat: Chat | None,
    lineage: dict[str, Any],
    dtype: torch.dtype | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    shard_bytes: int = 5_000_000_000,
    without_weights: bool = False,
) -> None:
    """Write a model directory that transformers, vLLM, TRL, PEFT and llama.cpp's converter open.

    Weights in `dtype` (None: as they are), config, tokenizer, chat template, generation config with
    every stop id, and `whet.json` with the `lineage`. `state` are the values if `model` does not
    hold them whole itself (FSDP). The files are written aside, opened again, and their weights and
    the logits of a probe compared with the model's; only then do they take their names, and
    `config.json` as the last of them: a directory never mixes two models. Of another architecture
    nothing is computed. `without_weights` writes the rest, and looks whether weights would have
    space and, of another architecture, a layout. Raises UserError when there is no space, and
    RuntimeError when what was written does not give the model's logits.
    """
    directory = Path(directory)
    state = _plain_state(model, state)
    if chat is not None:
        check_vocabulary(model.config, chat, directory)
    with replaced_model(directory, saved_bytes(state, dtype)) as aside:
        own = isinstance(model, Transformer)
        if without_weights and not own:
            check_writable(model)
        elif not own:
            write_foreign(model, state, aside, dtype, shard_bytes)
        elif not without_weights:
            _write_weights(model.config, state, aside, dtype, shard_bytes)
        _write_configs(model.config, chat, lineage, aside, dtype or _dtype_of(state))
        if own and not without_weights:
            verify_saved(aside, model.config, state, dtype)


def save_pt(
    model: Transformer,
    path: str | Path,
    stage: str,
    step: int,
    metrics: dict[str, Any],
    dtype: torch.dtype | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `{model_state_dict, cfg, stage, step, metrics}`, loadable with `weights_only=True`.

    The names are Whet's own, `cfg` the fields of ModelConfig. Opened again and compared, like a
    model directory; `dtype`, `state` and what is raised as for `save_model`. Also raises UserError
    for another architecture.
    """
    path = Path(path)
    if not isinstance(model, Transformer):
        raise UserError(f"{path}: {NO_PT}")
    state = _plain_state(model, state)
    content = {
        "model_state_dict": {name: rounded(name, value, dtype) for name, value in state.items()},
        "cfg": _config_json(model.config, dtype or _dtype_of(state)),
        "stage": stage,
        "step": step,
        "metrics": metrics,
    }
    with replaced(path) as aside, full_disk_reported(path, saved_bytes(state, dtype)):
        torch.save(content, aside)
        verify_saved(aside, model.config, state, dtype)


@torch.no_grad()
def verify_saved(
    path: Path, config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Open `path` again: weights bit for bit those of `state` cast to `dtype`, and the same logits.

    Logits are compared on 32 seeded tokens; where the file's dtype is a smaller one, a relative
    difference that its rounding explains is allowed. Raises RuntimeError naming what differs.
    """
    before = empty_model(config)
    before.load_state_dict(dict(state), assign=True)
    device, own_dtype = before.embed.weight.device, before.embed.weight.dtype
    again = open_own(path, own_dtype, device, quiet=True)
    for name, value in again.state_dict().items():
        if not torch.equal(state[name].to(dtype or value.dtype).to(value.dtype), value):
            raise RuntimeError(f"{path}: {name} was saved, but read back it differs")
    difference = relative_difference(probe(again), probe(before))
    allowed = {torch.bfloat16: 0.1, torch.float16: 0.02}.get(dtype or own_dtype, 1e-5)
    if not difference <= allowed:
        raise RuntimeError(
            f"{path}: read back, its logits differ by {difference:.2g} (relative); "
            f"allowed are {allowed}"
        )


@torch.no_grad()
def probe(model: Transformer) -> Tensor:
    """The logits, or scores, of 32 seeded tokens in float32, by which two models are compared."""
    size = (1, min(32, model.config.max_positions))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, size, generator=generator)
    tokens = tokens.to(next(model.parameters()).device)
    if model.config.score:
        return cast(Tensor, model(tokens, weight=torch.ones_like(tokens, dtype=torch.float32)))
    return cast(Tensor, model(tokens)).float()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, over all numbers at once."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def _plain_state(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    values = model.state_dict() if state is None else state
    return {_unwrapped(name): value.detach() for name, value in values.items()}


def _dtype_of(state: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(state.values())).dtype


def saved_bytes(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> int:
    """The bytes of the weights `state`, rounded to `dtype` if given."""
    return sum(value.numel() * (dtype or value.dtype).itemsize for value in state.values())


def _write_weights(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    directory: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    grouped = families.by_family_name(file_places(config))
    sizes = {
        name: saved_bytes({part: state[part] for part in parts}, dtype)
        for name, parts in grouped.items()
    }
    write_directory(
        directory,
        sizes,
        lambda name: rounded(name, families.join(grouped[name], state), dtype).contiguous(),
        shard_bytes,
    )


def _config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    values = {**to_hf(config), "torch_dtype": str(dtype).removeprefix("torch.")}
    values.pop("dtype", None)
    return values


def _write_configs(
    config: ModelConfig,
    chat: Chat | None,
    lineage: dict[str, Any],
    directory: Path,
    dtype: torch.dtype,
) -> None:
    values = _config_json(config, dtype)
    if chat is not None:
        chat = _with_padding(chat) if config.score else chat
        ids = special_ids(chat)
        values |= ids
        write_generation(directory, config, ids)
        chat.save(directory)
    write_json(directory / "config.json", values)
    write_json(directory / "whet.json", lineage)


def write_generation(directory: Path, config: Any, ids: dict[str, Any]) -> None:
    """`generation_config.json`: the base's, with the special ids of the chat."""
    path = directory / "generation_config.json"
    base = getattr(config, "generation", None) or (read_json(path) if path.is_file() else {})
    kept = {key: value for key, value in base.items() if key != "_from_model_config"}
    write_json(path, {**kept, **ids})


def special_ids(chat: Chat) -> dict[str, Any]:
    """The ids of a chat by the names that configurations have for them."""
    stops = list(chat.stop_ids)
    return {
        "bos_token_id": chat.tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": chat.tokenizer.pad_id,
    }


def _with_padding(chat: Chat) -> Chat:
    """`chat` with a padding token that ends no conversation.

    transformers reads the score of a conversation at the last token that is not the padding one: a
    stop token that also pads, as in many base models, would never be read.
    """
    tokenizer = chat.tokenizer
    wished = [tokenizer.pad_id, tokenizer.id_of("unk_token"), tokenizer.bos_id]
    others = [*tokenizer.added.values(), *range(tokenizer.vocab_size)]
    ids = (i for i in (*wished, *others) if i is not None and i not in chat.stop_ids)
    texts = (text for i in ids if (text := tokenizer.backend.id_to_token(i)) is not None)
    named = {**tokenizer.named, "pad_token": next(texts)}
    return dataclasses.replace(chat, tokenizer=dataclasses.replace(tokenizer, named=named))
