"""What adapters hold besides linear layers: whole matrices, new rows, adapters of the ends; PEFT is
the oracle for the logits, on the adapter as PEFT itself opens it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model import zoo
from whet.errors import UserError
from whet.model.embedding import add_score
from whet.model.hf.checkpoint import save_model
from whet.model.lora.lora import LoRA, adapters, apply_lora, merge_lora
from whet.model.lora.read import continue_adapter, load_adapter
from whet.model.lora.write import save_adapter
from whet.model.open import load_backbone_from_ckpt

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
TOKENS = torch.randint(3, 90, (1, 14), generator=torch.Generator().manual_seed(3))
Q = ["q_proj"]
CASES: dict[str, dict[str, Any]] = {
    "embedding whole": {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
    "head whole": {"target_modules": Q, "modules_to_save": ["lm_head"]},
    "both whole": {"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tying": {
        "target_modules": Q,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "norms": {"target_modules": Q, "modules_to_save": ["norm", "input_layernorm"]},
    "a linear layer": {"target_modules": Q, "modules_to_save": ["down_proj"]},
    "resized": {"resize": 100, "target_modules": Q},
    "cut": {"resize": 94, "target_modules": Q},
    "resized, whole": {"resize": 100, "target_modules": Q, "modules_to_save": ["embed_tokens"]},
    "resized, rows": {"resize": 100, "target_modules": Q, "trainable_token_indices": [96, 97]},
    "rows": {"target_modules": Q, "trainable_token_indices": [5, 6]},
    "rows of the head": {"target_modules": Q, "trainable_token_indices": {"lm_head": [5, 6]}},
    "rows of both": {
        "target_modules": Q,
        "trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]},
    },
    "adapter of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "adapter of the head": {"target_modules": ["q_proj", "lm_head"]},
    "adapters of both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora of the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "adapters, tied": {
        "target_modules": ["q_proj", "embed_tokens"],
        "ensure_weight_tying": True,
    },
}
QUICK = ("both whole", "resized", "rows of the head", "adapters of both", "dora of the head")
BASES = {"tied": "llama-biases-tied", "untied": "llama"}


def made(case: str, base: Path, out: Path) -> torch.Tensor:
    """Write the adapter `case` by PEFT; the logits of PEFT, which opens it again."""
    settings = dict(CASES[case])
    rows = settings.pop("resize", None)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    if rows:
        theirs.resize_token_embeddings(rows)
    model = peft.get_peft_model(theirs, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(out)
    again = transformers.AutoModelForCausalLM.from_pretrained(base)
    if rows:
        again.resize_token_embeddings(rows)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(again, out).eval()(TOKENS).logits


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "base"
    zoo.oracle(BASES[request.param]).save_pretrained(path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str, base: Path, tmp_path: Path) -> None:
    if "tied" not in base.parent.name.replace("untied", "") and case not in QUICK:
        pytest.skip("the head is no other matrix here: tried with a tied one")
    expected = made(case, base, tmp_path / "a")
    model = load_backbone_from_ckpt(base)
    load_adapter(model, tmp_path / "a")
    assert torch.allclose(model(TOKENS), expected, atol=1e-4, rtol=1e-4)
    merged = load_backbone_from_ckpt(tmp_path / "a")
    assert torch.allclose(merged(TOKENS), expected, atol=1e-4, rtol=1e-4)
    save_model(merged, tmp_path / "merged", None, {})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(again(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["embedding whole", "adapter of the head", "resized", "norms"])
def test_what_is_not_trained_further_says_so(case: str, base: Path, tmp_path: Path) -> None:
    made(case, base, tmp_path / "a")
    with pytest.raises(UserError, match="which can't be trained further; merge it"):
        continue_adapter(load_backbone_from_ckpt(base), tmp_path / "a")


def test_other_spellings_of_whole_matrices(base: Path, tmp_path: Path) -> None:
    expected = made("embedding whole", base, tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    trained = tensors.pop("base_model.model.model.embed_tokens.weight")
    tensors["base_model.model.model.embed_tokens.modules_to_save.weight"] = trained
    tensors["base_model.model.model.embed_tokens.original_module.weight"] = trained * 0
    save_file(tensors, file)
    assert torch.allclose(load_backbone_from_ckpt(tmp_path / "a")(TOKENS), expected, atol=1e-4)


def test_misfits_say_why(base: Path, tmp_path: Path) -> None:
    made("norms", base, tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())

    def refused(**changes: Any) -> str:
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError) as error:
            load_backbone_from_ckpt(tmp_path / "a")
        return str(error.value)

    assert "a whole matrix that modules_to_save does not name" in refused(modules_to_save=None)
    message = refused(modules_to_save=["norm", "input_layernorm", "up_proj"])
    assert "up_proj.weight" in message
    assert "missing" in message


def test_a_reward_model_under_lora_is_what_peft_opens(base: Path, tmp_path: Path) -> None:
    model = load_backbone_from_ckpt(base)
    add_score(model)
    lora = LoRA(rank=2, targets="q,v")
    apply_lora(model, lora)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    assert model.score.weight.requires_grad
    save_adapter(model, tmp_path / "a", lora, str(base), None, {})
    expected = model(TOKENS, weight=torch.ones(TOKENS.shape))[:, -1].detach()
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(classifier, tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(TOKENS).logits[:, 0], expected, atol=1e-5)
    merged = load_backbone_from_ckpt(tmp_path / "a", score=True)
    found = merged(TOKENS, weight=torch.ones(TOKENS.shape))[:, -1]
    assert torch.allclose(found, expected, atol=1e-5)
    further = load_backbone_from_ckpt(base)
    continue_adapter(further, tmp_path / "a")
    assert further.score.weight.requires_grad
    assert len(list(adapters(further))) == 8
    with pytest.raises(UserError, match="a reward model, which gives scores"):
        load_backbone_from_ckpt(tmp_path / "a")
    copied = copy.deepcopy(further)
    merge_lora(copied)
    assert not list(adapters(copied))
