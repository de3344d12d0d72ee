"""What a step frees is there for the next one: counted in page faults, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from whet.train.memory import cgroup_bytes

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


HELD = """
import resource, torch
from pathlib import Path
from whet.train.memory import keep_freed
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
keep_freed(torch.device("cpu"))
before, largest = resident(), torch.ones(40 * 2**20)
held = resident()
del largest
print(before, held, resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own")
def test_the_largest_blocks_are_given_back() -> None:
    """Kept, they would leave holes among the others: an eighth of the peak of training by row."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    before, held, after = map(int, done.stdout.split())
    assert held - before > 150e6
    assert after - before < 20e6


def cgroup(folder: Path, limit: str, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"memory.max": limit, **files}.items():
        (folder / name).write_text(content + "\n")


def test_the_limits_of_a_job_and_of_what_is_around_it(tmp_path: Path) -> None:
    """cgroup v2, two levels deep: free is the limit less what is used, files' pages aside."""
    own = tmp_path / "own"
    own.write_text("0::/slurm/job_1/step\n")
    root = tmp_path / "root"
    stat = {"memory.stat": "anon 5\ninactive_file 30"}
    cgroup(root / "slurm", "900", **{"memory.current": "500", **stat})
    cgroup(root / "slurm" / "job_1", "300", **{"memory.current": "100", **stat})
    cgroup(root / "slurm" / "job_1" / "step", "max", **{"memory.current": "100", **stat})
    assert sorted(cgroup_bytes(root, own)) == [230, 430]


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    """Its own cgroup is the root that it sees, whatever /proc calls it; cgroup v1."""
    (tmp_path / "own").write_text("5:cpu:/docker/x\n4:memory:/docker/x\n0::/\n")
    folder = tmp_path / "root" / "memory"
    stat = {"memory.stat": "inactive_file 1\ntotal_inactive_file 20"}
    limits = {"memory.limit_in_bytes": "800", "memory.usage_in_bytes": "100"}
    cgroup(folder, "max", **limits, **stat)
    assert cgroup_bytes(tmp_path / "root", tmp_path / "own") == [720]
    assert cgroup_bytes(tmp_path / "root", tmp_path / "none") == []
