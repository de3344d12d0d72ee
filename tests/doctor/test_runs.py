"""The check that runs processes: on a healthy Whet, and on one that is broken on purpose."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests import processes
from whet.doctor import runs
from whet.doctor.command import examine
from whet.doctor.runs import metric_difference

LOSSES = "two ranks give the losses of one"
KILLED = "a killed and resumed run ends as an untouched one"

BREAK = """
import contextlib
from whet.train import distributed

distributed.sync_gradients = lambda model, now: (  # each rank goes its own way
    model.no_sync() if distributed.is_replicated(model) else contextlib.nullcontext()
)
"""


def verdicts(subject) -> dict[str, str]:
    rows = examine(subject, [("processes", runs.processes_agree)])
    return {row["claim"]: row["verdict"] for row in rows}


def run(words, ranks: int = 1) -> None:
    """By processes that need not import torch again."""
    out = Path(words[words.index("--out") + 1])
    assert processes.run_ranks([words], size=ranks, folder=out.parent) == [0] * ranks


def kill(words, when) -> bool:
    process = processes.start([words], log=Path(words[words.index("--out") + 1]).parent / "log")
    while process.is_alive() and not when():
        time.sleep(0.001)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_healthy(subject, monkeypatch):
    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(runs, "kill", kill)
    assert verdicts(subject) == {LOSSES: "pass", KILLED: "pass"}


def test_a_resumed_run_that_differs(subject, monkeypatch):
    def reseeded(words, ranks=1) -> None:
        is_killed = words[words.index("--out") + 1].endswith("killed")
        run([*words, *(["--seed", "1"] if is_killed else [])], ranks)

    monkeypatch.setattr(runs, "run", reseeded)
    monkeypatch.setattr(runs, "kill", lambda words, when: True)
    assert verdicts(subject) == {LOSSES: "pass", KILLED: "fail"}


@pytest.mark.slow
def test_healthy_under_torchrun(subject):
    assert verdicts(subject) == {LOSSES: "pass", KILLED: "pass"}


@pytest.mark.slow
def test_gradients_that_stay_at_home(subject, tmp_path, monkeypatch):
    """Python imports `sitecustomize` in every process: each of them is broken."""
    (tmp_path / "sitecustomize.py").write_text(BREAK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert verdicts(subject) == {LOSSES: "fail", KILLED: "pass"}


def test_a_process_that_fails_is_told_with_its_words(subject, tmp_path):
    words = runs.command(subject, tmp_path / "out")
    words[words.index("--lr") + 1] = "-1"
    with pytest.raises(ChildProcessError, match="ended with code 2: whet: error: --lr -1"):
        runs.run(words)


def test_a_run_that_does_not_start_fails(subject, monkeypatch):
    def died(*_: object, **__: object) -> None:
        raise ChildProcessError("as an example")

    monkeypatch.setattr(runs, "run", died)
    assert set(verdicts(subject).values()) == {"fail"}


def test_what_is_compared(tmp_path):
    for name, factor in (("one", 1.0), ("two", 1.0), ("three", 1.001)):
        (tmp_path / name).mkdir()
        loss = {"step": 1, "train_loss": 2.0 * factor, "grad_norm": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(loss) + "\n")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert metric_difference(one, two) == 0
    assert metric_difference(one, three) == pytest.approx(1e-3)
