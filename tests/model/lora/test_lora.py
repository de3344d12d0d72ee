"""LoRA against PEFT, in both directions; merging, new token rows, freezing."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.model import zoo
from whet.errors import UserError
from whet.model.decoder import Transformer
from whet.model.embedding import grow_embedding
from whet.model.lora import read as adapter
from whet.model.lora.lora import LoRA, adapters, apply_lora, merge_lora
from whet.model.lora.read import load_adapter
from whet.model.lora.write import save_adapter

peft = pytest.importorskip("peft")

FLAVOURS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
}
FAMILIES = ("gpt2", "llama-3.2", "llama-biases-tied", "gemma3", "phi3", "olmo2")
ADAPTERS = [(case, "dora") for case in FAMILIES]
ADAPTERS += [("llama-3.2", "lora"), ("gpt2", "lora"), ("gpt2", "rslora"), ("phi3", "rslora")]
TOKENS = torch.randint(3, 96, (2, 15), generator=torch.Generator().manual_seed(5))


@cache
def original(case: str) -> Any:
    return zoo.oracle(case)


def whet_model(case: str) -> Transformer:
    return zoo.whet_model(case, original(case))


def stir(module: nn.Module, seed: int = 0) -> None:
    """Give every trainable number a random value: B starts at zero and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter.abs() + 0.3 if parameter.dim() == 1 else 0.2 * noise)


def peft_logits(case: str, directory: Path, vocab_size: int = 96) -> torch.Tensor:
    base = zoo.oracle(case)
    if vocab_size > 96:
        base.resize_token_embeddings(vocab_size)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, directory).eval()(TOKENS).logits


@pytest.mark.parametrize(("case", "flavour"), ADAPTERS)
def test_peft_opens_what_whet_saves(case: str, flavour: str, tmp_path: Path) -> None:
    lora = LoRA(rank=3, alpha=7.0, **FLAVOURS[flavour])
    model = whet_model(case)
    apply_lora(model, lora)
    stir(model)
    save_adapter(model, tmp_path / "a", lora, "the/base", None, {})
    logits = model(TOKENS)
    assert torch.allclose(peft_logits(case, tmp_path / "a"), logits, atol=2e-4)
    assert not torch.allclose(logits, whet_model(case)(TOKENS), atol=0.1)

    again = whet_model(case)
    assert load_adapter(again, tmp_path / "a").scale == lora.scale
    mine, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert {n for n, p in theirs.items() if p.requires_grad} == {
        n for n, p in mine.items() if p.requires_grad
    }


