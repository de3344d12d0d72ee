"""whet sft from the command line: what it refuses, what it writes, and that it learns."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests import tiny
from tests.numerics.test_layouts import command
from whet.cli import main
from whet.data.store import DOCUMENT, PackedStore, new_store
from whet.flags.sft import Config
from whet.model import attention
from whet.model.open import load_backbone_from_ckpt
from whet.train.evaluation import Evaluator
from whet.train.stage import Evaluation


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    tiny.model_directory(folder / "base")
    tiny.packed_file(folder / "train.h5", n_rows=12)
    tiny.packed_file(folder / "dev.h5", n_rows=5, seed=1)
    with new_store(folder / "other.h5", 1, 8, attrs={"tokenizer_hash": "0" * 64}) as store:
        store.write_rows(*[np.ones((1, 8), np.int32)] * 3)
    return folder


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_overfits_eight_rows(world, tmp_path):
    """The mechanics check: from about ln V to under 0.1 within 300 steps."""
    flags = {"overfit_rows": 8, "batch_size": 8, "micro_batch_size": 8, "epochs": 120, "lr": 2e-2}
    flags |= {"max_steps": 120, "clip": 1.0, "eval_every": 0, "schedule": "constant"}
    tiny.model_directory(tmp_path / "base", width=64)
    out = tmp_path / "out"
    assert main(command(world, out, model=tmp_path / "base", weight_decay=0, **flags)) == 0
    losses = [line["train_loss"] for line in metrics(out) if "train_loss" in line]
    assert losses[0] == pytest.approx(np.log(300), rel=0.1)
    assert min(losses) < 0.1
    rows = np.concatenate([np.frombuffer((out / "ledger.bin").read_bytes(), "<u4")[1::4]])
    first_eight = PackedStore(world / "train.h5").documents_in(np.arange(8))[2]
    assert set(rows) <= set(first_eight), "no other row is trained"


def test_a_system_prompt_of_many_documents_is_computed_once(world, tmp_path, monkeypatch):
    """In a real run: in its steps, its dev loss and its losses by source."""
    prompt, length = np.arange(1, 71), 160
    tokens, mask = np.zeros((2, 4, length), np.float32)
    segments = np.zeros((4, length), np.int32)
    documents = []
    for row in range(4):
        for i, start in enumerate((0, 80)):
            tokens[row, start : start + 70] = prompt
            tokens[row, start + 70 : start + 80] = np.random.default_rng(row).integers(1, 250, 10)
            mask[row, start + 70 : start + 80], segments[row, start : start + 80] = 1, i + 1
            documents.append((row, start, 80, 10, 0, 2 * row + i, 0))
    attrs = {"vocab_size": 292, "sources": ["a.jsonl"]}
    with new_store(tmp_path / "prompts.h5", 4, length, attrs=attrs) as writer:
        writer.write_rows(tokens.astype(np.int32), mask, segments)
        writer.write_documents(np.array(documents, DOCUMENT))
    computed = []

    def watch(plan, packed):
        shared = share_prefixes(plan, packed)
        computed.append((len(packed), sum(shared.sizes)))
        return shared

    share_prefixes = attention.share_prefixes
    monkeypatch.setattr("whet.model.decoder.share_prefixes", watch)
    tiny.model_directory(tmp_path / "base", max_positions=length)
    flags = {"data": tmp_path / "prompts.h5", "dev": tmp_path / "prompts.h5", "max_steps": 1}
    flags |= {"model": tmp_path / "base", "micro_batch_size": 4}
    assert main(command(world, tmp_path / "out", **flags)) == 0
    # 8 documents of 79 tokens (the last one has no target behind it), 7 of them without 70.
    assert set(computed) == {(8 * 79, 8 * 79 - 7 * 69)}, computed
    assert len(computed) >= 3, "a step and two evaluations"


def test_out_ckpt_and_lineage(world, tmp_path):
    out, single = tmp_path / "out", tmp_path / "single.pt"
    assert main(command(world, out, out_ckpt=single)) == 0
    content = torch.load(single, weights_only=True)
    assert content["stage"] == "sft"
    assert content["step"] == 6
    whole, again = (load_backbone_from_ckpt(path) for path in (out, single))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    lineage = json.loads((out / "whet.json").read_text())
    assert lineage["base"] == str(world / "base")
    assert lineage["metrics"]["dev_loss"] > 0
    assert lineage["config_hash"] == sha256((out / "config.toml").read_bytes()).hexdigest()
    assert lineage["data_hash"] == PackedStore(world / "train.h5").fingerprint
    assert lineage["tokenizer_hash"] == tiny.tokenizer().hash


def test_the_best_model_is_kept(world, tmp_path, monkeypatch):
    dev_losses = iter([5.0, 4.0, 3.0, 6.0, 2.9, 7.0, 8.0])

    def measured(self, model, ranks, stop):
        return Evaluation({"dev_loss": next(dev_losses)})

    monkeypatch.setattr(Evaluator, "__call__", measured)
    out = tmp_path / "out"
    assert main(command(world, out, eval_every=1)) == 0
    steps = {name: json.loads((out / name / "whet.json").read_text()) for name in ("best", ".")}
    assert steps["best"]["metrics"]["dev_loss"] == 2.9
    assert steps["."]["metrics"]["dev_loss"] == 8.0
    best, last = (load_backbone_from_ckpt(out / name) for name in ("best", "."))
    assert not torch.equal(best.embed.weight, last.embed.weight)


def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_loaded(
    world, tmp_path, capsys, monkeypatch
):
    def refuse(**place):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("whet.files.tempfile.TemporaryFile", refuse)
    assert main(command(world, tmp_path / "out", model="nowhere")) == 2
    model, out = capsys.readouterr().err.splitlines()
    assert out == f"whet: error: --out {tmp_path / 'out'}: cannot be written: Read-only file system"
    assert model.startswith("whet: error: --model nowhere: there is no such path")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("tokens", 292, "holds token ids from 1 to 292, the model's embedding 292 rows"),
        ("tokens", -9, "tokens[1, 5] is -9; expected a token id"),
        ("loss_mask", np.nan, "loss_mask[1, 5] is nan; expected finite weights of 0 or more"),
        ("loss_mask", -1.0, "loss_mask[1, 5] is -1; expected finite weights of 0 or more"),
    ],
)
def test_a_file_that_others_made_is_looked_through(world, tmp_path, capsys, name, value, told):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["tokens"] = np.ones((2, 24), np.int32)
        file["loss_mask"] = np.ones((2, 24), np.float32)
        file[name][1, 5] = value
    assert main(command(world, tmp_path / "out", data=tmp_path / "x.h5")) == 2
    assert told in capsys.readouterr().err


def test_a_reader_that_has_gone_does_not_end_the_run(world, tmp_path):
    """`whet sft … | head -1`."""
    words = [word for word in command(world, tmp_path / "out", max_steps=4) if word != "--quiet"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "whet", *words], stdout=writing, stderr=writing, check=False
    )
    os.close(writing)
    assert done.returncode == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_negative_weights_must_not_prevail(world, tmp_path, capsys):
    """Divided by their own sum, they would be trained as if they were positive."""
    ones, mask = np.ones((2, 24), np.int32), np.ones((2, 24), np.float32)
    mask[1] = -1
    with new_store(tmp_path / "x.h5", 2, 24, weighted=True, attrs={"vocab_size": 292}) as store:
        store.write_rows(ones, mask, ones)
    for name in ("data", "dev"):
        words = command(world, tmp_path / "out", **{name: tmp_path / "x.h5"})
        assert main(words) == 2
        assert "loss_mask[1, 0] is -1; expected finite weights" in capsys.readouterr().err


def test_all_problems_are_told_at_once(world, tmp_path, capsys):
    with new_store(
        tmp_path / "foreign.h5",
        1,
        64,
        attrs={"tokenizer_hash": "0" * 64, "vocab_size": 999},
    ) as store:
        ones = np.ones((1, 64), np.int32)
        store.write_rows(ones, ones, ones)
    words = command(world, tmp_path / "out", data=tmp_path / "foreign.h5")
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "another tokenizer" in told
    assert "999 ids" in told
    assert "rows of 64 tokens, but the model has 32 positions" in told
    assert told.count("whet: error:") == 3
    assert not (tmp_path / "out").exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"lr": -1}, "--lr -1.0: expected a number above 0"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"lr": "nan"}, "--lr nan: expected a number above 0"),
        ({"weight_decay": "nan"}, "--weight_decay nan: expected 0 or more"),
        ({"clip": "inf"}, "--clip inf: expected 0 or more"),
        ({"beta2": 1}, "--beta2 1.0: expected a number from 0 to below 1"),
        ({"seed": -1}, "--seed -1: expected 0 or more"),
        ({"rank_timeout": 0}, "--rank_timeout 0.0: expected a number above 0"),
        ({"lora_rank": 0}, "--lora_rank 0: expected a number above 0"),
        ({"lora_rank": 2, "lora_alpha": "nan"}, "--lora_alpha nan: expected a number above 0"),
        ({"keep": 0}, "--keep 0: expected a number above 0"),
        ({"lora_rank": 2, "lora_dropout": 1}, "--lora_dropout 1.0: expected a number from 0"),
        ({"lr_groups": "re:.=-1"}, "the factor must be finite, 0 or more"),
        ({"lr_groups": "re:.=nan"}, "the factor must be finite, 0 or more"),
        ({"model": "nowhere"}, "nowhere"),
        ({"data": "nowhere.h5"}, "nowhere.h5"),
        ({"lr_groups": "re:nothing=2"}, "matches none of the trained parameters"),
        ({"train": "re:nothing"}, "--train re:nothing: matches no parameter"),
        ({"train": "re:nothing", "dev": "{world}/other.h5"}, "--train re:nothing: matches no"),
        ({"train": "re:nothing", "dev": "{world}/other.h5"}, "--dev {world}/other.h5: "),
        ({"train": "re:mlp", "lora_rank": 2}, "--train and an adapter exclude each other"),
        ({"lora_4bit": True}, "add --lora_rank"),
        ({"gsm8k_dev": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_flags(world, tmp_path, capsys, flags, told):
    flags = {name: str(value).format(world=world) for name, value in flags.items()}
    flags = {name: True if value == "True" else value for name, value in flags.items()}
    assert main(command(world, tmp_path / "out", **flags)) == 2
    error = capsys.readouterr().err
    assert told.format(world=world) in error
    assert "Traceback" not in error


def test_flags_and_files_are_told_together_before_the_model_is_loaded(world, tmp_path, capsys):
    flags = {"gsm8k_dev": "none.jsonl", "dev": "none.h5", "train": "re:(", "lora_alpha": 3}
    flags |= {"tokenizer": "none", "out_ckpt": world, "lora_4bit": True}
    assert main(command(world, tmp_path / "out", **flags)) == 2
    error = capsys.readouterr().err
    for told in (
        "none.jsonl: no such file",
        "none.h5: no such file",
        "--train re:(: not a regular expression",
        "--lora_alpha: there is no adapter",
        "--lora_4bit: needs an adapter",
        "--tokenizer none: is no directory",
        f"--out_ckpt {world}: is a directory",
    ):
        assert told in error
    assert error.count("whet: error:") == 7
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train.h5", "base", "notes.txt"])
def test_out_ckpt_replaces_no_file_of_another_kind(world, tmp_path, capsys, name):
    (world / "notes.txt").write_text("dear to somebody")
    assert main(command(world, tmp_path / "out", out_ckpt=world / name)) == 2
    assert f"--out_ckpt {world / name}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ({"optimizer": "adamw8bit"}, "torchao"),
        ({"lora_rank": 2, "lora_4bit": True}, "bitsandbytes"),
    ],
)
def test_packages_that_are_missing_are_told(world, tmp_path, capsys, monkeypatch, flags, package):
    for name in ("torchao.optim", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(command(world, tmp_path / "out", **flags)) == 2
    assert f"{package} is not installed; pip install 'whet[cuda]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_trained_is_refused(world, tmp_path, capsys):
    tiny.packed_file(tmp_path / "empty.h5", n_rows=2, empty_rows=(0, 1))
    assert main(command(world, tmp_path / "out", data=tmp_path / "empty.h5")) == 2
    assert "no token of it is trained" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [{"lora_dora": True}, {"lora_dropout": 0.1}])
def test_lora_trains_the_adapter_alone(world, tmp_path, flags):
    out = tmp_path / "out"
    assert main(command(world, out, lora_rank=2, lora_targets="q,v", **flags)) == 0
    assert (out / "adapter_model.safetensors").exists()
    assert not (out / "model.safetensors").exists()
    adapter = load_file(out / "adapter_model.safetensors")
    assert any(np.abs(value).max() > 0 for name, value in adapter.items() if "lora_B" in name)
    assert not any("up_proj" in name for name in adapter)


def test_train_pattern_freezes_the_rest(world, tmp_path):
    out = tmp_path / "out"
    assert main(command(world, out, train="re:mlp[.]")) == 0
    before, after = (load_file(path / "model.safetensors") for path in (world / "base", out))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert len(changed) == 6, "gate, up and down of two layers"
    assert all("mlp." in name for name in changed)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_loss_falls(world, tmp_path, optimizer, schedule):
    out = tmp_path / "out"
    flags = {"optimizer": optimizer, "schedule": schedule, "lr": 5e-3, "overfit_rows": 4}
    assert main(command(world, out, max_steps=8, eval_every=0, **flags)) == 0
    losses = [line["train_loss"] for line in metrics(out) if "train_loss" in line]
    assert losses[-1] < losses[0] - 0.02


def test_bf16_stays_close(world, tmp_path):
    """Autocast changes the loss by its rounding only: three decimal digits."""
    outs = {precision: tmp_path / precision for precision in ("float32", "bf16")}
    for precision, out in outs.items():
        assert main(command(world, out, precision=precision, max_steps=2)) == 0
    exact, rounded = (metrics(out) for out in outs.values())
    for line, other in zip(exact, rounded, strict=True):
        for key in ("train_loss", "dev_loss"):
            assert other.get(key, 0) == pytest.approx(line.get(key, 0), rel=5e-3)
    saved = load_file(outs["bf16"] / "model.safetensors")
    assert all(value.dtype == np.float32 for value in saved.values()), "float32 master weights"


def test_samples_show_prompt_reply_and_what_was_expected(world, tmp_path):
    assert main(command(world, tmp_path / "out", samples=2, max_steps=1)) == 0
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 4, "two at the start, two at the end"
    assert set(json.loads(lines[0])) == {"step", "prompt", "reply", "expected"}


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_scripts_have_the_walk_through_as_defaults(monkeypatch, stage):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")
    script = importlib.import_module(f"train_{stage}")
    words = importlib.import_module("walk_through").with_defaults(
        script.DEFAULTS, ["--lr", "1e-5", "--out=elsewhere"]
    )
    assert words[words.index("--data") + 1] == script.DEFAULTS["--data"]
    assert "--out" not in words
    assert words[-2:] == ["1e-5", "--out=elsewhere"]


FLAGS = """
model revision tokenizer chat_template data dev gsm8k_dev gsm8k_limit train
lora_rank lora_alpha lora_targets lora_dropout lora_dora lora_4bit
lr schedule warmup final_lr lr_groups optimizer beta2 weight_decay clip epochs max_steps batch_size
micro_batch_size precision seed out out_ckpt resume eval_every samples save_every keep save_async
on_spike overfit_rows wandb_project profile quiet device shard rank_timeout grace_seconds compile
float8 recompute auto memory_gb
"""


def test_the_flags_are_these():
    """Before another is added: who would set it, and to what? Could one that is there hold it?"""
    assert [field.name for field in dataclasses.fields(Config)] == FLAGS.split()
