"""GGUF files, which llama.cpp and Ollama run, through the `gguf` library.

llama.cpp computes an architecture by code of its own, which reads sizes and scales from the file
and takes the rest for granted. So what it would compute differently is refused here. Two layouts
differ from a model directory's: where its rotary positions pair neighbours, the rows of queries and
keys are interleaved, and Gemma's norms hold 1 + weight.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whet.config import problems
from whet.errors import UserError
from whet.model.config import ModelConfig, Rope
from whet.model.decoder import Transformer
from whet.model.hf import families
from whet.model.hf.checkpoint import file_places
from whet.model.rope import frequency_factors
from whet.progress import track

ARCHITECTURES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
}
"""Family -> the architecture as llama.cpp names it."""
_INTERLEAVED = ("llama", "smollm3", "granite")
"""Architectures whose rotary positions pair neighbours, not the halves of a head."""
_BIASED = ("gpt2", "llama", "qwen2", "granite")
_GEMMAS = ("gemma", "gemma2", "gemma3")


@dataclass(frozen=True)
class Entry:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    """A `gguf.GGMLQuantizationType`."""
    parts: dict[str, families.Place]
    """Whet's parameters in it; empty for one that is made from the configuration."""


def library() -> Any:
    """The module `gguf`. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("--to gguf: gguf is not installed; pip install 'whet[gguf]'") from None
    return gguf


@torch.no_grad()
def write_gguf(
    model: Transformer, path: Path, kind: str, name: str, tokenizer: dict[str, Any]
) -> None:
    """Write `model` to `path`, matrices as `kind` (F32, F16, BF16, Q8_0), vectors in float32.

    `tokenizer` are the metadata of its tokenizer. One tensor at a time is in memory. The file is
    read back and each tensor compared. Raises UserError for a model that llama.cpp would compute
    differently, RuntimeError if what is read back differs.
    """
    gguf, config = library(), model.config
    problems([f"--to gguf: {problem}" for problem in misfits(config)])
    architecture, state = ARCHITECTURES[config.family], model.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata(config).items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in tokenizer.items():
        _add(writer, f"tokenizer.{key}", value)
    entries = list(_entries(gguf, config, state, kind))
    for entry in entries:
        shape, dtype = gguf.quant_shape_to_byte_shape(entry.shape, entry.kind), np.uint8
        writer.add_tensor_info(entry.name, shape, dtype, math.prod(shape), raw_dtype=entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(value.nbytes for value in state.values()) / 1e9
    with track("Saving", total, "GB", quiet=total < 2) as bar:
        for entry in entries:
            writer.write_tensor_data(_bytes(gguf, entry, config, state))
            bar.advance(4 * math.prod(entry.shape) / 1e9)
    writer.close()
    _verify(gguf, path, entries, config, state)


_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}


def _add(writer: Any, key: str, value: Any) -> None:
    """Metadata of the type that llama.cpp expects: whole numbers are unsigned, floats 32 bits."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def metadata(config: ModelConfig) -> dict[str, Any]:
    """What llama.cpp reads of the architecture, without its prefix."""
    architecture = ARCHITECTURES[config.family]
    norm = "layer_norm_epsilon" if config.norm == "layer" else "layer_norm_rms_epsilon"
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "block_count": config.n_layers,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        f"attention.{norm}": config.norm_eps,
    }
    rope = _global_rope(config)
    if rope is not None:
        values |= {"rope.dimension_count": rope.size, "rope.freq_base": float(rope.theta)}
        values |= _scaling(rope)
    windows = {window for window in config.windows if window is not None}
    if windows and architecture in ("gemma2", "gemma3", "phi3"):
        values["attention.sliding_window"] = max(windows)
    if config.attention_softcap is not None:
        values["attn_logit_softcapping"] = config.attention_softcap
    if config.logit_softcap is not None:
        values["final_logit_softcapping"] = config.logit_softcap
    if architecture == "granite":
        values |= {
            "attention.scale": config.scale,
            "embedding_scale": config.embed_scale,
            "residual_scale": config.residual_scale,
            "logit_scale": 1.0 / config.logit_scale,
        }
    return values