@pytest.mark.parametrize(("case", "flavour"), ADAPTERS)
def test_whet_opens_what_peft_saves(case: str, flavour: str, tmp_path: Path) -> None:
    options = {f"use_{key}": value for key, value in FLAVOURS[flavour].items()}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )
    theirs = peft.get_peft_model(zoo.oracle(case), config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    model = whet_model(case)
    load_adapter(model, tmp_path)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert torch.allclose(model(TOKENS), expected, atol=2e-4)
        merge_lora(model)
        assert not list(adapters(model))
        assert torch.allclose(model(TOKENS), expected, atol=2e-4)


@pytest.mark.parametrize("targets", ["q,v", "o", "up,k"])
@pytest.mark.parametrize("case", ["gpt2", "phi3"])
def test_some_targets_of_joined_matrices(case: str, targets: str, tmp_path: Path) -> None:
    lora = LoRA(rank=2, alpha=3.0, targets=targets, dora=True)
    model = whet_model(case)
    apply_lora(model, lora)
    assert {name.rpartition(".")[2] for name, _ in adapters(model)} == set(targets.split(","))
    stir(model)
    save_adapter(model, tmp_path, lora, "the/base", None, {})
    assert torch.allclose(peft_logits(case, tmp_path), model(TOKENS), atol=2e-4)


def test_gradients_equal_those_of_peft(tmp_path: Path) -> None:
    lora = LoRA(rank=3, alpha=7.0, dora=True)
    model = whet_model("llama-3.2")
    apply_lora(model, lora)
    stir(model)
    save_adapter(model, tmp_path, lora, "the/base", None, {})
    theirs = peft.PeftModel.from_pretrained(zoo.oracle("llama-3.2"), tmp_path, is_trainable=True)
    weight = torch.linspace(0.0, 1.0, TOKENS.numel()).view_as(TOKENS)
    model(TOKENS, targets=TOKENS, weight=weight).loss.backward()
    nll = nn.functional.cross_entropy(
        theirs(TOKENS).logits.flatten(0, 1), TOKENS.flatten(), reduction="none"
    )
    (nll * weight.flatten()).sum().backward()
    q = "layers.1.attn.q"
    expected = theirs.base_model.model.model.layers[1].self_attn.q_proj
    found = dict(adapters(model))[q]
    for mine, other in (
        (found.a, expected.lora_A["default"].weight),
        (found.b, expected.lora_B["default"].weight),
        (found.magnitude, expected.lora_magnitude_vector["default"].weight),
    ):
        assert (mine.grad - other.grad).norm() <= 1e-3 * other.grad.norm()
    assert found.base.weight.grad is None


@pytest.mark.parametrize("case", ["llama-3.2", "llama-biases-tied", "gpt2", "phi3"])
def test_new_token_rows_train_and_open_in_peft(case: str, tmp_path: Path) -> None:
    model = whet_model(case)
    before = model(TOKENS)
    new = grow_embedding(model, 98, multiple=8)
    assert new == range(96, 104)
    assert torch.allclose(model(TOKENS)[..., :96], before, atol=1e-5)
    assert torch.allclose(model.embed.weight[97], model.embed.weight[:96].mean(0), atol=1e-6)

    lora = LoRA(rank=2, alpha=2.0, targets="v")
    apply_lora(model, lora, new_rows=list(new))
    stir(model)
    tokens = TOKENS.clone()
    tokens[:, ::4] = 97
    model(tokens, targets=tokens, weight=torch.ones(tokens.shape)).loss.backward()
    assert model.embed.rows.grad[1].abs().sum() > 0
    save_adapter(model, tmp_path, lora, "the/base", None, {})
    base = zoo.oracle(case)
    base.resize_token_embeddings(104)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        logits = model(tokens)
        assert torch.allclose(theirs(tokens).logits, logits, atol=2e-4)
        again = whet_model(case)
        load_adapter(again, tmp_path)
        assert torch.equal(again(tokens), logits)
        merge_lora(again)
        assert set(again.state_dict()) == set(whet_model(case).state_dict())
        assert torch.allclose(again(tokens), logits, atol=2e-4)


def test_whole_embeddings_that_peft_saved_are_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        rank_pattern={"layers.1.self_attn.q_proj": 5},
        alpha_pattern={"layers.[12].self_attn.q_proj": 3.0},
    )
    theirs = peft.get_peft_model(zoo.oracle("llama"), config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    model = whet_model("llama")
    load_adapter(model, tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), theirs(TOKENS).logits, atol=2e-4)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_made_is_written_as_well(case: str, rslora: bool, tmp_path: Path) -> None:
    """Ranks and scales that differ between modules, and one adapter of a joined matrix."""
    name = "layers.1.self_attn.q_proj" if case == "llama" else "h.1.attn.c_attn"
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5.0,
        target_modules=[name.rpartition(".")[2], "down_proj" if case == "llama" else "mlp.c_proj"],
        rank_pattern={name: 6},
        alpha_pattern={name: 3.0},
        use_rslora=rslora,
    )
    theirs = peft.get_peft_model(zoo.oracle(case), config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "a")
    model = whet_model(case)
    lora = load_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b", lora, "the/base", None, {"revision": "v2"})
    assert adapter.base_of(tmp_path / "b") == ("the/base", "v2")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert torch.allclose(peft_logits(case, tmp_path / "b"), expected, atol=2e-4)
        again = whet_model(case)
        load_adapter(again, tmp_path / "b")
        assert torch.allclose(again(TOKENS), expected, atol=2e-4)


