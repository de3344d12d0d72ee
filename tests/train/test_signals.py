"""SIGTERM and SIGINT in real processes: save, leave, exit code; a second signal leaves at once."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.numerics.test_layouts import command
from tests.processes import start, start_ranks, wait
from whet.train.state import newest_valid, read_facts

LONG = {"epochs": 100_000, "max_steps": 100_000, "eval_every": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    tiny.model_directory(folder / "base")
    tiny.packed_file(folder / "train.h5", n_rows=8)
    tiny.packed_file(folder / "dev.h5", n_rows=3, seed=1)
    tiny.packed_file(folder / "large_dev.h5", n_rows=30_000, seed=2)
    problem = json.dumps({"question": "How many?", "answer": "#### 1"}) + "\n"
    (folder / "problems.jsonl").write_text(problem * 2000)
    return folder


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def heeds_signals(process) -> bool:
    """Whether the process handles SIGTERM by now; before, it would just die."""
    caught = Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def steps_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("train_loss") if path.exists() else 0


def two_at_work(world: Path, out: Path, **flags) -> tuple[list, list[Path]]:
    """Two ranks that have taken some steps, and their logs."""
    words = command(world, out, **LONG, **flags)
    ranks, logs = start_ranks([words], size=2, folder=out.parent)
    until(lambda: steps_logged(out) >= 3)
    return ranks, logs


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_saves_and_leaves(world, tmp_path, number, code):
    out, log = tmp_path / "out", tmp_path / "log"
    process = start([command(world, out, **LONG)], log=log)
    until(lambda: steps_logged(out) >= 3)
    os.kill(process.pid, number)
    assert wait([process], [log], 30) == [code]
    state, passed_over = newest_valid(out / "state")
    assert passed_over == []
    assert read_facts(state).step == steps_logged(out) >= 3


def test_one_rank_of_two_is_asked(world, tmp_path):
    """In a training step: both save the same step and leave."""
    out = tmp_path / "out"
    ranks, logs = two_at_work(world, out)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert wait(ranks, logs, 30) == [143, 143]
    state, passed_over = newest_valid(out / "state")
    assert passed_over == []
    assert read_facts(state).step == steps_logged(out) >= 3


def test_during_an_evaluation(world, tmp_path):
    """An evaluation that takes minutes does not delay the save, and is made again later."""
    out, log = tmp_path / "out", tmp_path / "log"
    flags = LONG | {"dev": world / "large_dev.h5", "micro_batch_size": 1}
    process = start([command(world, out, **flags)], log=log)
    until(lambda: heeds_signals(process))
    time.sleep(0.5)
    assert steps_logged(out) == 0, "still in the first evaluation"
    os.kill(process.pid, signal.SIGTERM)
    begin = time.monotonic()
    assert wait([process], [log], 30) == [143]
    assert time.monotonic() - begin < 20
    facts = read_facts(newest_valid(out / "state")[0])
    assert (facts.step, facts.evaluated) == (0, -1)
    assert (out / "metrics.jsonl").read_text() == ""


DEV_LOSS = {"dev": "large_dev.h5"}
ANSWERS = {"gsm8k_dev": "problems.jsonl", "gsm8k_limit": 2000}


@pytest.mark.parametrize(
    ("evaluation", "shard"),
    [
        pytest.param(DEV_LOSS, True, id="dev_loss-fsdp"),
        pytest.param(ANSWERS, False, id="gsm8k-ddp"),
        pytest.param(DEV_LOSS, False, id="dev_loss-ddp", marks=pytest.mark.slow),
        pytest.param(ANSWERS, True, id="gsm8k-fsdp", marks=pytest.mark.slow),
    ],
)
def test_during_an_evaluation_on_two_ranks(world, tmp_path, evaluation, shard):
    """One of them is asked; both save and leave, long before the evaluation would end."""
    out = tmp_path / "out"
    paths = {k: world / v if isinstance(v, str) else v for k, v in evaluation.items()}
    flags = LONG | {"micro_batch_size": 1} | paths | ({"shard": True} if shard else {})
    ranks, logs = start_ranks([command(world, out, **flags)], size=2, folder=tmp_path)
    until(lambda: all(map(heeds_signals, ranks)))
    time.sleep(0.5)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert wait(ranks, logs, 60) == [143, 143]
    assert "--grace_seconds are over" not in "".join(log.read_text() for log in logs)
    facts = read_facts(newest_valid(out / "state")[0])
    assert (facts.step, facts.evaluated) == (0, -1)
    assert (out / "metrics.jsonl").read_text() == ""


def test_a_second_signal_leaves_at_once(world, tmp_path):
    """The first one waits for a forward pass that never ends."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start([command(world, out, **LONG)], log=log)
    until(lambda: steps_logged(out) >= 1)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    assert wait([process], [log], 10)[0] in (130, 143)


def test_grace_seconds_are_a_bound(world, tmp_path):
    """With no time to save, the process still leaves, with the code of the signal."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start([command(world, out, grace_seconds=0.0, **LONG)], log=log)
    until(lambda: steps_logged(out) >= 1)
    os.kill(process.pid, signal.SIGTERM)
    assert wait([process], [log], 10) == [143]


def test_a_dead_rank_ends_the_others(world, tmp_path):
    """Killed without a word, one rank of two: the other ends by itself, and not with success."""
    out = tmp_path / "out"
    ranks, logs = two_at_work(world, out, rank_timeout=20)
    os.kill(ranks[1].pid, signal.SIGKILL)
    codes = wait(ranks, logs, 60)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)


def test_a_rank_that_hangs_ends_the_others(world, tmp_path):
    """Stopped, not dead, one rank of two: the other waits --rank_timeout seconds and no longer."""
    out = tmp_path / "out"
    ranks, _ = two_at_work(world, out, rank_timeout=5)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        ranks[0].join(60)
        assert ranks[0].exitcode not in (0, None)
    finally:
        for process in ranks:
            process.kill()
            process.join()
