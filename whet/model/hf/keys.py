"""The keys of a `config.json`: each is read, harmless, or an error."""

from collections.abc import Set
from typing import Any

from whet.config import problems
from whet.errors import UserError
from whet.model.config import is_number

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