def test_a_frozen_bfloat16_base_keeps_the_adapter_in_float32() -> None:
    model = whet_model("llama").to(torch.bfloat16)
    apply_lora(model, LoRA(rank=2), new_rows=[3])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert model.embed.base.weight.dtype == torch.bfloat16
    model(TOKENS, targets=TOKENS, weight=torch.ones(TOKENS.shape)).loss.backward()
    assert all(p.grad is not None for p in trained.values())


def test_an_untrained_adapter_changes_nothing() -> None:
    model = whet_model("phi3")
    before = model(TOKENS)
    apply_lora(model, LoRA(rank=2, dora=True, dropout=0.5))
    assert torch.allclose(model.eval()(TOKENS), before, atol=1e-5)
    assert all(layer.a.abs().sum() > 0 for _, layer in adapters(model))


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    model = whet_model("llama")
    apply_lora(model, LoRA(rank=4, dropout=0.5, targets="q"))
    stir(model)
    layer = next(layer for _, layer in adapters(model))
    x = torch.randn(1, 32).expand(20_000, 32)
    layer.eval()
    expected = layer(x[:1])
    layer.train()
    dropped = layer(x)
    assert dropped.std(dim=0).min() > 0.01
    assert torch.allclose(dropped.mean(0), expected[0], atol=0.05)


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "x"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "trained biases"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"r": 0}, "r is 0"),
        ({"use_qalora": True}, "use_qalora"),
        ({"r": 4.0}, "r is 4.0; expected a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": None}, "lora_dropout is None"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; expected true or false"),
        ({"alpha_pattern": ["q"]}, r"alpha_pattern is \['q'\]; expected {regular"),
        ({"alpha_pattern": {"(": 8}}, "alpha_pattern is .*regular expression"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is {'q_proj': '8'}"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is {'q_proj': 0}"),
        ({"target_modules": "("}, "target_modules is"),
        ({"target_modules": [1]}, "target_modules is"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices is"),
        ({"trainable_token_indices": [-1]}, r"trainable_token_indices is \[-1\]"),
        ({"trainable_token_indices": [3, 3]}, "expected different token ids"),
        ({"layers_to_transform": "0"}, "layers_to_transform is '0'"),
    ],
)
def test_other_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / adapter.CONFIG).write_text(json.dumps(ADAPTER | changes))
    with pytest.raises(UserError, match=message):
        load_adapter(whet_model("llama"), tmp_path)


def test_adapters_of_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / adapter.CONFIG).write_text(json.dumps(ADAPTER))
    with pytest.raises(UserError, match=r"expected adapter_model.safetensors, found nothing"):
        load_adapter(whet_model("llama"), tmp_path)
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"

    def put(layer: int, outputs: int) -> None:
        tensors = {key.format(layer, "A"): torch.ones(2, 32)}
        tensors[key.format(layer, "B")] = torch.ones(outputs, 2)
        safetensors.torch.save_file(tensors, tmp_path / adapter.WEIGHTS)

    put(0, 40)
    with pytest.raises(UserError, match=r"lora_B is \[40, 2\], the base needs \[32, 2\]"):
        load_adapter(whet_model("llama"), tmp_path)
    put(77, 32)
    with pytest.raises(UserError, match="2 tensors fit no linear layer"):
        load_adapter(whet_model("llama"), tmp_path)


def peft_adapter(directory: Path, case: str = "llama", **options: Any) -> Any:
    """An adapter that PEFT made and saved, with random numbers."""
    settings = {"r": 2, "lora_alpha": 5.0, "target_modules": ["q_proj", "up_proj"], **options}
    theirs = peft.get_peft_model(zoo.oracle(case), peft.LoraConfig(**settings)).eval()
    stir(theirs)
    theirs.save_pretrained(directory)
    return theirs