def _global_rope(config: ModelConfig) -> Rope | None:
    """The rotary positions of layers without a window, or of all."""
    layers = [config.rope(i) for i in range(config.n_layers) if config.window(i) is None]
    ropes = [rope for rope in (*layers, *config.ropes) if rope is not None]
    return ropes[0] if ropes else None


def _scaling(rope: Rope) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if rope.kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind in ("yarn", "longrope"):
        values["rope.scaling.original_context_length"] = rope.original_positions
    if rope.kind == "yarn":
        values["rope.scaling.yarn_beta_fast"] = float(rope.beta_fast)
        values["rope.scaling.yarn_beta_slow"] = float(rope.beta_slow)
    if rope.kind == "longrope":
        values["rope.scaling.attn_factor"] = float(rope.output_scale)
    return values


def misfits(config: ModelConfig) -> list[str]:
    """What llama.cpp would compute differently; empty if nothing."""
    architecture = ARCHITECTURES.get(config.family)
    if architecture is None or config.score:
        return ["llama.cpp has no architecture for this model; --to hf can be written"]
    found, gemma = [], architecture in _GEMMAS
    biased = [name for name in ("qkv_bias", "out_bias", "mlp_bias") if getattr(config, name)]
    if (biased and architecture not in _BIASED) or config.head_bias:
        found.append(f"{architecture} of llama.cpp has no biases; this model has some")
    expected = "gelu_tanh" if gemma or architecture == "gpt2" else "silu"
    if config.activation != expected:
        found.append(f"{architecture} of llama.cpp computes {expected}, not {config.activation}")
    layers = range(config.n_layers)
    unrotated = [i for i in layers if config.rope(i) is None] if config.ropes else []
    by_four = [i for i in layers if i % 4 == 3]
    if unrotated != (by_four if architecture == "smollm3" else []):
        found.append(f"layers {unrotated} have no rotary positions; llama.cpp rotates others")
    rope = _global_rope(config)
    rotated = {config.rope(i) for i in layers if config.window(i) is None} - {None}
    if len(rotated) > 1:
        found.append("its layers have different rotary positions; llama.cpp has one kind")
    kinds = {"default", "linear", "llama3", "yarn"} | ({"longrope"} & {_LONG.get(architecture)})
    if rope is not None and rope.kind not in kinds:
        found.append(f"{architecture} of llama.cpp has no rotary positions of kind {rope.kind}")
    elif rope is not None and rope.kind == "yarn":
        usual = 0.1 * math.log(rope.factor) + 1.0
        if not rope.truncate or not math.isclose(rope.output_scale, usual, rel_tol=1e-5):
            found.append("its yarn positions have settings that llama.cpp does not read")
    if rope is not None and architecture in _INTERLEAVED and rope.size != config.head_size:
        found.append("it rotates a part of each head; llama.cpp's llama rotates all")
    found += _gemma_misfits(config, architecture) if gemma else []
    if not gemma and architecture != "granite" and config.attention_scale is not None:
        found.append("its attention has a scale of its own, which llama.cpp does not read")
    return found


_LONG = {"phi3": "longrope"}


def _gemma_misfits(config: ModelConfig, architecture: str) -> list[str]:
    found = []
    divided = config.width / config.n_heads  # in the largest ones, known by their layers
    largest = {"gemma2": 46, "gemma3": 62}.get(architecture) == config.n_layers
    scale = (divided if largest else config.head_size) ** -0.5
    if not math.isclose(config.scale, scale, rel_tol=1e-6):
        found.append(
            f"query_pre_attn_scalar is {config.scale**-2:g}; llama.cpp divides by the square root "
            f"of {scale**-2:g}"
        )
    every = {"gemma2": 2, "gemma3": 6}.get(architecture)
    windowed = [i for i in range(config.n_layers) if config.window(i) is not None]
    expected = [i for i in range(config.n_layers) if every and i % every != every - 1]
    if windowed != expected:
        found.append(f"windows in layers {windowed}; llama.cpp computes them in {expected}")
    local = {config.rope(i) for i in windowed}
    if architecture == "gemma3" and any(
        rope is None or rope.kind != "default" or rope.theta != 1e4 for rope in local
    ):
        found.append("llama.cpp rotates layers with windows by a base of 10,000 alone")
    return found


