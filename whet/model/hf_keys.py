"""The keys of a `config.json`: each is read, harmless, or an error."""

from typing import Any

from whet.config import problems
from whet.errors import UserError

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
    num_labels pruned_heads chunk_size_feed_forward
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty
""".split()  # noqa: SIM905 - a list literal would take 80 lines
"""Keys that say nothing of what the model computes from its weights."""
LAYERS = 1024
LARGEST = 2**28
"""Counts above these are refused before anything of that size is made: no model has them."""


class Keys:
    """The keys of one `config.json`: hands each out once, and knows what was never asked for."""

    def __init__(self, config: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.left = dict(config)
        self.defaults = defaults

    def take(self, key: str, default: Any = None) -> Any:
        """The value of `key`; the family's default, or `default`, where the file has none."""
        return self.left.pop(key, self.defaults.get(key, default))

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
            if key not in HARMLESS and value not in (None, False, [], {})
        ]
    )
