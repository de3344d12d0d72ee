"""config.json <-> ModelConfig: what is read, what is refused and how it is told."""

import dataclasses
import json

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from tests.model import zoo
from whet.errors import UserError
from whet.model.config import llama
from whet.model.hf.config import from_hf, to_hf
from whet.model.hf.families import FAMILIES

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


BEFORE = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("case", zoo.CASES)
def test_written_is_what_was_read(case):
    kind, values = zoo.CASES[case]
    source = json.loads(json.dumps(AutoConfig.for_model(kind, **values).to_dict()))
    config = from_hf(source)
    assert to_hf(config) == source
    bigger = dataclasses.replace(config, vocab_size=128)
    assert to_hf(bigger) == {**source, "vocab_size": 128}
    assert from_hf(to_hf(bigger)) == bigger


def test_every_family_has_a_case():
    assert {kind for kind, _ in zoo.CASES.values()} == set(FAMILIES) - {"whet"}


def test_old_and_new_spelling_of_rotary_positions_agree():
    scaling = {"type": "linear", "factor": 4.0}
    old = from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    assert from_hf({**LLAMA, "rope_parameters": parameters}) == old
    assert old.ropes[0].theta == 5e5


def test_gemma3_of_the_hub_has_two_speeds_and_a_pattern():
    """The keys of the first files, before layer_types and rope_parameters."""
    config = from_hf(
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
    written = to_hf(config)
    assert written["model_type"] == "llama"
    assert config.mlp_width == 192
    assert from_hf(json.loads(json.dumps(written))) == config


def test_what_no_family_computes_is_written_in_own_terms():
    config = dataclasses.replace(
        llama(300, 64, 2, 4),
        family="whet",
        tied=False,
        head_bias=True,
        windows=(None, 5),
        activation="relu",
    )
    written = json.loads(json.dumps(to_hf(config)))
    assert written["model_type"] == "whet"
    assert from_hf(written) == config


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
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"head_dim": 7}, "rotary size 7"),
        ({"is_causal": False}, "is_causal = False"),
        ({"is_causal": None}, "is_causal = None"),
        ({"add_cross_attention": True, "is_decoder": True}, "add_cross_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full": {"rope_type": "linear", "factor": 2.0}}}, "has full;"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": None}}, "'dynamic' needs factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor is -2; expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": LONG | {"short_factor": [1.0]}}, r"short_factors is \[1.0\]"),
        ({"rope_scaling": LONG | {"long_factor": [[1], 2, 3, 4]}}, "long_factors is"),
        ({"rope_scaling": {**LONG, "short_factor": None}}, "needs short_factor"),
        ({"rope_scaling": {**YARN, "beta_fast": 1}, "rope_theta": 1.0}, "theta is 1.0"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast 1.0, beta_slow 2"),
        ({"rope_scaling": {**YARN, BEFORE: "16"}}, f"{BEFORE} is '16'"),
        ({"rope_scaling": {**YARN, BEFORE: -16}}, f"{BEFORE} is -16"),
        ({BEFORE: "16"}, f"{BEFORE} is '16'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 0}, r"windows is"),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": "6"}, r"\['6', "),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": -3}, "-3, -3, -3"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": -4}, "query_pre_attn_scalar is -4"),
        ({"model_type": "gemma2", "final_logit_softcapping": "3"}, "softcapping is '3'"),
        ({"model_type": "gemma2", "sliding_window_pattern": 3}, "sliding_window_pattern = 3"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 2.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma3_text", "hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"model_type": "phi3", "rope_scaling": {**LONG, BEFORE: 16}}, "is 16 within .* 4096"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ],
)
def test_what_is_not_understood_is_named(change, words):
    with pytest.raises(UserError, match=words):
        from_hf({**LLAMA, **change})


