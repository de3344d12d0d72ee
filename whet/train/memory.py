"""What this process holds and may hold: of the GPU where there is one, else of the machine.

All in bytes. On a CPU it is the resident memory, with Python and the libraries, as the kernel
counts it; on a GPU what torch has allocated there, without the context and the allocator's spare.
"""

import contextlib
import ctypes
from pathlib import Path

import torch

CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

# mallopt(3): https://man7.org/linux/man-pages/man3/mallopt.3.html
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed(device: torch.device) -> None:
    """Let the C library keep freed memory for what comes next, where tensors live in it.

    By default glibc returns each large block to the kernel and gets it back page by page, zeroed,
    at every step. docs/performance.md has the measurement.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


def peak_bytes(device: torch.device) -> int:
    """The most that was held at a time since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_bytes(device: torch.device) -> int:
    """What there is: the GPU's memory, or what the machine has free and the cgroup allows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    for path in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number and no limit
            limits.append(int(path.read_text()))
    return min(limits)
