"""Small random models of every family, made by transformers' own classes: the tests' oracle."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from whet.model.config import ModelConfig
from whet.model.decoder import Transformer
from whet.model.hf.config import from_hf
from whet.model.hf.families import place_parameters

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GEMMA = {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}

# Name of the case: (model_type, what differs from the type's defaults).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "gpt2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    "llama": ("llama", SMALL),
    "llama-biases-tied": (
        "llama",
        {**SMALL, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-3.2": ("llama", {**SMALL, "head_dim": 16, "rope_scaling": LLAMA3_ROPE}),
    "llama-linear": ("llama", {**SMALL, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-dynamic": (
        "llama",
        {
            **SMALL,
            "max_position_embeddings": 16,
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        },
    ),
    "llama-yarn": ("llama", {**SMALL, "rope_scaling": YARN_ROPE}),
    "mistral": ("mistral", {**SMALL, "sliding_window": 6}),
    "mistral-no-window": ("mistral", {**SMALL, "sliding_window": None}),
    "qwen2": ("qwen2", SMALL),
    "qwen2-window": (
        "qwen2",
        {**SMALL, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {**SMALL, "head_dim": 16}),
    "smollm3": ("smollm3", SMALL),
    "smollm3-window": (
        "smollm3",
        {
            **SMALL,
            "sliding_window": 6,
            "use_sliding_window": False,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma": ("gemma", {**SMALL, "head_dim": 16}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    "phi3": ("phi3", {**SMALL, "sliding_window": 6}),
    "phi3-long": (
        "phi3",
        {**SMALL, "rope_scaling": LONG_ROPE, "original_max_position_embeddings": 16},
    ),
    "phi3-partial": ("phi3", {**SMALL, "partial_rotary_factor": 0.75, "num_attention_heads": 2}),
    "olmo2": ("olmo2", SMALL),
    "granite": (
        "granite",
        {
            **SMALL,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
}


def oracle(case: str, seed: int = 0, auto: Any = AutoModelForCausalLM, **extra: Any) -> nn.Module:
    """transformers' model of `case`, float32, every parameter random (norms and biases too)."""
    kind, values = CASES[case]
    config = AutoConfig.for_model(kind, **{**values, **extra})
    model = auto.from_config(config, attn_implementation="eager")
    return randomised(model, kind, seed)


def randomised(model: nn.Module, kind: str, seed: int = 0) -> nn.Module:
    """`model` with random parameters, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1.0 if "norm" in name and kind[:5] != "gemma" else noise)
    return model.eval()


def whet_config(case: str) -> ModelConfig:
    """The same model's configuration, read from what transformers would write to config.json."""
    kind, values = CASES[case]
    return from_hf(AutoConfig.for_model(kind, **values).to_dict())


def whet_model(case: str, source: nn.Module) -> Transformer:
    """Whet's decoder with the weights of `source`."""
    model = Transformer(whet_config(case))
    with torch.no_grad():
        for parameter, tensor in _pairs(model, dict(source.named_parameters())):
            parameter.copy_(tensor)
    return model


def gradient_pairs(model: Transformer, source: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, Whet's gradient, transformers' gradient) of every parameter of `model`."""
    gradients = {name: parameter.grad for name, parameter in source.named_parameters()}
    names = [name for name, _ in model.named_parameters()]
    for name, (parameter, tensor) in zip(names, _pairs(model, gradients), strict=True):
        assert parameter.grad is not None, name
        yield name, parameter.grad, tensor


def _pairs(model: Transformer, tensors: dict[str, Any]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    places = place_parameters(model.config, (name for name, _ in model.named_parameters()))
    for name, parameter in model.named_parameters():
        place = places[name]
        tensor = tensors[place.name].t() if place.transposed else tensors[place.name]
        yield parameter, tensor[place.begin : place.begin + len(parameter)]


def resized(config: ModelConfig, vocab_size: int) -> ModelConfig:
    """`config` with another vocabulary."""
    return dataclasses.replace(config, vocab_size=vocab_size)