NEITHER = {
    "gemma3_text": {"attn_logit_softcapping"}
}  # it has the key, and computes nothing with it
WITHOUT_FIELD = {
    # read by a family, though no field of its configuration
    "smollm3": {"max_window_layers"},  # in the published file
    "gemma3_text": {"sliding_window_pattern", "rope_local_base_freq"},
    "phi3": {"partial_rotary_factor"},
}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"whet", "gpt2"}))
def test_a_family_reads_the_keys_that_its_configuration_has(family):
    """transformers ignores any other, so a file with one would mean another model here."""
    theirs = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}
    ours = FAMILIES[family]["reads"]
    some_read = {key for facts in FAMILIES.values() for key in facts.get("reads", ())}
    assert theirs & some_read == (ours - WITHOUT_FIELD.get(family, set())) | NEITHER.get(
        family, set()
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 0.5),
        ("query_pre_attn_scalar", 24),
        ("attention_multiplier", 0.2),
        ("embedding_multiplier", 2.0),
        ("residual_multiplier", 0.5),
        ("logits_scaling", 2.0),
        ("attn_logit_softcapping", 2.0),
        ("final_logit_softcapping", 2.0),
        ("no_rope_layers", [1, 0, 1]),
        ("no_rope_layer_interval", 2),
        ("hidden_activation", "relu"),
        ("rope_local_base_freq", 50.0),
        ("layer_types", ["sliding_attention"] * 3),
    ],
)
def test_keys_of_other_families_are_not_applied(key, value):
    with pytest.raises(UserError, match=f"{key} = .* not understood for model_type 'llama'"):
        from_hf({**LLAMA, key: value})


def test_where_two_keys_speak_of_windows_each_family_goes_by_its_own():
    """SmolLM3 by layer_types, Qwen2 by use_sliding_window; test_parity holds both."""
    types = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    said = {**LLAMA, **types, "sliding_window": 6, "use_sliding_window": False}
    assert from_hf({**said, "model_type": "smollm3"}).windows == (6, None, None)
    assert from_hf({**said, "model_type": "qwen2"}).windows == ()


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gemma3_text", "sliding_window_pattern", True),
        ("gemma3_text", "sliding_window_pattern", 0),
        ("qwen2", "max_window_layers", True),
        ("qwen2", "max_window_layers", "2"),
        ("smollm3", "no_rope_layers", [True, False, True]),
        ("smollm3", "no_rope_layers", ["0", "1", "1"]),
        ("smollm3", "no_rope_layer_interval", True),
    ],
)
def test_truth_values_and_texts_are_no_numbers(family, key, value):
    said = {**LLAMA, "model_type": family, "sliding_window": 4, "use_sliding_window": True}
    said |= {"rope_local_base_freq": 1e4} if family == "gemma3_text" else {}
    said = {k: v for k, v in said.items() if k != "use_sliding_window" or family == "qwen2"}
    with pytest.raises(UserError, match=f"config.json: {key} is "):
        from_hf({**said, key: value})


def test_a_number_is_no_truth_value():
    yarn = {"rope_type": "yarn", "factor": 2.0, "truncate": 1}
    with pytest.raises(UserError, match="truncate is 1; expected true or false"):
        from_hf({**LLAMA, "rope_scaling": yarn})


def test_a_missing_size_is_named():
    config = {key: value for key, value in LLAMA.items() if key != "intermediate_size"}
    with pytest.raises(UserError, match="intermediate_size is None"):
        from_hf(config)


def test_all_unknown_keys_are_told_at_once():
    with pytest.raises(UserError, match=r"(?s)alibi.*n_experts"):
        from_hf({**LLAMA, "alibi": True, "n_experts": 8})


def test_keys_that_are_off_or_harmless_are_ignored():
    plain = from_hf(LLAMA)
    extra = {"alibi": False, "sliding_window": None, "attention_dropout": 0.1, "eos_token_id": 2}
    extra |= {"is_causal": True, "is_decoder": True, "partial_rotary_factor": 1.0}
    extra |= {"logits_scaling": 1.0, "embedding_multiplier": 1, "residual_multiplier": 1.0}
    extra |= {"layer_types": ["full_attention"] * 3, "final_logit_softcapping": None}
    assert from_hf({**LLAMA, **extra}) == plain


