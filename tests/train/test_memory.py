"""What a step frees is there for the next one: counted in page faults, in a process of its own."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from whet.train.memory import keep_freed
if sys.argv[1] == "keep":
    keep_freed(torch.device("cpu"))
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(4 * 2**20) for _ in range(8)]  # 16 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
print(step(), min(step() for _ in range(3)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own")
def test_large_blocks_are_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, "keep"], capture_output=True, text=True, check=True
    )
    first, later = map(int, done.stdout.split())
    assert first > 8 * 1000  # 4096 pages a block, unless the system gives larger ones
    assert later < first / 20
