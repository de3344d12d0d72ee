"""Promise 4: a run that is killed and resumed, however often, equals one that was left alone.

What is compared, bit for bit: the final weights, the last resume state, and all files of the run
that a repetition would write again.
"""

import hashlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.numerics.test_layouts import command
from tests.processes import free_port, start, wait
from whet.cli import main
from whet.data.batches import global_batch_rows
from whet.data.store import PackedStore
from whet.stages import sft
from whet.stages.sft import batches_of_step
from whet.train.distributed import Ranks

COMPARED = ("model.safetensors", "metrics.jsonl", "ledger.bin", "samples.jsonl")
RUN = {
    "epochs": 20,
    "max_steps": 40,
    "eval_every": 9,
    "save_every": 4,
    "samples": 2,
    "micro_batch_size": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny.model_directory(folder / "base")
    tiny.packed_file(folder / "train.h5", n_rows=7, weighted=True)
    tiny.packed_file(folder / "dev.h5", n_rows=5, seed=1, weighted=True)
    return folder


def digest(out: Path) -> dict[str, str]:
    """SHA-256 of what must not differ; the tensors of the last state among it."""
    found = {name: (out / name).read_bytes() for name in COMPARED}
    for path in (out / "state" / "step_00000040").glob("*.safetensors"):
        found |= {name: value.tobytes() for name, value in load_file(path).items()}
    assert any(name.endswith("exp_avg_sq") for name in found), "the last state is missing"
    return {name: hashlib.sha256(value).hexdigest() for name, value in found.items()}


@pytest.fixture(scope="module")
def alone(world) -> tuple[dict[str, str], float]:
    """The run that nobody touches, and how long its process takes."""
    out, log = world / "alone", world / "alone.log"
    begin = time.monotonic()
    assert wait([start([command(world, out, **RUN)], log=log)], [log], 120) == [0]
    return digest(out), time.monotonic() - begin


def killed_run(world: Path, out: Path, seconds: float, kills: int, seed: int) -> int:
    """Resume and kill -9 at random moments until `kills` hit, then let it end; the hits."""
    rng, log, hits = random.Random(seed), out.with_suffix(".log"), 0
    words = command(world, out, resume=True, **RUN)
    while hits < kills:
        process = start([words], log=log)
        process.join(rng.uniform(0.0, seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            hits += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()[-3000:]
        if process.exitcode == 0 and hits < kills:
            break  # it got to the end before it could be killed so often
    assert wait([start([words], log=log)], [log], 120) == [0]
    return hits


def test_three_kills(world, alone, tmp_path):
    expected, seconds = alone
    assert killed_run(world, tmp_path / "out", seconds, kills=3, seed=1) > 0
    assert digest(tmp_path / "out") == expected


@pytest.mark.slow
def test_thirty_kills(world, alone, tmp_path):
    expected, seconds = alone
    hits = 0
    for run in range(100):
        out = tmp_path / f"out{run}"
        hits += killed_run(world, out, seconds, kills=min(4, 30 - hits), seed=run)
        assert digest(out) == expected
        if hits == 30:
            return
    pytest.fail(f"only {hits} kills in 100 runs")


def test_resume_is_needed_and_ends_at_once_when_done(world, alone, tmp_path, capsys):
    words = command(world, world / "alone", **RUN)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "already holds a run" in told
    assert "--resume" in told
    assert main([*words, "--resume"]) == 0
    assert digest(world / "alone") == alone[0]


@pytest.mark.parametrize(
    "flags",
    [{"lora_rank": 2, "lora_dropout": 0.3}, {"optimizer": "muon"}],
    ids=["dropout", "muon"],
)
def test_random_state_and_every_optimizer(world, tmp_path, monkeypatch, flags):
    """A run that dies in its 15th step, by an error of its own, and is taken up again."""
    flags = RUN | {"max_steps": 24} | flags

    calls, real = iter(range(30)), sft.token_loss

    def dying(model, batch):
        next(calls)  # two micro-batches a step; the 31st call raises StopIteration
        return real(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "token_loss", dying)
        with pytest.raises(StopIteration):
            main(command(world, tmp_path / "out", **flags))
    assert main([*command(world, tmp_path / "out", **flags), "--resume"]) == 0
    assert main(command(world, tmp_path / "alone", **flags)) == 0
    for name in ("metrics.jsonl", "ledger.bin", "samples.jsonl"):
        one, other = ((tmp_path / run / name).read_bytes() for run in ("out", "alone"))
        assert one == other, name
    weights = [next((tmp_path / run).glob("*model.safetensors")) for run in ("out", "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_other_number_of_ranks(world, tmp_path):
    """Half the steps on 2 ranks, sharded; the rest on 1: the same weights up to rounding."""
    stopped = command(world, tmp_path / "out", shard=True, **RUN)
    ports, logs = [free_port()], [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = [start([stopped], log=logs[r], rank=r, size=2, ports=ports) for r in range(2)]
    until = time.monotonic() + 60
    while not list((tmp_path / "out" / "state").glob("step_*")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(ranks[0].pid, signal.SIGTERM)  # one rank is asked; all of them leave together
    assert wait(ranks, logs, 60) == [143, 143]
    assert main([*command(world, tmp_path / "out", **RUN), "--resume"]) == 0
    assert main(command(world, tmp_path / "one", **RUN)) == 0
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "one"))
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [0, 3, 17])
def test_a_global_batch_is_the_same_for_any_ranks_and_any_start(world, step):
    """Promise 5, from the stage's own side: the ranks' rows together are the global batch."""
    store = PackedStore(world / "train.h5")
    for size in (1, 2, 3, 5):
        shares = [
            batches_of_step(
                step,
                store=store,
                n_rows=7,
                batch_size=4,
                micro_batch_size=2,
                seed=3,
                ranks=Ranks(rank, size),
            )
            for rank in range(size)
        ]
        assert len({len(share) for share in shares}) == 1, "equally many backward passes"
        rows = np.concatenate([batch.rows for share in shares for batch in share])
        assert sorted(rows[rows >= 0]) == sorted(global_batch_rows(7, 4, 3, step))
        assert len({batch.total for share in shares for batch in share}) == 1
