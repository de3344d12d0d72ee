"""`--profile`: where the time of a few steps goes.

Writes `profile/trace.json.gz` in the run folder, a Chrome trace that https://ui.perfetto.dev opens,
and prints the operations that took the most time. Profiled steps are slower than others.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from whet.errors import UserError
from whet.progress import say
from whet.train.run import RunFolder

PASSED = 2
"""Steps before: the first ones make memory, kernels and compiled code."""
WARM_UP = 1
"""Steps that are profiled and thrown away: starting the profiler takes time itself."""
KEPT = 3
"""Steps in the trace."""
LARGEST = 10
NEEDED = PASSED + WARM_UP + KEPT


def check_profile(steps: int) -> None:
    """Raise UserError if a new run has too few steps to be profiled."""
    if steps < NEEDED:
        raise UserError(f"--profile: needs {NEEDED} steps, this run has {steps}")


@contextmanager
def profiled(run: RunFolder, steps: int) -> Iterator[Callable[[], Any]]:
    """Yields what to call after each step; rank 0 profiles, if at least `NEEDED` of them follow."""
    if not run.ranks.first or steps < NEEDED:
        yield lambda: None
        return
    kinds = [ProfilerActivity.CPU]
    if run.ranks.device.type == "cpu":  # torch 2.13 reports its start and stop, and nothing else
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if run.ranks.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)

    def ready(profiler: Any) -> None:
        path = run.path / "profile" / "trace.json.gz"
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        say("\n".join(table(profiler.key_averages(), run.ranks.device)))
        say(f"the trace of {KEPT} steps is {path}: open it at https://ui.perfetto.dev")

    plan = schedule(wait=PASSED, warmup=WARM_UP, active=KEPT, repeat=1)
    with profile(activities=kinds, schedule=plan, on_trace_ready=ready) as profiler:
        yield profiler.step


def table(averages: Sequence[Any], device: torch.device) -> list[str]:
    """The largest operations by their own time (without what they call), most first."""

    def own(item: Any) -> float:
        gpu = device.type == "cuda"
        return item.self_device_time_total if gpu else item.self_cpu_time_total

    total = sum(map(own, averages)) or 1.0
    lines = [f"{'share':>6}  {'ms a step':>10}  {'calls a step':>12}  operation"]
    for item in sorted(averages, key=own, reverse=True)[:LARGEST]:
        ms = own(item) / 1000 / KEPT
        share = f"{100 * own(item) / total:.1f} %"
        lines.append(f"{share:>6}  {ms:>10,.1f}  {item.count / KEPT:>12,.0f}  {item.key}")
    return lines
