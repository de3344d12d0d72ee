"""The families: what each leaves unsaid in its `config.json`, and how it names its weights.

A `config.json` says most of what a model computes and leaves the rest to its `model_type`: that
Gemma's norms multiply by 1 + weight stands nowhere but in the type. `FAMILIES` holds just that
rest.

A second table says for each of Whet's modules where a family keeps it. GPT-2 stores matrices as
(inputs, outputs) and joins queries, keys and values; Phi-3 joins them, too, as well as gate and up.
The names were read off the state_dicts of transformers' own classes, which are the tests' oracle.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whet.model.config import ModelConfig

OWN_LAYOUT = "whet"
"""The `model_type` of what no family of the ecosystem computes, such as learned positions together
with a bias on the head; weights have Whet's own names."""

_WINDOWS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_GEMMA = {"attention_bias", "hidden_activation", "query_pre_attn_scalar", "layer_types"}
_GEMMA |= {"sliding_window", "final_logit_softcapping"}
_MULTIPLIERS = {"embedding_multiplier", "attention_multiplier", "residual_multiplier"}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"reads": {"hidden_act", "attention_bias", "mlp_bias"}},
    "mistral": {
        "reads": {"hidden_act", "sliding_window"},
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "windows": "all",
        "max_position_embeddings": 131_072,
    },
    "qwen2": {
        "reads": {"hidden_act", *_WINDOWS},
        "qkv_bias": True,
        "sliding_window": 4096,
        "windows": "upper",
        "max_position_embeddings": 32_768,
    },
    "qwen3": {
        "reads": {"hidden_act", "attention_bias", *_WINDOWS},
        "qk_norm": "head",
        "sliding_window": 4096,
        "windows": "upper",
        "head_dim": 128,
        "max_position_embeddings": 32_768,
    },
    "smollm3": {
        "reads": {
            *("hidden_act", "attention_bias", "mlp_bias", *_WINDOWS),
            *("no_rope_layers", "no_rope_layer_interval"),
        },
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
        "windows": "no rope",
        "max_position_embeddings": 32_768,
    },
    "gemma": {
        "reads": {"hidden_act", "attention_bias"},
        "gemma": True,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
    },
    "gemma2": {
        "reads": {*_GEMMA, "attn_logit_softcapping"},
        "gemma": True,
        "post_norm": True,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "windows": "pattern",
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "max_position_embeddings": 8192,
    },
    "gemma3_text": {
        "reads": {*_GEMMA, "sliding_window_pattern", "rope_local_base_freq"},
        "gemma": True,
        "post_norm": True,
        "qk_norm": "head",
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "windows": "pattern",
        "vocab_size": 262_208,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "max_position_embeddings": 131_072,
    },
    "phi3": {
        "reads": {"hidden_act", "sliding_window", "partial_rotary_factor"},
        "windows": "all",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rope_kinds": ("default", "longrope"),
    },
    "olmo2": {
        "reads": {"hidden_act", "attention_bias"},
        "qk_norm": "full",
        "pre_norm": False,
        "post_norm": True,
        "rms_norm_eps": 1e-5,
    },
    "granite": {
        "reads": {"hidden_act", "attention_bias", "mlp_bias", "logits_scaling", *_MULTIPLIERS},
        "attention_multiplier": 1.0,
    },
    "gpt2": {},
    "whet": {},
}
"""What the type of a model says: facts, values of keys that its files may leave out, and under
"reads" which of the keys that only some families have it looks at. transformers ignores the others,
so a file that sets one may mean another model than the one that it gives."""
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
}
"""The class that transformers opens each family with."""
SOME_READ = frozenset(key for family in FAMILIES.values() for key in family.get("reads", ()))
"""Keys that not all families read."""

