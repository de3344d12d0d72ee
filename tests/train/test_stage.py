"""What a stage may ask of the loop, tried with a toy: one number w, pulled towards goals.

Its documents lie in no packed file, its batches are made from the current weights, it logs numbers
of its own, and the best model is the one with the highest score.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.processes import CONTEXT, free_port, start_server, wait
from whet.data.batches import Batch, make_batch, micro_batch_count, micro_batches, per_document
from whet.data.store import Rows
from whet.flags.training import TrainSettings
from whet.train.distributed import Ranks
from whet.train.ledger import RECORD
from whet.train.session import run_stage
from whet.train.signals import Interrupted
from whet.train.stage import Evaluation, Stage, Sums

ROWS, T = 6, 3


@dataclass
class Goals:
    """Six rows of one document each; no file holds them."""

    fingerprint: str = "goals"

    def __len__(self) -> int:
        return ROWS

    def numbers(self, rows: np.ndarray, segments: np.ndarray) -> np.ndarray:
        return 10 * rows + segments

    def places(self, numbers: np.ndarray) -> list[dict]:
        return [{"file": "goals", "line": int(number)} for number in numbers]

    def find(self, file: str, line: int) -> np.ndarray:
        return np.array([line])


class Number(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self) -> torch.Tensor:
        return self.w.sum()


def loss_fn(model: nn.Module, batch: Batch) -> Sums:
    """Half the squared distance to each document's goal, which stands in `extra`."""
    count = batch.extra["goal"].shape[1] - 1
    real = per_document(batch.weight, batch.segments, count) > 0  # (B, S + 1)
    loss = (0.5 * (model() - batch.extra["goal"]).square() * real).sum()
    named = {"goal": ((batch.extra["goal"] * real).sum(), real.sum())}
    named["never"] = (loss.detach(), torch.zeros(()))
    return Sums(loss, batch.weight.clone(), named)


def build(config: TrainSettings, ranks: Ranks, scores=(1.0, 5.0, 3.0), interrupt=False) -> Stage:
    model = Number()
    goals = torch.zeros(ROWS, 2)
    asked = []

    def before_step(step, now, ranks, stop):
        """Each row's goal is one above the current number, and the row's number above that."""
        asked.append(step)
        if interrupt and step == 3 and 3 not in asked[:-1]:
            raise Interrupted
        goals[:, 1] = model.w.detach() + 1 + torch.arange(ROWS)
        return {"seen": model.w.item()}

    def batches(step):
        rows = np.arange(ROWS)[ranks.rank :: ranks.size]
        ones = np.ones((len(rows), T), np.int32)
        whole = make_batch(Rows(ones, ones.astype(np.float32), ones), rows, total=float(ROWS))
        whole = replace(whole, extra={"goal": goals[rows], "place": torch.ones(len(rows), T)})
        return micro_batches(
            whole,
            config.micro_batch_size,
            micro_batch_count(ROWS, ranks.size, config.micro_batch_size),
        )

    def evaluate(now, ranks, stop):
        return Evaluation({"score": next(scores_left), "dev_loss": 1.0})

    def save_model(now, directory, metrics):
        if ranks.first:
            directory.mkdir(exist_ok=True)
            (directory / "w.json").write_text(json.dumps([model.w.item(), metrics]))

    scores_left = iter(scores)
    return Stage(
        model=model,
        documents=Goals(),
        total_steps=config.max_steps,
        batches=batches,
        loss_fn=loss_fn,
        evaluate=evaluate,
        save_model=save_model,
        before_step=before_step,
        best="score",
        higher_is_better=True,
    )


