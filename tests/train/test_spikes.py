"""Steps that are not applied: what is a spike, what is recorded, what is replayed."""

import json

import numpy as np
import pytest
import torch

from tests import tiny
from tests.numerics.test_layouts import command
from whet.cli import main
from whet.stages import packed
from whet.train.stage import Sums
from whet.train.step import FACTOR, NEEDED, reason, recent_norms


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("incidents")
    tiny.model_directory(folder / "base")
    tiny.packed_file(folder / "train.h5", n_rows=8)
    tiny.packed_file(folder / "dev.h5", n_rows=3, seed=1)
    return folder


def verdict_on(loss, norm, norms, clip=1.0):
    """Why such a step is not applied after steps with these norms, or None."""
    recent = recent_norms(norms, torch.device("cpu"))
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (loss, norm))
    return reason(loss, norm, recent.judge(*numbers, clip).tolist())


def test_verdicts():
    assert "nan" in verdict_on(float("nan"), 1.0, [])
    assert "inf" in verdict_on(1.0, float("inf"), [])
    few = [1.0] * (NEEDED - 1)
    assert verdict_on(1.0, 1e9, few) is None, "too few norms make no range"
    norms = [*few, 2.0]
    assert verdict_on(1.0, 2.0 * FACTOR, norms) is None
    told = verdict_on(1.0, 2.0 * FACTOR + 0.1, norms)
    assert told == "the gradient norm is 10.1; the last 16 were at most 2"
    assert verdict_on(1.0, 2.0 * FACTOR + 0.1, norms, 100.0) is None, "clipping would not touch it"


def spoiled(real, steps, value):
    """The loss function, but in these steps one row's losses are `value` times as large."""
    calls = iter(range(10_000))

    def loss_fn(model, batch):
        found = real(model, batch)
        if next(calls) in steps:
            return Sums(found.loss * value, found.nll * value)
        return found

    return loss_fn


def run(world, out, monkeypatch, steps, value, **flags):
    monkeypatch.setattr(packed, "token_loss", spoiled(packed.token_loss, steps, value))
    flags = {
        "epochs": 20,
        "max_steps": 24,
        "micro_batch_size": 4,
        "save_every": 4,
        "clip": 1.0,
    } | flags
    return main(command(world, out, **flags))


def test_a_spike_is_skipped_and_recorded(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        assert run(world, out, patch, {20}, 1000.0) == 0
    records = sorted((out / "incidents").iterdir())
    assert [path.name for path in records] == ["step_00000021.json"]
    record = json.loads(records[0].read_text())
    assert record["reason"].startswith("the gradient norm is")
    assert all(d["file"] in ("data/a.jsonl", "data/b.jsonl") for d in record["documents"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in lines if line.get("skipped")]
    assert skipped == [21]
    assert (out / "state" / "step_00000020").exists(), "what the replay starts from is kept"


def test_replay_gives_the_same_step(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(world, out, max_steps=10, epochs=10, save_every=4, keep=1)) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for step in (3, 9):  # before the one state that is kept, and after it
        capsys.readouterr()
        assert main(["replay", str(out), "--step", str(step), "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        logged = next(line for line in lines if line["step"] == step and "train_loss" in line)
        assert record["train_loss"] == logged["train_loss"]
        assert record["grad_norm"] == logged["grad_norm"]


def test_replay_passes_over_an_earlier_incident(world, tmp_path, monkeypatch, capsys):
    """As the run did: it is not applied; and standard output is the JSON alone."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        assert run(world, out, patch, {2}, float("nan"), save_every=0, max_steps=6) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    capsys.readouterr()
    monkeypatch.setattr(packed, "token_loss", spoiled(packed.token_loss, {2}, float("nan")))
    assert main(["replay", str(out), "--step", "5", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["train_loss"] == next(x["train_loss"] for x in lines if x["step"] == 5)
    assert len(list((out / "incidents").iterdir())) == 1


@pytest.mark.parametrize(
    ("steps", "flags", "at"),
    [({2}, {"on_spike": "stop"}, 3), ({4, 5, 6}, {}, 7)],
)
def test_stop(world, tmp_path, monkeypatch, capsys, steps, flags, at):
    """A NaN ends the run at once if so wanted, else the third in a row does."""
    out = tmp_path / "out"
    assert run(world, out, monkeypatch, steps, float("nan"), **flags) == 2
    told = capsys.readouterr().err
    assert f"stopped at step {at}" in told
    assert f"step_{at:08d}.json" in told
    record = json.loads((out / "incidents" / f"step_{at:08d}.json").read_text())
    assert record["train_loss"] == "nan"
    assert record["replay"] == f"whet replay {out} --step {at}"


def test_two_in_a_row_do_not_stop(world, tmp_path, monkeypatch):
    assert run(world, tmp_path / "out", monkeypatch, {4, 5, 8, 9}, float("nan")) == 0
    from safetensors.numpy import load_file

    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.isfinite(value).all() for value in weights.values())
