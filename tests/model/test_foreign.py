"""Other architectures through transformers: documents kept apart, the loss, generation, files."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model import zoo
from whet.errors import UserError
from whet.generate.engine import generate
from whet.model.foreign import ForeignModel
from whet.model.hf.checkpoint import save_model
from whet.model.hf.weights import saved_as
from whet.model.open import load_backbone_from_ckpt

transformers = pytest.importorskip("transformers")

SMALL = {k: v for k, v in zoo.SMALL.items() if k != "num_key_value_heads"}
CASES = {
    # case: (model_type, settings, how its documents are kept apart)
    "gpt_neox": ("gpt_neox", SMALL, "positions"),
    "cohere": ("cohere", {**zoo.SMALL, "logit_scale": 0.25}, "positions"),
    "stablelm": ("stablelm", zoo.SMALL, "positions"),
    "mamba": (
        "mamba",
        {**SMALL, "state_size": 4, "conv_kernel": 3, "time_step_rank": 4},
        "alone",
    ),
    "bloom": ("bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "alone"),
}
each_case = pytest.mark.parametrize("case", CASES)


@cache
def original(case: str) -> Any:
    kind, settings, _ = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("foreign")

    def directory(case: str) -> Path:
        if not (root / case).exists():
            original(case).save_pretrained(root / case)
        return root / case

    return directory


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (1, n), generator=generator) for n in (11, 1, 8)]


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows: three documents and padding; one document."""
    row = torch.cat([*documents(), torch.zeros(1, 4, dtype=torch.long)], dim=1)
    segments = torch.tensor([[1] * 11 + [2] + [3] * 8 + [0] * 4, [1] * 24])
    return torch.cat([row, row.flip(1)]), segments


@each_case
def test_packed_documents_have_the_logits_they_have_alone(
    case: str, saved: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_backbone_from_ckpt(saved(case))
    assert isinstance(model, ForeignModel)
    assert model.way == CASES[case][2]
    assert ("one document a row" in capsys.readouterr().err) == (model.way == "alone")
    tokens, segments = packed()
    with torch.no_grad():
        logits = model(tokens, segments=segments)
        expected = torch.cat([original(case)(part).logits for part in documents()], dim=1)
        assert torch.allclose(logits[:1, :20], expected, atol=1e-4)
        assert torch.allclose(logits[1:], original(case)(tokens[1:]).logits, atol=1e-4)


@pytest.mark.parametrize("way", ["mask", "alone"])
def test_every_way_gives_the_same(way: str, saved: Callable[[str], Path]) -> None:
    model = load_backbone_from_ckpt(saved("gpt_neox"), quiet=True)
    tokens, segments = packed()
    with torch.no_grad():
        expected = model(tokens, segments=segments)
        model.way = way
        assert torch.allclose(model(tokens, segments=segments), expected, atol=1e-4)


@pytest.mark.parametrize("per_token", [False, True])
@each_case
def test_loss_and_gradients_equal_the_plain_ones(
    case: str, per_token: bool, saved: Callable[[str], Path]
) -> None:
    model = load_backbone_from_ckpt(saved(case), quiet=True)
    tokens, segments = packed()
    weight = torch.zeros(tokens.shape)
    weight[0, 3:10], weight[0, 13:18] = 0.5, 2.0
    targets = tokens.roll(-1, dims=1)
    inputs = {"segments": segments, "targets": targets, "weight": weight}
    result = model(tokens, **inputs, per_token=per_token)
    loss = (weight * result.nll).sum() if per_token else result.loss
    loss.backward()
    with torch.no_grad():
        watched = model(tokens, **inputs, watch=3)
    found = {name: p.grad for name, p in model.inner.named_parameters()}

    theirs = original(case)
    theirs.zero_grad()
    logits = torch.cat([theirs(part).logits for part in documents()], dim=1)[0]
    nll = torch.nn.functional.cross_entropy(logits, targets[0, :20], reduction="none")
    loss = (nll * weight[0, :20]).sum()
    loss.backward()
    assert torch.allclose(result.loss, loss, rtol=1e-4)
    assert torch.allclose(result.nll[0, 3:10], nll[3:10], atol=1e-4)
    assert torch.allclose(watched.nll, result.nll, atol=1e-5)
    probability = logits.softmax(-1)[:, 3]
    assert torch.allclose(watched.watched[0, 3:10], probability[3:10], atol=1e-5)
    for name, parameter in theirs.named_parameters():
        difference = (found[name] - parameter.grad).norm()
        assert difference <= 1e-3 * parameter.grad.norm() + 1e-6, name

    nothing = model(tokens, segments=segments, targets=targets, weight=torch.zeros(tokens.shape))
    assert nothing.loss.item() == 0.0
    nothing.loss.backward()


@pytest.mark.parametrize("case", ["gpt_neox", "mamba"])
def test_greedy_text_equals_token_for_token(case: str, saved: Callable[[str], Path]) -> None:
    model = load_backbone_from_ckpt(saved(case), quiet=True)
    prompts = [part[0].tolist() for part in documents()]
    replies = generate(model, prompts, max_new_tokens=8, stop_ids=(1,), batch_size=2)
    for prompt, reply in zip(prompts, replies, strict=True):
        expected = original(case).generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=1
        )
        assert reply == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", ["gpt_neox", "cohere"])
