"""torchrun itself: the documented script on two ranks, and a killed rank that comes back."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.numerics.test_layouts import command
from whet.cli import main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_sft.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    tiny.model_directory(folder / "base")
    tiny.packed_file(folder / "train.h5", n_rows=8)
    tiny.packed_file(folder / "dev.h5", n_rows=3, seed=1)
    return folder


def torchrun(words: list[str], log: Path, *options: str) -> subprocess.Popen:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(log, "w") as out:
        return subprocess.Popen(
            [*start, *options, str(SCRIPT), *words[1:]],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def workers(out: Path) -> list[int]:
    """The processes that train into `out`, without torchrun itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(out) in words and "torch.distributed.run" not in words:
            found.append(int(path.parent.name))
    return found


def assert_equal_weights(one: Path, other: Path) -> None:
    weights, expected = (load_file(path / "model.safetensors") for path in (one, other))
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds ranks through /proc")
def test_a_killed_rank_brings_the_run_back(world, tmp_path):
    """--max_restarts: the run goes on from its last save and ends as if nothing had happened."""
    flags = {"epochs": 60, "max_steps": 120, "save_every": 10, "eval_every": 0}
    out, log = tmp_path / "out", tmp_path / "log"
    process = torchrun(command(world, out, **flags), log, "--max_restarts=2")
    try:
        end = time.monotonic() + 120
        while not list((out / "state").glob("step_*")):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.02)
        os.kill(max(workers(out)), signal.SIGKILL)
        assert process.wait(180) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = [line["step"] for line in steps if "train_loss" in line]
    assert numbers == list(range(1, 121)), "each step once"
    assert main(command(world, tmp_path / "one", **flags)) == 0
    assert_equal_weights(out, tmp_path / "one")


def test_a_problem_is_together(world, tmp_path):
    words = command(world, tmp_path / "out", data=tmp_path / "nowhere.h5")
    process = torchrun(words, tmp_path / "log")
    assert process.wait(300) != 0
    told = (tmp_path / "log").read_text()
    assert told.count("whet: error:") == 1
    assert "nowhere.h5" in told
    assert "UserError" not in told
