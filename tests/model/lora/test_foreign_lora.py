"""LoRA on architectures that are not Whet's own, against PEFT in both directions."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model import zoo
from tests.model.lora.test_lora import stir
from tests.model.test_foreign import CASES, original
from whet.errors import UserError
from whet.model.export import merge_checked
from whet.model.foreign import ForeignModel
from whet.model.hf.checkpoint import save_model
from whet.model.lora.lora import LoRA, adapters, apply_lora, linears, merge_lora
from whet.model.lora.read import load_adapter
from whet.model.lora.write import save_adapter
from whet.model.open import load_backbone_from_ckpt, open_adapter

peft = pytest.importorskip("peft")

TOKENS = torch.randint(3, 96, (2, 15), generator=torch.Generator().manual_seed(5))
each_kind = pytest.mark.parametrize(("case", "dora"), [("gpt_neox", False), ("cohere", True)])


@pytest.fixture
def base(case: str, tmp_path: Path) -> Path:
    original(case).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(base: Path) -> Any:
    model = load_backbone_from_ckpt(base, quiet=True)
    assert isinstance(model, ForeignModel)
    return model


@each_kind
def test_peft_opens_what_whet_saves(case: str, dora: bool, base: Path, tmp_path: Path) -> None:
    model = opened(base)
    lora = LoRA(rank=3, alpha=7.0, dora=dora)
    apply_lora(model, lora)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{part}"
        for name, _ in adapters(model)
        for part in (("a", "b", "magnitude") if dora else ("a", "b"))
    }
    stir(model)
    save_adapter(model, tmp_path / "a", lora, str(base), None, {})
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(original(case)), tmp_path / "a").eval()
    with torch.no_grad():
        logits = model(TOKENS)
        assert torch.allclose(theirs(TOKENS).logits, logits, atol=2e-4)
        assert not torch.allclose(original(case)(TOKENS).logits, logits, atol=0.1)
        assert torch.equal(open_adapter(tmp_path / "a")(TOKENS), logits)


@each_kind
def test_whet_opens_what_peft_saves_and_merges_it(
    case: str, dora: bool, base: Path, tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora
    )
    theirs = peft.get_peft_model(copy.deepcopy(original(case)), config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "a")
    model = opened(base)
    load_adapter(model, tmp_path / "a")
    assert not linears(model), "PEFT's all-linear and Whet's are the same modules"
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert torch.allclose(model(TOKENS), expected, atol=2e-4)
        merge_lora(model)
        assert torch.allclose(model(TOKENS), expected, atol=2e-4)
        save_model(model, tmp_path / "merged", None, {})
        merged = load_backbone_from_ckpt(tmp_path / "merged", quiet=True)
        assert torch.equal(merged(TOKENS), model(TOKENS))


@pytest.mark.parametrize("case", ["gpt_neox"])
def test_gradients_reach_the_adapters_alone(case: str, base: Path) -> None:
    model = opened(base)
    model.recompute = "full"
    apply_lora(model.train(), LoRA(rank=2, targets="query_key_value"))
    stir(model)
    assert len(dict(adapters(model))) == zoo.SMALL["num_hidden_layers"]
    segments = torch.tensor([[1] * 7 + [2] * 8] * 2)
    model(TOKENS, None, segments, targets=TOKENS, weight=torch.ones(2, 15)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith((".a", ".b")), name
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", ["gpt_neox"])
def test_what_cannot_be_is_told(case: str, base: Path) -> None:
    with pytest.raises(UserError, match="unknown q_proj; expected all-linear, or some of dense,"):
        apply_lora(opened(base), LoRA(targets="q_proj"))
    with pytest.raises(UserError, match="new tokens under LoRA"):
        apply_lora(opened(base), LoRA(), new_rows=[95])


@pytest.mark.parametrize("case", ["mamba"])
def test_modules_that_are_looked_into_are_refused(case: str, base: Path) -> None:
    assert case in CASES
    with pytest.raises(UserError, match="MambaForCausalLM does not use dt_proj as plain linear"):
        apply_lora(opened(base), LoRA())
    with pytest.raises(UserError, match="PEFT would not open an adapter on out_proj"):
        apply_lora(opened(base), LoRA(targets="in_proj,out_proj"))
    apply_lora(opened(base), LoRA(targets="in_proj,x_proj"))


@pytest.mark.parametrize("case", ["mamba"])
def test_an_adapter_of_peft_on_such_modules_is_refused(
    case: str, base: Path, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["dt_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(original(case)), config)
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="MambaForCausalLM does not use dt_proj as plain linear"):
        load_adapter(opened(base), tmp_path / "a")


@pytest.mark.parametrize("case", ["gpt_neox"])
def test_a_merge_is_checked_on_its_logits(case: str, base: Path, capsys) -> None:
    model = opened(base)
    apply_lora(model, LoRA(rank=2))
    stir(model)
    expected = model(TOKENS)
    merge_checked(model)
    assert torch.allclose(model(TOKENS), expected, atol=2e-4)
    assert "merged: the logits differ by" in capsys.readouterr().out
