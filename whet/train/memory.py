"""What this process holds and may hold: of the GPU where there is one, else of the machine.

All in bytes. On a CPU it is the resident memory, with Python and the libraries, as the kernel
counts it; on a GPU what torch has allocated there, without the context and the allocator's spare.
"""

import contextlib
from pathlib import Path

import torch

CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


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
