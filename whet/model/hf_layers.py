"""What differs from layer to layer in a `config.json`: rotary positions and sliding windows."""

import math
from typing import Any

from whet.config import problems
from whet.errors import UserError
from whet.model.config import Rope, RopeKind
from whet.model.hf_keys import Keys

KINDS: dict[RopeKind, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        *("factor", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
"""The keys each kind reads, beside those that every kind may have."""

SHARED = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}


def read_layers(
    keys: Keys, n_layers: int, head_size: int, max_positions: int
) -> tuple[tuple[Rope | None, ...], tuple[int | None, ...]]:
    """(rotary positions, sliding window) of each layer. Raises UserError for what is not known."""
    turns = _turning_layers(keys, n_layers)
    slides = _sliding_layers(keys, turns)
    full, sliding = _ropes(keys, head_size, max_positions)
    ropes = tuple(
        (sliding if slide else full) if turn else None
        for turn, slide in zip(turns, slides, strict=True)
    )
    rule, window = keys.defaults.get("windows"), None
    if rule is not None or any(slides):
        window = keys.take("sliding_window", keys.take("sliding_window_size"))
    if rule in ("upper", "no rope") and not keys.take("use_sliding_window"):
        window = None
    windows = tuple(window if slide else None for slide in slides)
    return ropes, windows if any(windows) else ()


def _turning_layers(keys: Keys, n_layers: int) -> list[bool]:
    """Which layers have rotary positions (SmolLM3 leaves out every fourth)."""
    said, interval = keys.take("no_rope_layers"), keys.take("no_rope_layer_interval")
    if said is None:
        return [not interval or (layer + 1) % interval != 0 for layer in range(n_layers)]
    if len(said) < n_layers:
        raise UserError(f"config.json: no_rope_layers is {said!r}; expected {n_layers} entries")
    return [bool(used) for used in said[:n_layers]]  # 1 means: with rotary positions


def _sliding_layers(keys: Keys, turns: list[bool]) -> list[bool]:
    """Which layers have a sliding window, if the model uses one."""
    rule, layers = keys.defaults.get("windows"), range(len(turns))
    pattern = keys.take("_sliding_window_pattern", keys.take("sliding_window_pattern"))
    first = keys.take("max_window_layers", 28) if rule in ("upper", "no rope") else 0
    types = keys.take("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if len(types) != len(turns) or not set(types) <= set(known):
            raise UserError(
                f"config.json: layer_types is {types!r}; "
                f"expected {len(turns)} times {' or '.join(known)}"
            )
        return [kind == "sliding_attention" for kind in types]
    if rule == "pattern":
        return [(layer + 1) % pattern != 0 for layer in layers]
    if rule == "no rope":
        return [not turn for turn in turns]
    return [rule in ("all", "upper") and layer >= first for layer in layers]


def _ropes(keys: Keys, head_size: int, max_positions: int) -> tuple[Rope, Rope]:
    """Rotary positions of full and of sliding layers; they differ in Gemma 3."""
    theta = keys.take("rope_theta") or keys.defaults.get("rope_theta", 10_000.0)
    local_theta = keys.take("rope_local_base_freq")
    fraction = keys.take("partial_rotary_factor") or 1.0
    original = keys.take("original_max_position_embeddings")
    scaling, parameters = keys.take("rope_scaling"), keys.take("rope_parameters")
    by_type = parameters or {}
    if not any(isinstance(value, dict) for value in by_type.values()):
        everywhere = scaling or parameters or {}
        by_type = {"full_attention": everywhere}
        if local_theta is None:
            by_type["sliding_attention"] = everywhere
    thetas = {"full_attention": theta, "sliding_attention": local_theta or theta}
    full, sliding = (
        _read_rope(
            by_type.get(kind) or {}, thetas[kind], fraction, head_size, max_positions, original
        )
        for kind in thetas
    )
    return full, sliding


def _read_rope(
    scaling: dict[str, Any],
    theta: float,
    fraction: float,
    head_size: int,
    max_positions: int,
    original: int | None,
) -> Rope:
    """The `Rope` of one `scaling` dictionary; what it lacks comes from the other arguments.

    `original` is `original_max_position_embeddings` where it stands beside and not in the
    dictionary (Phi-3). Raises UserError for a kind that is not known, or a key that the kind does
    not have.
    """
    kind = _kind(scaling)
    problems(
        [
            f"config.json: {key} = {value!r} is not understood for rope type {kind!r}"
            for key, value in scaling.items()
            if key not in KINDS[kind] | SHARED and value not in (None, False)
        ]
    )
    fraction = scaling.get("partial_rotary_factor", fraction)
    original = original or scaling.get("original_max_position_embeddings") or max_positions
    if kind == "dynamic":
        original = max_positions
    factor = scaling.get("factor") or max_positions / original
    return Rope(
        theta=float(scaling.get("rope_theta") or theta),
        size=int(head_size * fraction),
        kind=kind,
        factor=1.0 if kind == "default" else float(factor),
        original_positions=0 if kind in ("default", "linear") else original,
        low_freq_factor=float(scaling.get("low_freq_factor") or 1.0),
        high_freq_factor=float(scaling.get("high_freq_factor") or 4.0),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        truncate=bool(scaling.get("truncate", True)),
        short_factors=tuple(scaling.get("short_factor") or ()),
        long_factors=tuple(scaling.get("long_factor") or ()),
        output_scale=_output_scale(kind, scaling, factor, original),
    )


def _kind(scaling: dict[str, Any]) -> RopeKind:
    name = scaling.get("rope_type") or scaling.get("type") or "default"
    if name == "su" or (name == "yarn" and "short_factor" in scaling):
        return "longrope"  # as early files of Phi-3 call it
    for kind in KINDS:
        if kind == name:
            return kind
    raise UserError(f"config.json: rope type {name!r} is none of {', '.join(KINDS)}")


def _output_scale(kind: str, scaling: dict[str, Any], factor: float, original: int) -> float:
    """What cosine and sine are multiplied by, as the papers of yarn and longrope advise."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    said = scaling.get("attention_factor")
    if said is not None:
        return float(said)
    if factor <= 1.0:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if above and below:
        return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1
