"""Promise 4: a run that is killed and resumed, however often, equals one that was left alone.

What is compared, bit for bit: the final weights, the last resume state, and all files of the run
that a repetition would write again.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.numerics.test_layouts import command
from tests.processes import run_ranks, start, start_ranks, wait
from whet.cli import main
from whet.data.batches import global_batch_rows
from whet.data.store import PackedStore
from whet.stages import packed
from whet.stages.packed import batches_of_step
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


def in_a_save(out: Path, cache: Path) -> bool:
    return any((out / "state").glob(".saving_*"))


def in_an_evaluation(out: Path, cache: Path) -> bool:
    """The evaluation of step 9 is due and not yet logged; with its dev file it takes a second."""
    lines = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    return lines.endswith("}\n") and json.loads(lines.splitlines()[-1]).get("step") == 9


def in_the_first_compile(out: Path, cache: Path) -> bool:
    return any(cache.rglob("*.cpp"))


MOMENTS = {
    "save": (in_a_save, {"max_steps": 12}),
    "evaluation": (in_an_evaluation, {"max_steps": 12, "dev": "large_dev.h5"}),
    "compile": (in_the_first_compile, {"max_steps": 4, "compile": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_in_the_middle_of(world, tmp_path, moment):
    if moment == "compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile on a CPU needs g++")
    tiny.packed_file(world / "large_dev.h5", n_rows=100, seed=1, weighted=True)
    reached, own = MOMENTS[moment]
    flags = RUN | {"save_every": 1} | own
    if "dev" in flags:
        flags["dev"] = world / flags["dev"]
    for attempt in range(20):  # a save takes milliseconds: it may end between the look and the kill
        out, cache, log = tmp_path / f"{attempt}", tmp_path / f"cache{attempt}", tmp_path / "log"
        words = command(world, out, resume=True, **flags)
        process = start([words], log=log, environment={"TORCHINDUCTOR_CACHE_DIR": str(cache)})
        while not reached(out, cache) and process.is_alive():
            pass
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL and reached(out, cache):
            break
    else:
        pytest.fail(f"20 runs and none killed in the middle of a {moment}")
    assert wait([start([words], log=log)], [log], 400) == [0]
    alone = command(world, tmp_path / "alone", **flags)
    assert wait([start([alone], log=log)], [log], 400) == [0]
    for name in COMPARED:
        one, other = ((folder / name).read_bytes() for folder in (out, tmp_path / "alone"))
        assert one == other, name


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
    [{"lora_rank": 2, "lora_dropout": 0.3}, {"optimizer": "muon"}, {"precision": "bf16"}],
    ids=["dropout", "muon", "bf16"],
)
def test_random_state_and_every_optimizer(world, tmp_path, monkeypatch, flags):
    """A run that dies in its 15th step, by an error of its own, and is taken up again."""
    flags = RUN | {"max_steps": 24} | flags

    calls, real = iter(range(30)), packed.token_loss

    def dying(model, batch):
        next(calls)  # two micro-batches a step; the 31st call raises StopIteration
        return real(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(packed, "token_loss", dying)
        with pytest.raises(StopIteration):
            main(command(world, tmp_path / "out", **flags))
    assert main([*command(world, tmp_path / "out", **flags), "--resume"]) == 0
    assert main(command(world, tmp_path / "alone", **flags)) == 0
    for name in ("metrics.jsonl", "ledger.bin", "samples.jsonl"):
        one, other = ((tmp_path / run / name).read_bytes() for run in ("out", "alone"))
        assert one == other, name
    weights = [next((tmp_path / run).glob("*model.safetensors")) for run in ("out", "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("size", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_other_number_of_ranks(world, tmp_path, size):
    """Half the steps on 2 ranks, sharded; the rest on another number: the same up to rounding."""
    alone = RUN | {"precision": "float32"}
    stopped = command(world, tmp_path / "out", shard=True, **alone)
    ranks, logs = start_ranks([stopped], size=2, folder=tmp_path)
    until = time.monotonic() + 60
    while not list((tmp_path / "out" / "state").glob("step_*")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(ranks[0].pid, signal.SIGTERM)  # one rank is asked; all of them leave together
    assert wait(ranks, logs, 180) == [143, 143]
    flags = alone | ({"shard": True} if size > 1 else {})
    rest = command(world, tmp_path / "out", resume=True, **flags)
    assert run_ranks([rest], size=size, folder=tmp_path, timeout_s=600) == [0] * size
    assert main(command(world, tmp_path / "one", **alone)) == 0
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "one"))
    worst = max(float(np.abs(two[name] - value).max()) for name, value in one.items())
    print(f"\n2 ranks, then {size}: weights differ by at most {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.parametrize("step", [0, 3, 17])
def test_a_global_batch_is_the_same_for_any_ranks_and_any_start(world, step):
    """Promise 5, from the stage's own side: the ranks' rows together are the global batch."""
    store = PackedStore(world / "train.h5")
    config = SimpleNamespace(overfit_rows=None, batch_size=4, micro_rows=2, seed=3)
    for size in (1, 2, 3, 5):
        shares = [
            batches_of_step(step, config=config, store=store, ranks=Ranks(rank, size))
            for rank in range(size)
        ]
        assert len({len(share) for share in shares}) == 1, "equally many backward passes"
        rows = np.concatenate([batch.rows for share in shares for batch in share])
        assert sorted(rows[rows >= 0]) == sorted(global_batch_rows(7, 4, 3, step))
        assert len({batch.total for share in shares for batch in share}) == 1
