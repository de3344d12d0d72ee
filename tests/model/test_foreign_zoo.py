"""Architectures with habits of their own: experts, noise, other names for limits, positions that
switch, quantised files. The oracle is transformers' own model and, for adapters, PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model import zoo
from tests.model.lora.test_lora import stir
from whet.errors import UserError
from whet.generate.engine import generate
from whet.model.foreign import ForeignModel
from whet.model.foreign_files import load_foreign
from whet.model.hf.checkpoint import save_model, save_pt
from whet.model.lora.lora import LoRA, adapters, apply_lora, kind_of
from whet.model.lora.write import save_adapter
from whet.model.open import load_backbone_from_ckpt

transformers = pytest.importorskip("transformers")

SIZES = {k: v for k, v in zoo.SMALL.items() if not k.endswith("_token_id")}
SIZES |= {"num_hidden_layers": 2, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    **SIZES,
    **EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MAMBA2 = {"state_size": 8, "conv_kernel": 3, "num_heads": 8, "head_dim": 8, "n_groups": 2}
BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_type": "longrope"}
SWITCH = 16
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 4, "router_jitter_noise": 0.3}),
    "dbrx": (
        "dbrx",
        {
            "vocab_size": 96,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 48,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {
                "ffn_hidden_size": 48,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "moe_jitter_eps": 0.3,
            },
        },
    ),
    "phimoe": ("phimoe", {**SIZES, "num_local_experts": 4, "input_jitter_noise": 0.3}),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "glm4_moe": ("glm4_moe", {**DEEPSEEK, "num_key_value_heads": 2}),
    "qwen3_next": (
        "qwen3_next",
        {
            **SIZES,
            **EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**SIZES, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    ),
    "gpt_oss": ("gpt_oss", {**SIZES, "num_local_experts": 4, "sliding_window": 8}),
    "mamba2": ("mamba2", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, **MAMBA2}),
    "bamba": ("bamba", {**SIZES, **BAMBA, "attn_layer_indices": [1], "mamba_chunk_size": 8}),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "mpt": (
        "mpt",
        {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 48},
    ),
    "longrope": (
        "olmo",
        {**SIZES, "rope_scaling": {**LONG, "original_max_position_embeddings": SWITCH}},
    ),
    "phimoe_longrope": (
        "phimoe",
        {
            **SIZES,
            "num_local_experts": 4,
            "original_max_position_embeddings": SWITCH,
            "rope_scaling": {
                **LONG,
                "short_mscale": 1.2,
                "long_mscale": 1.3,
                "original_max_position_embeddings": SWITCH,
            },
        },
    ),
    "dynamic": (
        "olmo",
        {
            **SIZES,
            "max_position_embeddings": SWITCH,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        },
    ),
}
SWITCHED = ["longrope", "phimoe_longrope", "dynamic"]
MIXTURES = ["mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "qwen3_next", "ernie4_5_moe"]
LIMITED = {"gpt_bigcode": 48, "gptj": 48, "mpt": 48, "dbrx": 48, "mamba2": 1 << 20}

Directory = Callable[[str], Path]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    root = tmp_path_factory.mktemp("zoo")

    def made(case: str) -> Path:
        if not (root / case).exists():
            kind, settings = CASES[case]
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(kind, **settings)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0.0, 0.2)
            model.save_pretrained(root / case)
        return root / case

    return made


def opened(path: Path) -> ForeignModel:
    model = load_backbone_from_ckpt(path, quiet=True)
    assert isinstance(model, ForeignModel)
    return model


def alone(path: Path, documents: list[Tensor]) -> Tensor:
    """Each document's logits from a fresh model: `dynamic` positions remember earlier texts."""
    found = []
    for document in documents:
        model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            found.append(model(document, use_cache=False).logits)
    return torch.cat(found, dim=1)


def documents(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (1, n), generator=generator) for n in lengths]


@pytest.mark.parametrize("case", CASES)
def test_in_training_documents_have_the_logits_they_have_alone(
    case: str, directory: Directory
) -> None:
    """Two rows, so that neighbours stand beside and behind; training adds no noise to them."""
    model = opened(directory(case)).train()
    parts = documents(5, SWITCH + 4, 3, SWITCH + 7)
    row = torch.cat(parts, dim=1)
    segments = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts, 1)], dim=1)
    with torch.no_grad():
        both = model(
            torch.cat([row, row.flip(1)]), segments=torch.cat([segments, segments.flip(1)])
        )
    assert torch.allclose(both[:1], alone(directory(case), parts), atol=2e-5)


