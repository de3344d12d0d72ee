"""A really pretrained model is fine-tuned on real data, whole and by LoRA, and handed on."""

import json
from pathlib import Path

import pytest
import torch

from whet.cli import main
from whet.model.open import load_backbone_from_ckpt


def dev_losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["dev_loss"] for line in lines if "dev_loss" in line]


def test_stories260k_learns_to_follow_instructions(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    base = str(shared_data / "models" / "stories260K")
    records = json.loads((shared_data / "chat" / "alpaca_instructions.json").read_text())[:200]
    Path("a.json").write_text(json.dumps(records))
    packed = ["--out", "sft.h5", "--dev_out", "dev.h5", "--dev_fraction", "0.1", "--workers", "0"]
    assert not main(
        ["prepare", "--data", "a.json", "--tokenizer", base, "--context_length", "256", *packed]
    )
    train = ["sft", "--model", base, "--data", "sft.h5", "--dev", "dev.h5", "--batch_size", "8"]
    assert not main([*train, "--out", "full", "--epochs", "1", "--lr", "1e-3", "--samples", "0"])
    lora = ["--lora_rank", "4", "--lora_dora", "--lr", "3e-3", "--epochs", "1", "--samples", "0"]
    assert not main([*train, "--out", "lora", *lora])
    for run in ("full", "lora"):
        first, *_, last = dev_losses(Path(run))
        assert last < first - 0.5

    assert not main(["export", "lora", "--merge", "--out", "merged"])
    tokens = torch.arange(3, 40)[None]
    opened = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    with torch.no_grad():
        logits = load_backbone_from_ckpt("lora")(tokens)
        assert torch.allclose(opened(tokens).logits, logits, atol=1e-4)
