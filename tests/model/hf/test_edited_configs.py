"""Every key of every family's `config.json`, edited: transformers' logits, or a refusal.

An edited file must never be opened as another model than the one that transformers makes of it, nor
with rotary positions that transformers refuses. Whet opens some that it refuses for other reasons,
such as null where a number stands by default.
"""

import json
import random
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.model import zoo
from whet.errors import UserError
from whet.model.decoder import Transformer
from whet.model.hf.config import from_hf
from whet.model.hf.families import FAMILIES, by_family_name, join, place_parameters

TOKENS = torch.randint(3, 96, (1, 30), generator=torch.Generator().manual_seed(0))
LLAMA3 = zoo.LLAMA3_ROPE
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPES: list[Any] = [
    None,
    {},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 500.0},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0},
    {"rope_type": "linear"},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8},
    LLAMA3,
    {**LLAMA3, "rope_theta": 700.0},
    {key: value for key, value in LLAMA3.items() if "original" not in key},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7, "beta_fast": 16.0},
    {"rope_type": "longrope", **FACTORS},
    {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 16, "factor": 3.0},
    {"type": "su", **FACTORS},
    {"type": "yarn", **FACTORS},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "proportional", "rope_theta": 100.0},
    {"full_attention": {"rope_type": "linear", "factor": 4.0}},
    {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
]
KINDS = ("full_attention", "sliding_attention")
SPECIAL: dict[str, list[Any]] = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "layer_types": [[kind] * n for kind in KINDS for n in (3, 4, 7)]
    + [(list(KINDS) * 4)[:n] for n in (3, 4, 7)],
    "hidden_act": ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", None],
    "hidden_activation": ["silu", "gelu", "gelu_pytorch_tanh", None],
    "activation_function": ["gelu", "gelu_new", "relu", "silu"],
    "architectures": [["LlamaForCausalLM"], None],
    "no_rope_layers": [[0, 1, 0, 1], [1, 1, 1, 1], [], None],
    "sliding_window": [None, 3, 7, 1000],
    "max_position_embeddings": [None, 16, 128],
    "original_max_position_embeddings": [None, 8, 32],
    "dtype": ["float32", "bfloat16"],
}
EXTRA = {"head_bias": [True], "_sliding_window_pattern": [2, 3], "is_causal": [False, True]}
SKIPPED = {"transformers_version", "model_type", "vocab_size", "dtype"}
BASES = [
    case for case in zoo.CASES if case not in ("mistral-no-window", "llama-linear", "gemma-plain")
]


def values_for(key: str, now: Any) -> list[Any]:
    """What `key` is set to, in place of `now`."""
    if key in SPECIAL:
        return SPECIAL[key]
    if isinstance(now, bool) or now is None:
        return [True, False, None, 2]
    if isinstance(now, int):
        return [None, now + 1, 2 * now, max(1, now // 2)]
    if isinstance(now, float):
        return [None, now * 2, 0.5, 1]
    return [None]


def edits(case: str) -> list[dict[str, Any]]:
    """Files of `case`: without each key, with each key edited, and pairs of both spellings."""
    kind, values = zoo.CASES[case]
    whole = json.loads(json.dumps(CONFIG_MAPPING[kind](**values).to_dict()))
    found: list[dict[str, Any]] = []
    for base in ({"model_type": kind, **values}, whole):
        keys = {*base, *SPECIAL, *EXTRA, *(k for f in FAMILIES.values() for k in f)}
        keys |= {key for family in FAMILIES.values() for key in family.get("reads", ())}
        for key in sorted(keys - SKIPPED - {"reads", "windows", "gemma"}):
            found += [
                base | {key: value} for value in EXTRA.get(key, values_for(key, base.get(key)))
            ]
            found.append({name: value for name, value in base.items() if name != key})
    for first in ROPES:
        found += [whole | {"rope_scaling": first, "rope_parameters": second} for second in ROPES]
    return found


@torch.no_grad()
def compare(config: dict[str, Any]) -> str:
    """`equal`, `refused` by Whet, or what is wrong."""
    config = json.loads(json.dumps(config))
    kind = config["model_type"]
    try:
        ours = from_hf(json.loads(json.dumps(config)))
    except UserError:
        return "refused"
    try:
        theirs = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[kind].from_dict(config), attn_implementation="eager"
        )
        expected = zoo.randomised(theirs, kind)(TOKENS).logits
    except Exception as error:
        edited = [config.get("rope_scaling"), config.get("rope_parameters")]
        if kind == "phi3" and any((ropes or {}).get("type") in ("su", "yarn") for ropes in edited):
            return "theirs refuse"  # early files of Phi-3, which transformers means to read
        reason = f"{type(error).__name__}: {error}"
        of_rope = "rope" in reason and "NoneType" not in reason
        return f"not refused: {reason}"[:200] if of_rope else "theirs refuse"
    model = Transformer(ours)
    stored = {n: p for n, p in theirs.named_parameters() if not ours.tied or n != "lm_head.weight"}
    grouped = by_family_name(place_parameters(ours, model.state_dict()))
    shapes = {name: tuple(join(parts, model.state_dict()).shape) for name, parts in grouped.items()}
    if shapes != {name: tuple(p.shape) for name, p in stored.items()}:
        return "refused"  # its weights have other names or shapes
    for name, parts in grouped.items():
        whole = stored[name].t() if next(iter(parts.values())).transposed else stored[name]
        for part, place in parts.items():
            parameter = model.get_parameter(part)
            parameter.copy_(whole[place.begin : place.begin + len(parameter)])
    difference = (model(TOKENS) - expected).abs().max() / expected.abs().max()
    return "equal" if difference < 1e-4 else f"logits differ by {difference:.2g}"


def told(case: str, config: dict[str, Any]) -> str:
    base = zoo.CASES[case][1]
    changed = {k: v for k, v in config.items() if k not in base or base[k] != v}
    return f"{case} {json.dumps(changed)[:300]}"


def check(case: str, configs: list[dict[str, Any]]) -> dict[str, int]:
    counts = {"equal": 0, "refused": 0, "theirs refuse": 0}
    wrong = []
    for config in configs:
        result = compare(config)
        if result in counts:
            counts[result] += 1
        else:
            wrong.append(f"{told(case, config)}: {result}")
    assert not wrong, "\n".join(wrong)
    return counts


@pytest.mark.parametrize("case", BASES)
def test_some_edited_configs(case: str) -> None:
    counts = check(case, random.Random(case).sample(edits(case), 25))
    assert counts["equal"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("case", BASES)
def test_all_edited_configs(case: str) -> None:
    counts = check(case, edits(case))
    assert counts["equal"] > 50