@pytest.mark.parametrize("case", ["longrope", "dynamic"])
def test_in_bf16_all_documents_may_be_beyond_the_switch(case: str, directory: Directory) -> None:
    """On a CPU there are rows without a document then, which are on neither side of it."""
    model = opened(directory(case))
    parts = documents(SWITCH + 4, SWITCH + 7)
    row = torch.cat(parts, dim=1)
    segments = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts, 1)], dim=1)
    expected = alone(directory(case), parts)[0].log_softmax(-1).gather(1, row.T)[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(row, segments=segments, targets=row, weight=torch.ones(row.shape))
    found.loss.backward()
    assert torch.allclose(-found.nll[0], expected, atol=0.2)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", ["longrope", "phimoe_longrope"])
def test_greedy_text_does_not_depend_on_its_neighbours(case: str, directory: Directory) -> None:
    model = opened(directory(case))
    prompts = [part[0].tolist() for part in documents(SWITCH - 2, 4, SWITCH + 6)]
    together = generate(model, prompts, max_new_tokens=6, stop_ids=(), batch_size=3)
    for prompt, reply in zip(prompts, together, strict=True):
        text = list(prompt)
        for token in reply:
            assert token == int(alone(directory(case), [torch.tensor([text])])[0, -1].argmax())
            text.append(token)


@pytest.mark.parametrize("case", [case for case in CASES if case not in SWITCHED])
def test_what_is_saved_in_bfloat16_opens_again(
    case: str, directory: Directory, tmp_path: Path
) -> None:
    model = opened(directory(case))
    save_model(model, tmp_path / "out", None, {}, torch.bfloat16)
    found, expected = opened(tmp_path / "out").state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rounded = value.bfloat16().to(value.dtype)
        assert torch.equal(found[name], rounded) or torch.equal(found[name], value), name


@pytest.mark.parametrize("case", LIMITED)
def test_limits_have_many_names(case: str, directory: Directory) -> None:
    model = opened(directory(case))
    assert model.config.max_positions == LIMITED[case]
    assert model.config.n_layers == 2


@pytest.mark.parametrize("case", ["gpt_oss", "mamba2", "deepseek_v3"])
def test_recomputed_layers_give_the_same_gradients(case: str, directory: Directory) -> None:
    model = opened(directory(case))
    tokens = torch.cat(documents(9, 9))
    found = []
    for which in ("none", "full"):
        model.recompute = which
        assert model.recompute == which
        model.zero_grad()
        ones = torch.ones(tokens.shape)
        model(tokens, targets=tokens.roll(-1, 1), weight=ones).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", [*MIXTURES, "gpt_oss", "mamba2", "bamba"])
def test_peft_opens_adapters_with_the_same_logits(
    case: str, directory: Directory, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model, lora = opened(directory(case)), LoRA(rank=3, alpha=5.0)
    apply_lora(model, lora)
    stir(model)
    kinds = {kind_of(name) for name, _ in adapters(model)}
    assert kinds.isdisjoint({"gate_proj", "up_proj", "down_proj"}) or case == "bamba"
    save_adapter(model, tmp_path / "a", lora, str(directory(case)), None, {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory(case))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    tokens = documents(12)[0]
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        assert torch.allclose(model.eval()(tokens), expected, atol=1e-5)


def test_targets_that_peft_takes_for_experts_are_refused(directory: Directory) -> None:
    with pytest.raises(UserError, match=r"PEFT would not open an adapter on gate_proj .* q_a_proj"):
        apply_lora(opened(directory("deepseek_v3")), LoRA(targets="q_a_proj,gate_proj"))
    with pytest.raises(UserError, match=r"does not use router as plain linear .* q_proj,k_proj"):
        apply_lora(opened(directory("phimoe")), LoRA())


def test_numbered_modules_are_named_with_their_parent() -> None:
    assert kind_of("inner.model.layers.0.mlp.2") == "mlp.2"
    assert kind_of("inner.model.layers.0.mlp.up") == "up"


def quantised(path: Path, case: str, extra: dict[str, Any], method: dict[str, Any]) -> Path:
    """A model with its matrices in mxfp4 or fp8, as gpt-oss and DeepSeek are published."""
    kind, settings = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**settings, **extra})
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(path)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(path / "model.safetensors").items():
        if method["quant_method"] == "mxfp4" and ".experts." in name and "bias" not in name:
            E, inputs, outputs = value.shape
            shape = (E, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(120, 128, shape, dtype=torch.uint8)
        elif method["quant_method"] == "fp8" and value.dim() == 2 and "proj" in name:
            tensors[name] = (value.float() * 8).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".weight_scale_inv")] = torch.full((1, 1), 0.125)
        else:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "quantization_config": method}))
    return path


@pytest.mark.parametrize(
    ("case", "extra", "method"),
    [
        ("gpt_oss", {"intermediate_size": 32}, {"quant_method": "mxfp4"}),
        ("deepseek_v3", {}, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    ],
)
def test_quantised_files_open_and_are_saved_as_plain_matrices(
    case: str, extra: dict[str, Any], method: dict[str, Any], tmp_path: Path
) -> None:
    model = opened(quantised(tmp_path / "base", case, extra, method))
    save_model(model, tmp_path / "out", None, {}, torch.bfloat16)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    tokens = documents(9)[0]
    with torch.no_grad():
        assert torch.allclose(opened(tmp_path / "out")(tokens), model(tokens), atol=1e-2)


def test_other_quantised_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    values = {"model_type": "mixtral", **SIZES, "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"quantised \(gptq\): could not be saved"):
        load_backbone_from_ckpt(tmp_path)


def test_whatever_transformers_raises_is_one_line(tmp_path: Path) -> None:
    """Here its code multiplies with a value that the file sets to null."""
    rope = {"rope_type": "dynamic", "factor": 4.0}
    values = {"model_type": "stablelm", **SIZES, "head_dim": None, "rope_scaling": rope}
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="transformers can't open it: TypeError") as told:
        load_backbone_from_ckpt(tmp_path)
    assert "\n" not in str(told.value)


def test_a_pt_of_another_architecture_is_refused(directory: Directory, tmp_path: Path) -> None:
    model = load_foreign(directory("gptj"), dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(UserError, match="Whet's own families only"):
        save_pt(model, tmp_path / "m.pt", "sft", 1, {})  # type: ignore[arg-type]
