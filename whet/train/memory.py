"""What this process holds and may hold: of the GPU where there is one, else of the machine.

All in bytes. On a CPU it is the resident memory, with Python and the libraries, as the kernel
counts it; on a GPU what torch has allocated there, without the context and the allocator's spare.
"""

import contextlib
import ctypes
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")

# mallopt(3): https://man7.org/linux/man-pages/man3/mallopt.3.html
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed(device: torch.device) -> None:
    """Let the C library keep freed memory for what comes next, where tensors live in it.

    By default glibc returns each large block to the kernel and gets it back page by page, zeroed,
    at every step. Only blocks of 32 MiB and more go back: kept, these few, such as the embedding's
    gradient, would leave holes that nothing else fills. docs/performance.md has the measurement.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


def peak_bytes(device: torch.device) -> int:
    """The most that was held at a time since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_bytes(device: torch.device) -> int:
    """What there is: the GPU's memory, or what the machine has free and the cgroups leave."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    return min([*limits, *cgroup_bytes(CGROUPS, Path("/proc/self/cgroup"))])


def cgroup_bytes(root: Path, own: Path) -> list[int]:
    """What each memory limit of this process leaves: of its cgroup and of those around it.

    A job of SLURM or systemd has its limit some levels below `root`, a container at `root`. `own`
    lists the cgroups of this process. What the kernel holds of files does not count as used.
    https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/memory.html.
    """
    kinds = {
        "": (root, "memory.max", "memory.current", "inactive_file"),
        "memory": (
            root / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    }
    left = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, place = line.split(":", 2)
        for kind in kinds.keys() & set(controllers.split(",")):
            top, limit, used, files = kinds[kind]
            inside = top / place.strip("/")
            for folder in (inside, *inside.parents):
                if not folder.is_relative_to(top):
                    break
                with contextlib.suppress(OSError, ValueError):  # "max" is no number and no limit
                    most = int((folder / limit).read_text())
                    stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                    held = int((folder / used).read_text()) - int(stat.get(files, 0))
                    left.append(most - held)
    return left
