"""The keys of a `config.json`: each is read, harmless, or an error.

`Keys` hands out single ones; `read_layers` reads what differs from layer to layer: rotary positions
and sliding windows.
"""

import math
from collections.abc import Set
from functools import partial
from typing import Any

from whet.config import problems
from whet.errors import UserError
from whet.model.config import Rope, RopeKind, is_number

HARMLESS = """
    is_llama_config transformers.js_config unsloth_fixed unsloth_version neftune_noise_alpha
    max_sequence_length model_max_length seq_length _attn_implementation_autoset
    architectures auto_map model_type transformers_version _name_or_path name_or_path _commit_hash
    torch_dtype dtype use_cache cache_implementation attn_implementation _attn_implementation
    _attn_implementation_internal use_return_dict return_dict output_attentions output_hidden_states
    output_scores torchscript use_bfloat16 tie_encoder_decoder gradient_checkpointing
    use_flash_attn _flash_attn_2_enabled pretraining_tp tensor_parallel_size
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop embedding_dropout
    reorder_and_upcast_attn initializer_range n_ctx num_logits_to_keep
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    prefix tokenizer_class task_specific_params problem_type finetuning_task id2label label2id
    num_labels _num_labels predict_special_tokens n_special output_past
    pruned_heads chunk_size_feed_forward
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty
""".split()  # noqa: SIM905 - a list literal would take 80 lines
"""Keys that say nothing of what the model computes from its weights."""
NEUTRAL: dict[str, Any] = {
    "is_decoder": True,
    "partial_rotary_factor": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}
"""Keys that change nothing at just this value, where the family does not read them."""
OFF: tuple[Any, ...] = (None, False, [], {})
LAYERS = 1024
LARGEST = 2**28
"""Counts above these are refused before anything of that size is made: no model has them."""


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

