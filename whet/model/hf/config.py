"""`config.json` of the ecosystem's model directories <-> `ModelConfig`.

Every key is accounted for: read, known to be harmless, or off (null, false, empty). What is left
over might change the mathematics, so it is an error that names it. So is a key that another family
reads and this one does not, unless its value changes nothing. What a file leaves to its
`model_type` stands in `families.py`.

Older and newer spellings are both read: `rope_theta` and `rope_scaling`, or `rope_parameters`.
Dropout is ignored: Whet trains without.
"""

import dataclasses
import math
import re
from typing import Any

from whet.errors import UserError
from whet.model.config import Activation, ModelConfig, Rope
from whet.model.hf.families import CLASSES, FAMILIES, OWN_LAYOUT, SOME_READ
from whet.model.hf.keys import Keys, read_layers, refuse_leftovers

Json = dict[str, Any]

NOT_WRITTEN = ("family", "hf", "generation", "file_dtype")
"""The fields of `ModelConfig` that describe the files, not the model."""

_SCORED = "ForSequenceClassification"
"""What the name of a class ends with whose models give scores in place of logits."""
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def from_hf(config: Json) -> ModelConfig:
    """The `ModelConfig` of the contents of a `config.json`.

    Raises UserError for an unknown `model_type`, a missing or wrong size, and for any key that is
    not understood and not off.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(
            f"config.json: model_type {family!r} is none of Whet's own ({known}); other "
            "architectures need `pip install whet[transformers]`"
        )
    if family == OWN_LAYOUT:
        return _read_whet(config)
    score = _has_score(config)
    facts = FAMILIES[family]
    keys = Keys(config, facts, SOME_READ - facts["reads"] if "reads" in facts else frozenset())
    try:
        found = _read_gpt2(keys) if family == "gpt2" else _read_llama(keys)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"config.json: a value is not of the kind that its key needs: {what}"
        ) from error
    refuse_leftovers(keys, family)
    return dataclasses.replace(found, score=score, family=family, hf=dict(config))


def _has_score(config: Json) -> bool:
    """Whether the model gives one score in place of logits. Raises UserError for several."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not any(str(name).endswith(_SCORED) for name in names):
        return False
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 1)
    if count != 1:
        raise UserError(
            f"config.json: {names[0]} with {count!r} labels; Whet opens classifiers of one label, "
            "as reward models are"
        )
    return True


def _class_with_score(family: str) -> str:
    stem = re.sub("ForCausalLM|LMHeadModel", "", CLASSES[family])
    return f"{stem}Text{_SCORED}" if family == "gemma3_text" else f"{stem}{_SCORED}"