def test_saved_models_open_again(case: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_backbone_from_ckpt(saved(case), quiet=True)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    save_model(model, tmp_path / "out", None, {"base": case})
    again = load_backbone_from_ckpt(tmp_path / "out", quiet=True)
    tokens, _ = packed()
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))


def test_training_drops_nothing_and_the_file_keeps_its_dropout(tmp_path: Path) -> None:
    """With dropout a step would depend on how it is cut into micro-batches."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "vocab_size": 97}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    drops = {"dropout": 0.1, "attention_dropout": 0.2, "layerdrop": 0.3}
    config = transformers.OPTConfig(**sizes, **drops)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    model = load_backbone_from_ckpt(tmp_path / "opt", quiet=True)
    tokens, segments = packed()
    with torch.no_grad():
        expected = model.eval()(tokens, segments=segments)
        assert torch.equal(model.train()(tokens, segments=segments), expected)
    model.grow(98)
    save_model(model, tmp_path / "out", None, {})
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: values[key] for key in drops} == drops


@pytest.mark.parametrize("case", ["gpt_neox", "bloom"])
def test_new_tokens_get_mean_rows_and_the_files_precision_stays(
    case: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """gpt_neox has a head of its own, bloom's is the embedding."""
    original(case).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    original(case).to(torch.float32)
    model = load_backbone_from_ckpt(tmp_path / "half", quiet=True)
    before = model.inner.get_input_embeddings().weight.detach().clone()
    model.grow(98)
    assert model.config.vocab_size == 128
    for module in (model.inner.get_input_embeddings(), model.inner.get_output_embeddings()):
        assert torch.allclose(module.weight[96:], module.weight[:96].mean(0), atol=1e-6)
    assert torch.equal(model.inner.get_input_embeddings().weight[:96], before)
    save_model(model, tmp_path / "grown", None, {}, saved_as("same", model.config.hf))
    again = load_backbone_from_ckpt(tmp_path / "grown", quiet=True)
    assert again.config.vocab_size == 128
    values = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert values["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert-generation", zoo.SMALL),
        ("gpt_neox", {**SMALL, "is_causal": False}),
        ("xlm", {"vocab_size": 96, "emb_dim": 32, "n_layers": 1, "n_heads": 4}),
        ("xlnet", {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    ],
)
def test_models_that_look_ahead_are_refused(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Their loss would fall by copying the answer from the tokens behind it."""
    config = transformers.AutoConfig.for_model(kind, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: .*tokens that come later"):
        load_backbone_from_ckpt(tmp_path, quiet=True)


def test_a_body_under_another_name_is_found(tmp_path: Path) -> None:
    """Llama 4 keeps it under `model` and says `language_model`."""
    settings = {**zoo.SMALL, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = transformers.AutoConfig.for_model("llama4_text", attention_chunk_size=6, **settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_backbone_from_ckpt(tmp_path, quiet=True)
    tokens, segments = packed()
    with torch.no_grad():
        assert torch.allclose(model(tokens), theirs(tokens).logits, atol=1e-4)
        expected = torch.cat([theirs(part).logits for part in documents()], dim=1)
        found = model(tokens, segments=segments)[:1, :20]
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_model_that_does_not_run_is_told(tmp_path: Path) -> None:
    settings = {**zoo.SMALL, "num_local_experts": 2, "num_experts_per_tok": 4}
    config = transformers.AutoConfig.for_model("mixtral", **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"MixtralForCausalLM does not run .*k out of range"):
        load_backbone_from_ckpt(tmp_path, quiet=True)


def test_missing_weights_and_unknown_types_are_told(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved("gpt_neox") / "model.safetensors")
    name = next(name for name in tensors if "dense" in name)
    (tmp_path / "config.json").write_bytes((saved("gpt_neox") / "config.json").read_bytes())
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing_keys"):
        load_backbone_from_ckpt(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba9"}')
    with pytest.raises(UserError, match="mamba9"):
        load_backbone_from_ckpt(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """`trust_remote_code` stays off, even where config.json names the code for every class."""
    config = json.loads((saved("gpt_neox") / "config.json").read_text())
    config |= {"model_type": "its_own", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    weights = (saved("gpt_neox") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(
        "from transformers import GPTNeoXConfig, GPTNeoXForCausalLM\n"
        f"open({str(tmp_path / 'was_run')!r}, 'w')\n"
        "class Config(GPTNeoXConfig):\n    model_type = 'its_own'\n"
        "class Model(GPTNeoXForCausalLM):\n    config_class = Config\n"
    )
    with pytest.raises(UserError, match="it needs code that comes with it, and Whet runs none"):
        load_backbone_from_ckpt(tmp_path)
    assert not (tmp_path / "was_run").exists()