_NAMES = {
    "embed": "model.embed_tokens",
    "layers.{i}.attn.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attn.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attn.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attn.o": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
    "score": "score",
}
_PRE_NORMS = {
    "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
}
_POST_NORMS = {  # OLMo-2
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_FOUR_NORMS = {  # Gemma 2 and 3
    **_POST_NORMS,
    "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
}
_PHI3 = {
    "layers.{i}.attn.q": "model.layers.{i}.self_attn.qkv_proj",
    "layers.{i}.attn.k": "model.layers.{i}.self_attn.qkv_proj",
    "layers.{i}.attn.v": "model.layers.{i}.self_attn.qkv_proj",
    "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_up_proj",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.gate_up_proj",
}
_GPT2 = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "layers.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "layers.{i}.mlp_norm": "transformer.h.{i}.ln_2",
    "layers.{i}.attn.q": "transformer.h.{i}.attn.c_attn",
    "layers.{i}.attn.k": "transformer.h.{i}.attn.c_attn",
    "layers.{i}.attn.v": "transformer.h.{i}.attn.c_attn",
    "layers.{i}.attn.o": "transformer.h.{i}.attn.c_proj",
    "layers.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc",
    "layers.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "score": "score",
}
_JOINED = ("q", "k", "v", "gate", "up")  # in the order in which files join them

IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".tril", "pos_idxs")
"""Ends of the names of buffers that old files carry and that follow from the configuration."""


@dataclass(frozen=True)
class Place:
    """Where a module, or with its `.weight` a parameter, stands in a family's files."""

    name: str
    begin: int = 0
    """First output row inside a joined matrix; 0 where nothing is joined."""
    transposed: bool = False
    """Stored as (inputs, outputs): GPT-2's Conv1D."""


def place_modules(config: ModelConfig, modules: Iterable[str]) -> dict[str, Place]:
    """Whet's module names (`layers.0.attn.q`) -> places in the files of `config`'s family."""
    table = _table(config)
    q, kv = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
    begins = {"k": q, "v": q + kv, "up": config.mlp_width}
    places = {}
    for module in modules:
        general, layer = _general(module)
        name = table[general]
        kind = general.rpartition(".")[2]
        joined = kind in _JOINED and sum(other == name for other in table.values()) > 1
        linear = kind in ("q", "k", "v", "o", "gate", "up", "down")
        places[module] = Place(
            name.replace("{i}", layer),
            begin=begins.get(kind, 0) if joined else 0,
            transposed=config.family == "gpt2" and linear,
        )
    return places


def place_parameters(config: ModelConfig, names: Iterable[str]) -> dict[str, Place]:
    """Whet's parameter names (`layers.0.attn.q.weight`) -> places in the files of the family."""
    names = list(names)
    modules = place_modules(config, {name.rpartition(".")[0] for name in names})
    places = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        place = modules[module]
        places[name] = Place(
            f"{place.name}.{kind}", place.begin, place.transposed and kind == "weight"
        )
    return places


def join(parts: Mapping[str, Place], state: Mapping[str, Tensor]) -> Tensor:
    """The family's tensor that is made of Whet's parameters `parts`, all places of one name."""
    ordered = sorted(parts, key=lambda name: parts[name].begin)
    tensors = [state[name] for name in ordered]
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return whole.t() if parts[ordered[0]].transposed else whole


def by_family_name(places: Mapping[str, Place]) -> dict[str, dict[str, Place]]:
    """{family's name: {Whet's name: place}}, the parts of each stored tensor."""
    grouped: dict[str, dict[str, Place]] = {}
    for name, place in places.items():
        grouped.setdefault(place.name, {})[name] = place
    return grouped


def _table(config: ModelConfig) -> dict[str, str]:
    if config.family == "gpt2":
        return _GPT2
    norms = _POST_NORMS
    if config.pre_norm:
        norms = _FOUR_NORMS if config.post_norm else _PRE_NORMS
    return {**_NAMES, **norms, **(_PHI3 if config.family == "phi3" else {})}


def _general(module: str) -> tuple[str, str]:
    """`layers.3.attn.q` -> (`layers.{i}.attn.q`, `3`)."""
    parts = module.split(".")
    if parts[0] != "layers":
        return module, ""
    return ".".join(["layers", "{i}", *parts[2:]]), parts[1]