NEEDED: dict[RopeKind, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""The keys without which a kind stretches nothing, or not as it was trained. Where
longrope says no factor, it follows from the lengths of text before and after."""

SHARED = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}
RAMP = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
"""Where llama3 and yarn begin and end to stretch: keys with the names of fields of `Rope`."""
LAYER_KINDS = ("full_attention", "sliding_attention")


class Keys:
    """The keys of one `config.json`: hands each out once, and knows what was never asked for."""

    def __init__(
        self, config: dict[str, Any], defaults: dict[str, Any], unread: Set[str] = frozenset()
    ) -> None:
        """`defaults` are the family's; `unread` are keys of others, which it does not look at."""
        self.left = dict(config)
        self.defaults = defaults
        self.unread = unread

    def take(self, key: str, default: Any = None) -> Any:
        """The value of `key`; the family's default, or `default`, where the file has none or the
        family does not read it."""
        usual = self.defaults.get(key, default)
        return usual if key in self.unread else self.left.pop(key, usual)

    def same(self, key: str, value: Any) -> None:
        """Take `key` if it says `value`, as is known already; else it stays, and is refused."""
        if self.left.get(key) == value:
            self.left.pop(key, None)

    def flag(self, key: str, default: bool = False) -> bool:
        """`take` for true or false, null being the default. Raises UserError for all else."""
        value = self.take(key, default)
        value = self.defaults.get(key, default) if value is None else value
        if type(value) is not bool:
            raise UserError(f"config.json: {key} is {value!r}; expected true or false")
        return value

    def number(self, key: str, default: float) -> float:
        """`take` for a finite number above 0, null being the default. Raises UserError for all
        else."""
        return self.optional(key, default) or float(self.defaults.get(key, default))

    def optional(self, key: str, default: float | None = None) -> float | None:
        """`number` for a key where null is None."""
        value = self.take(key, default)
        if value is None:
            return None
        if not is_number(value) or value <= 0:
            raise UserError(f"config.json: {key} is {value!r}; expected a number above 0")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        """The same for a whole number of at least 1. Raises UserError if it is not."""
        value = self.take(key, default)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise UserError(f"config.json: {key} is {value!r}; expected a whole number above 0")
        most = LAYERS if "layer" in key else LARGEST
        if value > most:
            raise UserError(f"config.json: {key} is {value}; Whet reads no model above {most:,}")
        return value


def refuse_leftovers(keys: Keys, family: str) -> None:
    """Raise UserError for each key that was not read, is not harmless and is not off."""
    problems(
        [
            f"config.json: {key} = {value!r} is not understood for model_type {family!r} and may "
            "change what the model computes; remove the key if it does not"
            for key, value in keys.left.items()
            if key not in HARMLESS and not _neutral(key, value, keys.defaults)
        ]
    )


def _neutral(key: str, value: Any, defaults: dict[str, Any]) -> bool:
    """Whether `key`, which the family does not read, says nothing new at this `value`."""
    if key == "is_causal":  # off is the one value that changes something
        return value is True
    if key == "layer_types" and isinstance(value, list):
        return all(kind == "full_attention" for kind in value)
    return value in OFF or value == defaults.get(key, NEUTRAL.get(key))


def read_layers(
    keys: Keys, n_layers: int, head_size: int, max_positions: int
) -> tuple[tuple[Rope | None, ...], tuple[int | None, ...]]:
    """(rotary positions, sliding window) of each layer. Raises UserError for what is not known."""
    turns, slides, window = [True] * n_layers, [False] * n_layers, None
    if "no_rope_layer_interval" in keys.defaults:
        turns = _turning_layers(keys, n_layers)
    if "windows" in keys.defaults:
        window = keys.take("sliding_window")
        keys.same("sliding_window_size", window)  # an older name, which files have beside the other
        slides = _sliding_layers(keys, turns)
    full, sliding = _ropes(keys, head_size, max_positions)
    ropes = tuple(
        (sliding if slide else full) if turn else None
        for turn, slide in zip(turns, slides, strict=True)
    )
    windows = tuple(window if slide else None for slide in slides)
    return ropes, () if window is None or not any(slides) else windows


def _turning_layers(keys: Keys, n_layers: int) -> list[bool]:
    """Which layers have rotary positions (SmolLM3 leaves out every fourth)."""
    said, interval = keys.take("no_rope_layers"), keys.take("no_rope_layer_interval")
    _check_whole("no_rope_layer_interval", interval)
    if said is None:
        return [(layer + 1) % interval != 0 for layer in range(n_layers)]
    if len(said) < n_layers or not all(type(used) is int and used in (0, 1) for used in said):
        raise UserError(
            f"config.json: no_rope_layers is {said!r}; expected {n_layers} entries, each 0 or 1"
        )
    return [bool(used) for used in said[:n_layers]]  # 1 means: with rotary positions


def _check_whole(key: str, value: Any, least: int = 1) -> None:
    if type(value) is not int or value < least:
        expected = f"expected a whole number of at least {least}"
        raise UserError(f"config.json: {key} is {value!r}; {expected}")


def _sliding_layers(keys: Keys, turns: list[bool]) -> list[bool]:
    """Which layers have the sliding window, if there is one."""
    rule, layers = keys.defaults["windows"], range(len(turns))
    pattern = keys.take("sliding_window_pattern")
    first, used = keys.take("max_window_layers", 28), keys.flag("use_sliding_window")
    types = keys.take("layer_types")
    if types is None:
        keys.same("_sliding_window_pattern", pattern)
    else:
        keys.left.pop("_sliding_window_pattern", None)  # what layer_types were once made from
        if len(types) != len(turns) or not set(types) <= set(LAYER_KINDS):
            raise UserError(
                f"config.json: layer_types is {types!r}; "
                f"expected {len(turns)} times {' or '.join(LAYER_KINDS)}"
            )
        # Where both are said, Qwen goes by use_sliding_window and SmolLM3 by layer_types.
        return [kind == "sliding_attention" and (used or rule != "upper") for kind in types]
    if rule == "pattern":
        _check_whole("sliding_window_pattern", pattern)
        return [(layer + 1) % pattern != 0 for layer in layers]
    if rule == "no rope":
        return [used and not turn for turn in turns]
    if rule == "upper":
        if used:
            _check_whole("max_window_layers", first, least=0)
        return [used and layer >= first for layer in layers]
    return [rule == "all" for layer in layers]


def _ropes(keys: Keys, head_size: int, max_positions: int) -> tuple[Rope, Rope]:
    """Rotary positions of full and of sliding layers; they differ in Gemma 3."""
    theta = keys.number("rope_theta", 10_000.0)
    local_theta = keys.optional("rope_local_base_freq")
    fraction = keys.number("partial_rotary_factor", 1.0)
    original = keys.take("original_max_position_embeddings")
    scaling, parameters = keys.take("rope_scaling"), keys.take("rope_parameters")
    read = partial(
        _read_rope,
        fraction=None if "partial_rotary_factor" in keys.unread else fraction,
        head_size=head_size,
        max_positions=max_positions,
        original=original,
        kinds=keys.defaults.get("rope_kinds", tuple(KINDS)),
    )
    if local_theta is not None:
        full, sliding = _by_layer_kind(scaling or {}, parameters or {})
        return read(full, theta), read(sliding, local_theta)
    if any(isinstance(value, dict) for value in (parameters or {}).values()):
        raise UserError(
            f"config.json: rope_parameters has {', '.join(parameters)}; expected the same for "
            "all layers"
        )
    same = read(scaling or parameters or {}, theta)
    return same, same


def _by_layer_kind(scaling: dict[str, Any], parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The rotary settings of each of `LAYER_KINDS`, where they differ (Gemma 3); `scaling` holds
    for the full layers, on top of `parameters`. Raises UserError for what transformers would not
    use."""
    if parameters and not (set(parameters) <= set(LAYER_KINDS) and "full_attention" in parameters):
        raise UserError(
            f"config.json: rope_parameters has {', '.join(parameters)}; expected "
            f"{' and '.join(LAYER_KINDS)}, each with settings of its own"
        )
    if "type" in scaling and "rope_type" not in scaling:
        raise UserError("config.json: rope_scaling has type; this model_type reads rope_type")
    full, sliding = (dict(parameters.get(kind) or {}) for kind in LAYER_KINDS)
    return [full | scaling, sliding]


def _read_rope(
    scaling: dict[str, Any],
    theta: float,
    fraction: float | None,
    head_size: int,
    max_positions: int,
    original: int | None,
    kinds: tuple[RopeKind, ...],
) -> Rope:
    """The `Rope` of one `scaling` dictionary; what it lacks comes from the other arguments.

    `fraction` is None where the family turns whole heads, whatever the dictionary says. `original`
    is `original_max_position_embeddings` where it stands beside and not in the dictionary (Phi-3).
    Raises UserError for a kind that is none of `kinds`, a key that the kind does not have, and one
    that it needs and lacks.
    """
    kind = _kind(scaling, kinds)
    inside = scaling.get("original_max_position_embeddings")
    part = scaling.get("partial_rotary_factor", fraction)
    found = [
        f"config.json: {key} = {value!r} is not understood for rope type {kind!r}"
        for key, value in scaling.items()
        if key not in KINDS[kind] | SHARED and value not in (None, False)
    ]
    found += [
        f"config.json: rope type {kind!r} needs {key}, which is missing"
        for key in NEEDED.get(kind, ())
        if scaling.get(key) is None
    ]
    if fraction is None and part not in (None, 1):
        found.append(
            f"config.json: partial_rotary_factor = {part!r} is not understood for this model_type"
        )
    if kind == "longrope" and original is not None and inside not in (None, original):
        found.append(
            f"config.json: original_max_position_embeddings is {inside!r} within the rope "
            f"settings, and {original!r} (as said, or the family's own) beside them"
        )
    problems(found)
    before = original or inside or max_positions
    if kind == "dynamic":
        before = max_positions
    if type(before) is not int or before < 2:
        raise UserError(
            f"config.json: original_max_position_embeddings is {before!r}; "
            "expected a whole number above 1"
        )
    part = Keys(scaling, {})
    factor = part.number("factor", max_positions / before)
    return Rope(
        theta=part.number("rope_theta", theta),
        size=int(head_size * part.number("partial_rotary_factor", fraction or 1.0)),
        kind=kind,
        factor=1.0 if kind == "default" else factor,
        original_positions=0 if kind in ("default", "linear") else before,
        **{name: part.number(name, 1.0) for name in RAMP if scaling.get(name) is not None},
        truncate=part.flag("truncate", True),
        short_factors=tuple(scaling.get("short_factor") or ()),
        long_factors=tuple(scaling.get("long_factor") or ()),
        output_scale=_output_scale(kind, part, factor, before),
    )


def _kind(scaling: dict[str, Any], kinds: tuple[RopeKind, ...]) -> RopeKind:
    """The kind that `scaling` names, one of `kinds`, which the family knows."""
    name = scaling.get("rope_type") or scaling.get("type") or "default"
    if name in ("su", "yarn") and "yarn" not in kinds:
        return "longrope"  # as early files of Phi-3 call it
    for kind in kinds:
        if kind == name:
            return kind
    raise UserError(f"config.json: rope type {name!r} is none of {', '.join(kinds)}")


def _output_scale(kind: str, part: Keys, factor: float, original: int) -> float:
    """What cosine and sine are multiplied by, as the papers of yarn and longrope advise."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    said = part.optional("attention_factor")
    if said is not None or factor <= 1.0:
        return said or 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    scales = [0.1 * math.log(factor) + 1, 1.0]
    if part.left.get("mscale") and part.left.get("mscale_all_dim"):
        names = ("mscale", "mscale_all_dim")
        scales = [0.1 * part.number(name, 1.0) * math.log(factor) + 1 for name in names]
    return scales[0] / scales[1]
