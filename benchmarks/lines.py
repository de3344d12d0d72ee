"""What benchmarks print: one JSON line a side, with versions, machine, date, median and spread."""

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def spread(name: str, values: Sequence[float], digits: int = 1) -> dict[str, float]:
    """Median, minimum and maximum of `values`, under `name`, `name`_min and `name`_max."""
    found = {
        name: statistics.median(values),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
    }
    return {key: round(value, digits) for key, value in found.items()}


def origin(device: str = "cpu", versions: dict[str, str] | None = None) -> dict[str, Any]:
    """Where a number comes from: versions, machine, threads, date. `versions` adds a peer's own."""
    cuda = device.startswith("cuda")
    return {
        "versions": {"python": platform.python_version(), **installed("torch"), **(versions or {})},
        "machine": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def installed(*packages: str) -> dict[str, str]:
    """The versions of those of `packages` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Cores, the processor's name, and what of its vector instructions matters for products."""
    name, sets = platform.machine(), list[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8").partition("\n\n")[0]
        found = dict(map(str.strip, line.split(":", 1)) for line in text.splitlines())
        name = found.get("model name", name)
        sets = [each for each in INSTRUCTIONS if each in found.get("flags", "").split()]
    return ", ".join([f"{os.cpu_count()} cores", name, *sets])


def cpu_of(process: int | str, children: bool = False) -> float:
    """Processor seconds that a running process has used, all its threads; with `children`, those of
    its ended children as well. From /proc/PID/stat: proc(5), fields 14 to 17."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if children else 13])) / os.sysconf("SC_CLK_TCK")


def emit(line: dict[str, Any], out: Path | None) -> None:
    """Print `line`, and append it to the file `out`."""
    text = json.dumps(line)
    print(text, flush=True)
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
