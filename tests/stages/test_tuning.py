"""What of a base is trained, and how it is written: adapters that go on, the base's precision."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.numerics.test_layouts import command
from tests.stages.test_sft import metrics
from whet.cli import main
from whet.model.adapter import CONFIG, WEIGHTS
from whet.model.checkpoint import load_backbone_from_ckpt, save_model, save_pt


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    tiny.model_directory(folder / "base")
    half = load_backbone_from_ckpt(folder / "base", dtype=torch.bfloat16)
    save_model(half, folder / "half", tiny.tokenizer(), {})
    save_pt(half, folder / "half.pt", "sft", 1, {})
    tiny.packed_file(folder / "train.h5", n_rows=12)
    tiny.packed_file(folder / "dev.h5", n_rows=5, seed=1)
    return folder


@pytest.fixture(scope="module")
def adapter(world: Path) -> Path:
    flags = {"lora_rank": 2, "lora_alpha": 3, "lora_targets": "q,down", "lora_dora": True}
    assert main(command(world, world / "adapter", lr=1e-2, **flags)) == 0
    return world / "adapter"


def test_an_adapter_is_trained_further(world, adapter, tmp_path):
    assert main(command(world, tmp_path / "out", model=adapter, lr=1e-2)) == 0
    before = [line["dev_loss"] for line in metrics(adapter) if "dev_loss" in line]
    after = [line["dev_loss"] for line in metrics(tmp_path / "out") if "dev_loss" in line]
    assert after[0] == pytest.approx(before[-1], rel=1e-6), "it begins where the other ended"
    assert after[-1] != after[0]
    configs = [json.loads((path / CONFIG).read_text()) for path in (adapter, tmp_path / "out")]
    assert configs[0] == configs[1], "same base, rank, scale, targets"
    old, new = (load_file(path / WEIGHTS) for path in (adapter, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[name], new[name]) for name in old)
    lineage = json.loads((tmp_path / "out" / "whet.json").read_text())
    assert lineage["base"] == str(world / "base")
    assert lineage["adapter"] == str(adapter)


def test_an_adapter_without_a_tokenizer_takes_its_bases(world, adapter, tmp_path):
    """PEFT saves none."""
    (tmp_path / "a").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "a" / name).write_bytes((adapter / name).read_bytes())
    assert main(command(world, tmp_path / "out", model=tmp_path / "a", max_steps=1)) == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"lora_rank": 4}, "--lora_rank: {adapter} is trained further, with its own settings"),
        ({"lora_targets": "q"}, "--lora_targets: {adapter} is trained further"),
        ({"train": "re:mlp"}, "exclude each other"),
        ({"chat_template": "chatml"}, "can't be given tokens that it lacks"),
    ],
)
def test_what_an_adapter_settles_itself_is_told(world, adapter, tmp_path, capsys, flags, told):
    assert main(command(world, tmp_path / "out", model=adapter, **flags)) == 2
    assert told.format(adapter=adapter) in capsys.readouterr().err


def test_flags_of_an_adapter_alone_are_told(world, tmp_path, capsys):
    assert main(command(world, tmp_path / "out", lora_alpha=8, lora_dora=True)) == 2
    error = capsys.readouterr().err
    assert "--lora_alpha: there is no adapter; add --lora_rank 16" in error
    assert "--lora_dora: there is no adapter" in error


def test_an_adapter_with_whole_matrices_is_told(world, adapter, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    config = json.loads((adapter / CONFIG).read_text()) | {"modules_to_save": ["embed_tokens"]}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    (tmp_path / "a" / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes())
    assert main(command(world, tmp_path / "out", model=tmp_path / "a")) == 2
    assert "holds whole matrices (embed_tokens)" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["half", "half.pt"])
@pytest.mark.parametrize(
    ("choice", "dtype"), [("same", torch.bfloat16), ("float32", torch.float32)]
)
def test_the_model_is_written_in_its_bases_precision(world, tmp_path, base, choice, dtype):
    """Training holds float32: what is written is those numbers, rounded once."""
    flags = {"model": world / base, "tokenizer": world / "half", "save_dtype": choice}
    single, out = tmp_path / "one.pt", tmp_path / "out"
    assert main(command(world, out, out_ckpt=single, save_every=6, **flags)) == 0
    saved = load_file(out / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    content = torch.load(single, weights_only=True)
    assert {value.dtype for value in content["model_state_dict"].values()} == {dtype}
    [state] = (out / "state").glob("step_*/shard-*.safetensors")
    exact = load_file(state)["model.layers.1.mlp.up.weight"]
    assert exact.dtype == torch.float32
    assert torch.equal(exact.to(dtype), saved["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(exact, exact.bfloat16().float())
