"""The checks that run processes: on a healthy Whet, and on one that is broken on purpose."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests import processes
from whet.doctor import runs
from whet.doctor.command import examine
from whet.doctor.runs import Died, differing, metric_difference, weight_difference

LOSSES, WEIGHTS = "two ranks give the losses of one", "two ranks give the weights of one"
KILLED = "killed (-9) and resumed: the same weights"

BREAK = """
import contextlib
from whet.train import distributed, state

distributed.sync_gradients = lambda model, now: (  # each rank goes its own way
    model.no_sync() if distributed.is_replicated(model) else contextlib.nullcontext()
)
load = state.load_state


def forgetful(folder, model, optimizers, ranks):
    facts = load(folder, model, optimizers, ranks)
    for optimizer in optimizers:
        for entries in optimizer.state.values():
            entries["exp_avg"].zero_()
    return facts


state.load_state = forgetful
"""


def verdicts(subject) -> dict[str, str]:
    rows = examine(subject, [("processes", runs.processes_agree)])
    return {row["claim"]: row["verdict"] for row in rows}


def run(words, ranks: int = 1) -> None:
    """By processes that need not import torch again."""
    out = Path(words[words.index("--out") + 1])
    assert processes.run_ranks([words], size=ranks, folder=out.parent) == [0] * ranks


def run_and_kill(words, out: Path) -> int | None:
    (process,), _ = processes.start_ranks([words], size=1, folder=out.parent)
    while process.is_alive():
        if saved := sorted((out / "state").glob("step_*")):
            process.kill()
            process.join()
            return int(saved[-1].name[5:])
    return None


def test_healthy(subject, monkeypatch):
    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(runs, "run_and_kill", run_and_kill)
    assert verdicts(subject) == {LOSSES: "pass", WEIGHTS: "pass", KILLED: "pass"}


@pytest.mark.slow
def test_healthy_under_torchrun(subject):
    assert verdicts(subject) == {LOSSES: "pass", WEIGHTS: "pass", KILLED: "pass"}


@pytest.mark.slow
def test_gradients_that_stay_at_home_and_a_forgotten_moment(subject, tmp_path, monkeypatch):
    """Python imports `sitecustomize` in every process: each of them is broken."""
    (tmp_path / "sitecustomize.py").write_text(BREAK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert verdicts(subject) == {LOSSES: "fail", WEIGHTS: "fail", KILLED: "fail"}


def test_a_process_that_fails_is_told_with_its_words(subject, tmp_path):
    words = runs.command(subject, tmp_path / "out")
    words[words.index("--lr") + 1] = "-1"
    with pytest.raises(Died, match="ended with code 2: whet: error: --lr -1"):
        runs.run(words)


def test_a_run_that_does_not_start_fails_all_three(subject, monkeypatch):
    def died(*_: object, **__: object) -> None:
        raise Died("as an example")

    monkeypatch.setattr(runs, "run", died)
    assert set(verdicts(subject).values()) == {"fail"}


def test_what_is_compared(subject, tmp_path):
    """One number in a metrics file, one bit in a weight."""
    base = subject.saved_model()
    for name, factor in (("one", 1.0), ("two", 1.0), ("three", 1.001)):
        copy(base, tmp_path / name)
        loss = {"step": 1, "train_loss": 2.0 * factor, "grad_norm": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(loss) + "\n")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert metric_difference(one, two) == 0
    assert metric_difference(one, three) == pytest.approx(1e-3)
    change(one, 0, 1e-3)
    change(two, 0, 1e-3)
    assert differing(one, two) == 0
    assert weight_difference(one, two, base) == 0
    change(two, 5, 1e-3)
    assert differing(one, two) == 1
    assert weight_difference(one, two, base) == pytest.approx(1.0, rel=1e-3)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def change(directory: Path, place: int, by: float) -> None:
    values = load_file(directory / "model.safetensors")
    name = sorted(values)[0]
    values[name].reshape(-1)[place] += by
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