def settings(out: Path, **flags) -> TrainSettings:
    values = {"lr": 0.1, "warmup": 0.0, "schedule": "constant", "clip": 0.0, "batch_size": ROWS}
    values |= {"max_steps": 4, "eval_every": 2, "precision": "float32", "quiet": True}
    return TrainSettings(out=out, **(values | flags))


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_batches_come_from_the_current_weights(tmp_path):
    """A goal that was read one step ahead would be nearer: the gradient would not be -3.5."""
    assert run_stage(settings(tmp_path / "run"), "toy", build) == 0
    steps = [line for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert [line["grad_norm"] for line in steps] == [3.5] * 4
    assert [line["seen"] for line in steps] == pytest.approx([0.0, 0.1, 0.2, 0.3], abs=1e-6)


def test_named_sums_are_logged_as_means(tmp_path):
    """Over all micro-batches, filled-up rows not counted; a mean over nothing is left out."""
    for size in (6, 4, 1):
        assert run_stage(settings(tmp_path / f"{size}", micro_batch_size=size), "toy", build) == 0
        steps = [line for line in metrics(tmp_path / f"{size}") if "train_loss" in line]
        assert [line["goal"] - line["seen"] for line in steps] == pytest.approx([3.5] * 4)
        assert all("never" not in line for line in steps)


def test_the_best_model_is_the_one_with_the_highest_score(tmp_path):
    assert run_stage(settings(tmp_path / "run"), "toy", build) == 0
    w, found = json.loads((tmp_path / "run" / "best" / "w.json").read_text())
    assert found["score"] == 5.0
    assert w == pytest.approx(0.2, abs=1e-6)


def test_a_score_that_is_no_number_is_not_the_best(tmp_path):
    def made(config, ranks):
        return build(config, ranks, scores=(math.nan, math.nan, -2.0))

    assert run_stage(settings(tmp_path / "run"), "toy", made) == 0
    _, found = json.loads((tmp_path / "run" / "best" / "w.json").read_text())
    assert found["score"] == -2.0


def test_the_ledger_asks_the_stage_for_its_documents(tmp_path):
    assert run_stage(settings(tmp_path / "run"), "toy", build) == 0
    records = np.fromfile(tmp_path / "run" / "ledger.bin", RECORD)
    assert sorted(records["document"][records["step"] == 2]) == [1, 11, 21, 31, 41, 51]


def test_other_documents_are_refused_on_resume(tmp_path, capsys):
    assert run_stage(settings(tmp_path / "run", save_every=2), "toy", build) == 0

    def other(config, ranks):
        return replace(build(config, ranks), documents=Goals("other goals"))

    with pytest.raises(Exception, match="is not the file that this run started with"):
        run_stage(settings(tmp_path / "run", save_every=2, resume=True), "toy", other)


def test_a_signal_while_batches_are_made(tmp_path):
    """The state of the step before is saved, and the run goes on from there as if untouched."""

    def cut_short(config, ranks):
        return build(config, ranks, interrupt=True)

    assert run_stage(settings(tmp_path / "whole"), "toy", build) == 0
    out = tmp_path / "run"
    assert run_stage(settings(out), "toy", cut_short) == 128 + 15
    assert max(line["step"] for line in metrics(out)) == 3

    def rest(config, ranks):
        return build(config, ranks, scores=(3.0,))

    assert run_stage(settings(out, resume=True), "toy", rest) == 0
    assert metrics(out) == metrics(tmp_path / "whole")
    assert (out / "w.json").read_text() == (tmp_path / "whole" / "w.json").read_text()


def as_a_rank(rank: int, port: int, out: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert run_stage(settings(out, micro_batch_size=2), "toy", build) == 0


def test_two_ranks_log_the_numbers_of_one(tmp_path):
    assert run_stage(settings(tmp_path / "one"), "toy", build) == 0
    start_server()
    port = free_port()
    ranks = [CONTEXT.Process(target=as_a_rank, args=(r, port, tmp_path / "two")) for r in range(2)]
    for process in ranks:
        process.start()
    assert wait(ranks, [], 60) == [0, 0]
    for found, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected)


def test_micro_batches_must_agree_on_their_names(tmp_path):
    def made(config, ranks):
        stage, calls = build(config, ranks), []

        def uneven(model, batch):
            calls.append(batch)
            found = loss_fn(model, batch)
            return replace(found, named={}) if len(calls) == 2 else found

        return replace(stage, loss_fn=uneven)

    with pytest.raises(ValueError, match="micro-batches of a step name"):
        run_stage(settings(tmp_path / "run", micro_batch_size=2), "toy", made)