def _read_llama(keys: Keys) -> ModelConfig:
    """The layout of Llama and its descendants."""
    facts = keys.defaults
    gemma = "gemma" in facts
    width, n_layers = keys.count("hidden_size"), keys.count("num_hidden_layers")
    n_heads = keys.count("num_attention_heads")
    head_size = keys.count("head_dim", width // n_heads)
    max_positions = keys.count("max_position_embeddings", 2048)
    ropes, windows = read_layers(keys, n_layers, head_size, max_positions)
    bias = keys.flag("attention_bias")
    query_scalar = keys.optional("query_pre_attn_scalar")
    attention_scale = keys.optional("attention_multiplier")
    return ModelConfig(
        vocab_size=keys.count("vocab_size"),
        width=width,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=keys.count("num_key_value_heads", n_heads),
        head_size=head_size,
        mlp_width=keys.count("intermediate_size"),
        max_positions=max_positions,
        windows=windows,
        ropes=ropes,
        tied=keys.flag("tie_word_embeddings", gemma),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        norm_offset=1.0 if gemma else 0.0,
        pre_norm=facts.get("pre_norm", True),
        post_norm=facts.get("post_norm", False),
        qk_norm=facts.get("qk_norm", "none"),
        activation=_activation(keys, gemma),
        qkv_bias=bias or facts.get("qkv_bias", False),
        out_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        attention_scale=query_scalar**-0.5 if query_scalar else attention_scale,
        attention_softcap=keys.optional("attn_logit_softcapping"),
        logit_softcap=keys.optional("final_logit_softcapping"),
        embed_scale=math.sqrt(width) if gemma else keys.number("embedding_multiplier", 1.0),
        residual_scale=keys.number("residual_multiplier", 1.0),
        logit_scale=1.0 / keys.number("logits_scaling", 1.0),
        init_std=keys.number("initializer_range", 0.02),
    )


def _read_gpt2(keys: Keys) -> ModelConfig:
    width, n_heads = keys.count("n_embd"), keys.count("n_head")
    n_layers, max_positions = keys.count("n_layer"), keys.count("n_positions", 1024)
    keys.same("hidden_size", width)
    keys.same("num_attention_heads", n_heads)
    keys.same("num_hidden_layers", n_layers)
    keys.same("max_position_embeddings", max_positions)
    return ModelConfig(
        vocab_size=keys.count("vocab_size"),
        width=width,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_size=width // n_heads,
        mlp_width=keys.count("n_inner", 4 * width),
        max_positions=max_positions,
        learned_positions=True,
        tied=keys.flag("tie_word_embeddings", True),
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=ACTIVATIONS[_known_activation(keys.take("activation_function", "gelu_new"))],
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attention_scale=None if keys.flag("scale_attn_weights", True) else 1.0,
        init_std=keys.number("initializer_range", 0.02),
    )


def _activation(keys: Keys, gemma: bool) -> Activation:
    newer = "hidden_activation" in keys.defaults.get("reads", ())
    name = keys.take("hidden_activation" if newer else "hidden_act", "silu")
    if gemma and (name is None or (name == "gelu" and not newer)):
        name = "gelu_pytorch_tanh"  # Gemma's first files said "gelu" and meant this
    return ACTIVATIONS[_known_activation(name)]


def _known_activation(name: Any) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: activation {name!r} is none of {', '.join(ACTIVATIONS)}")
    return str(name)


def to_hf(config: ModelConfig) -> Json:
    """The contents of the `config.json` of `config`, from which `from_hf` makes it again.

    They are those it was read from, with the changes that Whet makes (the vocabulary, a head of its
    own); of a new model those of a Llama, and in the layout "whet" the fields of `ModelConfig`.
    Raises ValueError if `config` is no model of its family.
    """
    if not isinstance(config, ModelConfig):  # of another architecture, see `foreign.py`
        return dict(config.hf)
    if config.family == OWN_LAYOUT:
        fields = dataclasses.asdict(config)
        for name in NOT_WRITTEN:
            del fields[name]
        return {"model_type": OWN_LAYOUT, **fields}
    changed: Json = {"vocab_size": config.vocab_size}
    if config.hf and config.tied != from_hf({**config.hf, **changed}).tied:
        changed["tie_word_embeddings"] = config.tied
    values = {**(config.hf or _as_llama(config)), **changed}
    if config.score and not _has_score(values):
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        values |= {"architectures": [_class_with_score(config.family)], **labels}
    if from_hf(values) != config:
        raise ValueError(f"{config} is no model of the family {config.family}")
    return values


def _as_llama(config: ModelConfig) -> Json:
    rope = config.rope(0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta if rope else 10_000.0,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied,
    }


def _read_whet(config: Json) -> ModelConfig:
    """Whet's own terms: the fields of `ModelConfig` as they are."""
    names = {field.name for field in dataclasses.fields(ModelConfig)} - set(NOT_WRITTEN)
    keys = Keys(config, {})
    values = {name: keys.take(name) for name in names if name in config}
    refuse_leftovers(keys, OWN_LAYOUT)
    try:
        values["windows"] = tuple(values.get("windows", ()))
        values["ropes"] = tuple(
            None if rope is None else Rope(**{k: _frozen(v) for k, v in rope.items()})
            for rope in values.get("ropes", ())
        )
        return ModelConfig(**values, hf=dict(config))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"config.json: {error}") from error


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
