"""The same command gives the same bytes in every process, with more than one thread, too.

A process whose first vector function is called by two threads at once can compute another loss;
`whet/model/__init__.py` has the reason. Only a process that is new can show it.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.numerics.test_layouts import command

AT_ONCE = 2  # with two threads each: more than cores, so that first calls are interrupted


def digests(world: Path, out: Path, count: int) -> set[str]:
    """SHA-256 of the weights after one step, of `count` new processes with two threads each."""
    flags = {"max_steps": 1, "batch_size": 64, "micro_batch_size": 64}
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    found = set()
    for begin in range(0, count, AT_ONCE):
        outs = [out / f"{i}" for i in range(begin, min(begin + AT_ONCE, count))]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "whet", *command(world, each, **flags)], env=environment
            )
            for each in outs
        ]
        assert [process.wait(300) for process in running] == [0] * len(outs)
        weights = [(each / "model.safetensors").read_bytes() for each in outs]
        found |= {hashlib.sha256(each).hexdigest() for each in weights}
    return found


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_every_process_gives_the_same_weights(tmp_path, count):
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=64)
    tiny.packed_file(tmp_path / "dev.h5", n_rows=1, seed=1)
    assert len(digests(tmp_path, tmp_path, count)) == 1