def notes(config: ModelConfig) -> list[str]:
    """Where llama.cpp differs for long texts alone."""
    windows = [window for window in config.windows if window is not None]
    if ARCHITECTURES[config.family] in _GEMMAS or not windows:
        return []
    return [
        f"beyond {min(windows):,} tokens llama.cpp computes without the sliding windows that this "
        "model was trained with"
    ]


def _entries(
    gguf: Any, config: ModelConfig, state: dict[str, Tensor], kind: str
) -> Iterator[Entry]:
    """The tensors of the file, in its order."""
    kinds = gguf.GGMLQuantizationType
    architecture = ARCHITECTURES[config.family]
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.n_layers)
    rope = _global_rope(config)
    if rope is not None and rope.kind == "llama3":
        yield Entry("rope_freqs.weight", (rope.size // 2,), kinds.F32, {})
    if rope is not None and rope.kind == "longrope":
        yield Entry("rope_factors_long.weight", (rope.size // 2,), kinds.F32, {})
        yield Entry("rope_factors_short.weight", (rope.size // 2,), kinds.F32, {})
    for full_name, parts in families.by_family_name(file_places(config)).items():
        name = names.get_name(full_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"--to gguf: llama.cpp has no tensor for {full_name}")
        rows = sum(len(state[part]) for part in parts)
        shape = (rows, *state[next(iter(parts))].shape[1:])
        wanted = getattr(kinds, kind)
        if len(shape) == 1 or full_name.endswith("wpe.weight"):
            wanted = kinds.F32
        elif shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = kinds.F16  # as llama.cpp's own converter does with rows of no whole blocks
        yield Entry(name, shape, wanted, parts)


def _bytes(gguf: Any, entry: Entry, config: ModelConfig, state: dict[str, Tensor]) -> np.ndarray:
    """The bytes of a tensor as they stand in the file."""
    values = np.ascontiguousarray(_values(entry, config, state).float().cpu().numpy())
    return gguf.quantize(values, entry.kind).view(np.uint8)


def _values(entry: Entry, config: ModelConfig, state: dict[str, Tensor]) -> Tensor:
    rope = _global_rope(config)
    if not entry.parts:
        assert rope is not None
        if rope.kind == "longrope":
            long = entry.name.startswith("rope_factors_long")
            return torch.tensor(rope.long_factors if long else rope.short_factors)
        return frequency_factors(rope)
    ordered = sorted(entry.parts, key=lambda name: entry.parts[name].begin)
    values = torch.cat([state[name] for name in ordered])
    module = ordered[0].rpartition(".")[0]
    if ARCHITECTURES[config.family] in _INTERLEAVED and module.endswith((".attn.q", ".attn.k")):
        return interleaved(values, config.head_size)
    if module.endswith("norm") and config.norm_offset:
        return values.float() + config.norm_offset
    return values


def interleaved(values: Tensor, head_size: int) -> Tensor:
    """Rows of (heads, 2, H / 2) in the order (heads, H / 2, 2): what stood H / 2 apart, side by
    side."""
    halves = values.unflatten(0, (-1, 2, head_size // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _verify(
    gguf: Any, path: Path, entries: list[Entry], config: ModelConfig, state: dict[str, Tensor]
) -> None:
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if found.keys() != {entry.name for entry in entries}:
        raise RuntimeError(f"{path}: read back, it holds other tensors")
    for entry in entries:
        read = np.ascontiguousarray(found[entry.name].data).view(np.uint8).ravel()
        if not np.array_equal(read, _bytes(gguf, entry, config, state).ravel()):
            raise RuntimeError(f"{path}: {entry.name} was saved, but read back it differs")
