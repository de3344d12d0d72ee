"""config.json <-> ModelConfig: what is read, what is refused and how it is told."""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from tests.model import zoo
from whet.errors import UserError
from whet.model.config import ModelConfig, llama
from whet.model.hf_config import FAMILIES

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("case", zoo.CASES)
def test_written_is_what_was_read(case):
    kind, values = zoo.CASES[case]
    source = json.loads(json.dumps(AutoConfig.for_model(kind, **values).to_dict()))
    config = ModelConfig.from_hf(source)
    assert config.to_hf() == source
    bigger = dataclasses.replace(config, vocab_size=128)
    assert bigger.to_hf() == {**source, "vocab_size": 128}
    assert ModelConfig.from_hf(bigger.to_hf()) == bigger


def test_every_family_has_a_case():
    assert {kind for kind, _ in zoo.CASES.values()} == set(FAMILIES) - {"whet"}


def test_old_and_new_spelling_of_rotary_positions_agree():
    scaling = {"type": "linear", "factor": 4.0}
    old = ModelConfig.from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    assert ModelConfig.from_hf({**LLAMA, "rope_parameters": parameters}) == old
    assert old.ropes[0].theta == 5e5


def test_gemma3_of_the_hub_has_two_speeds_and_a_pattern():
    """The keys of the first files, before layer_types and rope_parameters."""
    config = ModelConfig.from_hf(
        {
            "model_type": "gemma3_text",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_theta": 1_000_000,
            "rope_local_base_freq": 10_000,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
        }
    )
    assert config.windows == (512,) * 5 + (None, 512)
    assert [rope.theta for rope in config.ropes] == [1e4] * 5 + [1e6, 1e4]
    assert [rope.factor for rope in config.ropes] == [1.0] * 5 + [8.0, 1.0]
    assert config.tied


def test_new_model_is_written_as_a_llama_and_read_back():
    config = llama(300, 64, 2, 4, n_kv_heads=2, max_positions=128)
    written = config.to_hf()
    assert written["model_type"] == "llama"
    assert config.mlp_width == 192
    assert ModelConfig.from_hf(json.loads(json.dumps(written))) == config


def test_what_no_family_computes_is_written_in_own_terms():
    config = dataclasses.replace(
        llama(300, 64, 2, 4), tied=False, head_bias=True, windows=(None, 5), activation="relu"
    )
    written = json.loads(json.dumps(config.to_hf()))
    assert written["model_type"] == "whet"
    assert ModelConfig.from_hf(written) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "'mamba'.*whet\\[transformers\\]"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "quick_gelu"}, "'quick_gelu'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope'"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "twist": 3}}, "twist = 3"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_key_value_heads": 3}, "4 heads.*3 key/value heads"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"head_dim": 7}, "rotary size 7"),
    ],
)
def test_what_is_not_understood_is_named(change, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_hf({**LLAMA, **change})


def test_a_missing_size_is_named():
    config = {key: value for key, value in LLAMA.items() if key != "intermediate_size"}
    with pytest.raises(UserError, match="intermediate_size is None"):
        ModelConfig.from_hf(config)


def test_all_unknown_keys_are_told_at_once():
    with pytest.raises(UserError, match=r"(?s)alibi.*n_experts"):
        ModelConfig.from_hf({**LLAMA, "alibi": True, "n_experts": 8})


def test_keys_that_are_off_or_harmless_are_ignored():
    plain = ModelConfig.from_hf(LLAMA)
    extra = {"alibi": False, "sliding_window": None, "attention_dropout": 0.1, "eos_token_id": 2}
    assert ModelConfig.from_hf({**LLAMA, **extra}) == plain


def test_own_terms_with_an_unknown_field_are_refused():
    written = llama(300, 64, 2, 4).to_hf() | {"model_type": "whet"}
    with pytest.raises(UserError, match="hidden_size"):
        ModelConfig.from_hf(written)


def test_keys_that_files_of_the_hub_carry_are_known():
    """As in SmolLM2 and SmolLM3, which say more than they use."""
    js = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"q": 1}}
    assert ModelConfig.from_hf({**LLAMA, **js}) == ModelConfig.from_hf(LLAMA)
    smol = {**LLAMA, "model_type": "smollm3", "num_hidden_layers": 4, "rope_theta": None}
    unused = {"max_window_layers": 28, "use_sliding_window": False, "sliding_window": None}
    config = ModelConfig.from_hf({**smol, **unused})
    assert [rope is None for rope in config.ropes] == [False, False, False, True]
    assert config.ropes[0].theta == 2_000_000.0
    assert config.windows == ()


def test_a_window_that_no_layer_uses_is_no_window():
    qwen = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}
    assert ModelConfig.from_hf({**qwen, "max_window_layers": 3}).windows == ()
    assert ModelConfig.from_hf({**qwen, "max_window_layers": 2}).windows == (None, None, 64)
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": False}).windows == ()
