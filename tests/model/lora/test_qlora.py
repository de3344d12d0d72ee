"""A 4-bit base (QLoRA) on bitsandbytes' CPU kernels: against its own numbers as a plain base, and
against PEFT on transformers' 4-bit model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.model import zoo
from tests.model.lora.test_lora import TOKENS, stir
from tests.numerics.test_layouts import command
from tests.stages.test_sft import metrics
from whet.cli import main
from whet.errors import UserError
from whet.model.decoder import Transformer
from whet.model.lora.lora import LoRA, adapters, apply_lora, linears, quantize_base, set_module
from whet.model.lora.read import load_adapter
from whet.model.lora.write import save_adapter
from whet.model.open import load_backbone_from_ckpt

bnb = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
CPU = torch.device("cpu")


def rounded(model: Transformer) -> Transformer:
    """`model`, whose base is in 4 bits, with the numbers of that base in plain matrices."""
    for name, packed in linears(model).items():
        plain = torch.nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
        weight = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
        plain.weight.data.copy_(weight)
        if packed.bias is not None:
            plain.bias.data.copy_(packed.bias)
        set_module(model, name, plain)
    return model


@pytest.mark.parametrize("case", ["gpt2", "llama-3.2", "phi3", "gemma3"])
def test_the_4bit_base_computes_what_its_numbers_say(case: str) -> None:
    original = zoo.oracle(case)
    models = [zoo.whet_model(case, original) for _ in range(2)]
    for model in models:
        quantize_base(model, CPU)
    rounded(models[1])
    gradients = []
    for model in models:
        apply_lora(model, LoRA(rank=3, alpha=7.0), new_rows=[5])
        stir(model)
        model.train()
        model(TOKENS, targets=TOKENS, weight=torch.ones(TOKENS.shape)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    ours, expected = (model.eval()(TOKENS) for model in models)
    assert torch.allclose(ours, expected, atol=1e-4)
    assert not torch.allclose(ours, zoo.whet_model(case, original)(TOKENS), atol=0.1)
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.endswith(".a") for name in gradients[0])
    for name, found in gradients[0].items():
        assert (found - gradients[1][name]).norm() <= 1e-4 * gradients[1][name].norm(), name
    packed = next(layer.base for _, layer in adapters(models[0]))
    assert packed.weight.nbytes == packed.in_features * packed.out_features // 2


def test_evaluation_between_steps_changes_no_gradient() -> None:
    """bitsandbytes changes its layout in evaluation on some CPUs; gradients then stop."""
    model = zoo.whet_model("llama", zoo.oracle("llama"))
    quantize_base(model, CPU)
    assert not any(packed.support_avx512bf16_for_cpu for packed in linears(model).values())


def peft_model(base: Path, directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=four_bits, dtype=torch.float32, attn_implementation="eager"
    )
    # Not in evaluation: where the CPU multiplies bf16, bitsandbytes would then lay the weights out
    # otherwise, which rows of fewer than 64 numbers do not bear.
    return peft.PeftModel.from_pretrained(model, directory, is_trainable=True).train()


def test_logits_and_gradients_equal_those_of_peft(tmp_path: Path) -> None:
    zoo.oracle("llama-3.2").save_pretrained(tmp_path / "base")
    model = load_backbone_from_ckpt(tmp_path / "base")
    quantize_base(model, CPU)
    lora = LoRA(rank=3, alpha=7.0, targets="q,down")
    apply_lora(model, lora)
    stir(model)
    save_adapter(model, tmp_path / "a", lora, str(tmp_path / "base"), None, {})
    theirs = peft_model(tmp_path / "base", tmp_path / "a")
    logits = theirs(TOKENS).logits
    assert torch.allclose(model(TOKENS), logits, atol=1e-4)
    weight = torch.linspace(0.0, 1.0, TOKENS.numel()).view_as(TOKENS)
    model(TOKENS, targets=TOKENS, weight=weight).loss.backward()
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), TOKENS.flatten(), reduction="none"
    )
    (nll * weight.flatten()).sum().backward()
    found = dict(adapters(model))["layers.0.attn.q"]
    expected = theirs.base_model.model.model.layers[0].self_attn.q_proj
    for mine, other in (
        (found.a, expected.lora_A["default"].weight),
        (found.b, expected.lora_B["default"].weight),
    ):
        assert (mine.grad - other.grad).norm() <= 1e-3 * other.grad.norm()

    again = load_backbone_from_ckpt(tmp_path / "base")
    quantize_base(again, CPU)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_part_of_a_joined_matrix_is_saved(tmp_path: Path) -> None:
    """The parts without an adapter have shapes of their own, not those of packed bytes."""
    models = [zoo.whet_model("phi3", zoo.oracle("phi3")) for _ in range(2)]
    for model in models:
        quantize_base(model, CPU)
    apply_lora(models[0], LoRA(rank=2, targets="q"))
    stir(models[0])
    save_adapter(models[0], tmp_path / "a", LoRA(rank=2, targets="q"), "the/base", None, {})
    load_adapter(models[1], tmp_path / "a")
    assert torch.allclose(models[1](TOKENS), models[0](TOKENS), atol=1e-5)


def test_dora_is_refused() -> None:
    model = zoo.whet_model("llama", zoo.oracle("llama"))
    quantize_base(model, CPU)
    with pytest.raises(UserError, match="DoRA needs the rows"):
        apply_lora(model, LoRA(rank=2, dora=True))


def test_sft_on_4_bits_learns_and_merges(tmp_path: Path) -> None:
    """From the command line: the loss falls, the adapter opens, and merging gives a whole model."""
    tiny.model_directory(tmp_path / "base", width=64)
    tiny.packed_file(tmp_path / "train.h5", n_rows=12)
    tiny.packed_file(tmp_path / "dev.h5", n_rows=5, seed=1)
    out = tmp_path / "out"
    flags = {"lora_rank": 4, "lora_4bit": True, "overfit_rows": 4, "batch_size": 4, "epochs": 12}
    flags |= {"lr": 2e-2, "max_steps": 12, "eval_every": 6}
    assert main(command(tmp_path, out, **flags)) == 0
    losses = [line["train_loss"] for line in metrics(out) if "train_loss" in line]
    assert losses[-1] < losses[0] - 0.1
    more = {**flags, "lora_rank": None, "model": out, "max_steps": 1}
    more = {name: value for name, value in more.items() if value is not None}
    assert main(command(tmp_path, tmp_path / "more", **more)) == 0
    before, after = (
        [line["dev_loss"] for line in metrics(run) if "dev_loss" in line]
        for run in (out, tmp_path / "more")
    )
    assert after[0] == pytest.approx(before[-1], rel=1e-5), "trained further where it ended"
    assert main(["export", str(out), "--merge", "--out", str(tmp_path / "merged")]) == 0
    assert load_backbone_from_ckpt(tmp_path / "merged").config.width == 64