def edit(directory: Path, change: dict[str, Any], without: str = "nothing") -> None:
    """Change the configuration of a saved adapter, and leave out tensors with `without` in their
    names."""
    config = json.loads((directory / adapter.CONFIG).read_text())
    (directory / adapter.CONFIG).write_text(json.dumps(config | change))
    tensors = safetensors.torch.load_file(directory / adapter.WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if without not in name}
    safetensors.torch.save_file(kept, directory / adapter.WEIGHTS)


@pytest.mark.parametrize(
    ("options", "change", "without", "message"),
    [
        ({"use_dora": True}, {}, "magnitude", "8 tensors .* are missing, such as .*magnitude"),
        ({}, {"use_dora": True}, "nothing", "8 tensors .* are missing, such as .*magnitude"),
        ({"use_dora": True}, {"use_dora": False}, "nothing", "but use_dora is false"),
        ({}, {}, "layers.1", "4 tensors .* are missing, such as .*layers.1"),
        ({}, {}, "layers.1.self_attn.q_proj.lora_B", "1 tensors .* are missing"),
        ({}, {"target_modules": ["q_proj"]}, "nothing", "8 tensors fit no linear layer"),
        ({}, {"layers_to_transform": [0]}, "nothing", "12 tensors fit no linear layer"),
        ({}, {"exclude_modules": ["up_proj"]}, "nothing", "8 tensors fit no linear layer"),
        ({}, {"r": 8}, "nothing", "q_proj has rank 2, by adapter_config.json 8"),
        ({}, {"rank_pattern": {"up_proj": 3}}, "nothing", "up_proj has rank 2, .* 3"),
        ({"trainable_token_indices": [3]}, {}, "token_adapter", "1 tensors .* are missing"),
        (
            {"trainable_token_indices": [3]},
            {"trainable_token_indices": None},
            "nothing",
            "1 tensors fit no linear layer",
        ),
    ],
)
def test_files_that_are_not_of_one_adapter_are_refused(
    tmp_path: Path, options: dict[str, Any], change: dict[str, Any], without: str, message: str
) -> None:
    """Opened in part, the adapter would be another one than was trained."""
    peft_adapter(tmp_path, **options)
    edit(tmp_path, change, without)
    with pytest.raises(UserError, match=message):
        load_adapter(whet_model("llama"), tmp_path)


def test_an_adapter_of_rank_0_is_refused(tmp_path: Path) -> None:
    peft_adapter(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / adapter.WEIGHTS)
    empty = {n: (t[:0] if "lora_A" in n else t[:, :0]).contiguous() for n, t in tensors.items()}
    safetensors.torch.save_file(empty, tmp_path / adapter.WEIGHTS)
    with pytest.raises(UserError, match="has rank 0"):
        load_adapter(whet_model("llama"), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj", "layers.2.self_attn.k_proj"]},
        {"trainable_token_indices": {"lm_head": [7]}},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}},
        {"trainable_token_indices": [5]},
    ],
    ids=str,
)
def test_the_choice_of_modules_is_peft_s_both_ways(tmp_path: Path, options: dict[str, Any]) -> None:
    """Read, and written again: PEFT finds the same modules, so it trains the same ones."""
    theirs = peft_adapter(tmp_path / "a", **options)
    model = whet_model("llama")
    lora = adapter.continue_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b", lora, "the/base", None, {})
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert torch.allclose(model(TOKENS), expected, atol=2e-4)
    again = peft.PeftModel.from_pretrained(zoo.oracle("llama"), tmp_path / "b", is_trainable=True)
    found = {name: p for name, p in again.named_parameters() if p.requires_grad}
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys()
    assert all(torch.equal(p, trained[name]) for name, p in found.items())


def test_wrong_settings_are_told() -> None:
    with pytest.raises(UserError, match="unknown router; expected all-linear"):
        apply_lora(whet_model("llama"), LoRA(targets="q,router"))
    with pytest.raises(UserError, match="at least 1"):
        apply_lora(whet_model("llama"), LoRA(rank=0))