def test_own_terms_with_an_unknown_field_are_refused():
    written = to_hf(llama(300, 64, 2, 4)) | {"model_type": "whet"}
    with pytest.raises(UserError, match="hidden_size"):
        from_hf(written)


def test_keys_that_files_of_the_hub_carry_are_known():
    """As in SmolLM2 and SmolLM3, which say more than they use."""
    js = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"q": 1}}
    assert from_hf({**LLAMA, **js}) == from_hf(LLAMA)
    smol = {**LLAMA, "model_type": "smollm3", "num_hidden_layers": 4, "rope_theta": None}
    unused = {"max_window_layers": 28, "use_sliding_window": False, "sliding_window": None}
    config = from_hf({**smol, **unused})
    assert [rope is None for rope in config.ropes] == [False, False, False, True]
    assert config.ropes[0].theta == 2_000_000.0
    assert config.windows == ()


GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("base", "extra"),
    [
        (GPT2, {"n_special": 0, "predict_special_tokens": True}),  # gpt2-medium
        (GPT2, {"_num_labels": 1}),  # distilgpt2
        (GPT2, {"output_past": True}),  # rugpt3large
        (GPT2, {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}),
        ({**LLAMA, "model_type": "phi3"}, {"full_attn_mod": 1, "interpolate_factor": 1}),
        ({**LLAMA, "model_type": "gemma"}, {"hidden_act": "gelu", "hidden_activation": None}),
        ({**LLAMA, "model_type": "gemma2"}, {"sliding_window_size": 4096}),
    ],
)
def test_published_files_are_read(base, extra):
    assert from_hf({**base, **extra}) == from_hf(base)


@pytest.mark.parametrize(
    ("base", "extra"),
    [
        (GPT2, {"hidden_size": 64}),
        ({**LLAMA, "model_type": "phi3"}, {"full_attn_mod": 2}),
        ({**LLAMA, "model_type": "gemma2"}, {"sliding_window_size": 64}),
    ],
)
def test_what_they_say_must_agree(base, extra):
    with pytest.raises(UserError, match=next(iter(extra))):
        from_hf({**base, **extra})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 96.0}, "vocab_size is 96.0; expected a whole number"),
        ({"n_layers": True}, "n_layers is True"),
        ({"activation": "foo"}, "activation is 'foo'; expected one of 'silu', 'gelu'"),
        ({"norm": "foo"}, "norm is 'foo'; expected one of 'rms', 'layer'"),
        ({"qk_norm": None}, "qk_norm is None"),
        ({"attention_scale": "x"}, "attention_scale is 'x'"),
        ({"norm_eps": None}, "norm_eps is None"),
        ({"tied": "yes"}, "tied is 'yes'; expected true or false"),
        ({"max_positions": "x"}, "max_positions is 'x'"),
        ({"embed_scale": float("inf")}, "embed_scale is inf"),
        ({"logit_softcap": 0.0}, "logit_softcap is 0.0"),
        ({"windows": [None, -5]}, "windows is"),
        ({"ropes": [{"theta": 1e4, "size": 8, "kind": "foo"}] * 2}, "rope: kind is 'foo'"),
        ({"ropes": [{"theta": 1e4, "size": "8"}] * 2}, "rope: size is '8'"),
        ({"ropes": [{"theta": float("nan"), "size": 8}] * 2}, "rope: theta is nan"),
        ({"ropes": [{"theta": 1e4, "size": 8, "kind": "yarn"}] * 2}, "original_positions is 0"),
    ],
)
def test_own_terms_of_the_wrong_kind_are_refused(change, words):
    own = to_hf(dataclasses.replace(llama(96, 32, 2, 4), tied=False, head_bias=True, family="whet"))
    with pytest.raises(UserError, match=words):
        from_hf(own | change)


def test_a_window_that_no_layer_uses_is_no_window():
    qwen = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}
    assert from_hf({**qwen, "max_window_layers": 3}).windows == ()
    assert from_hf({**qwen, "max_window_layers": 2}).windows == (None, None, 64)
    assert from_hf({**qwen, "use_sliding_window": False}).windows == ()
