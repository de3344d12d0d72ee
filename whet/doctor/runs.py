"""Real processes: two ranks on this machine give the losses that one gives."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import whet
from whet.doctor.finding import BOUNDS, Finding, judge, worse
from whet.doctor.subject import Subject

STEPS = 4
BATCH = 4
PROCESS_S = 900.0
"""Longest time for one process of a few steps; then it is a hang."""


def processes_agree(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """The same steps by `whet sft` in one process and in two; CPU, float32."""
    one, two = subject.scratch / "one", subject.scratch / "two"
    tell(f"{STEPS} steps, one process")
    run(command(subject, one))
    tell(f"{STEPS} steps, two processes")
    run(command(subject, two), ranks=2)
    note = f"{STEPS} steps of {BATCH} rows, gloo on CPU. {subject.small_model()[1]}".rstrip(". ")
    bound = BOUNDS[torch.float32].gradient
    yield judge("two ranks give the losses of one", metric_difference(one, two), bound, note)


def command(subject: Subject, out: Path) -> list[str]:
    """The words after `whet` of a run of a few steps."""
    flags = {
        "model": subject.small_model()[0],
        "data": subject.packed_file(),
        "out": out,
        "lr": 1e-4,
        "schedule": "constant",
        "warmup": 0,
        "epochs": STEPS,
        "max_steps": STEPS,
        "batch_size": BATCH,
        "micro_batch_size": 1,
        "eval_every": 0,
        "samples": 0,
        "save_every": 0,
        "precision": "float32",
        "device": "cpu",
    }
    return ["sft", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]


def run(words: list[str], ranks: int = 1) -> None:
    """`whet` in a process of its own, with more ranks under torchrun, to its end.

    Raises ChildProcessError with the last words of a process that fails or hangs.
    """
    log = Path(words[words.index("--out") + 1]).with_suffix(".log")
    package = str(Path(whet.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *(torchrun if ranks > 1 else []), "-m", "whet", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, "PYTHONPATH": path},
            start_new_session=True,
        )
    try:
        code: int | None = process.wait(PROCESS_S)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code != 0:
        ended = f"did not end in {PROCESS_S:.0f} s" if code is None else f"ended with code {code}"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if "error" in line.lower()] or lines or ["nothing"]
        raise ChildProcessError(f"{ranks} process(es) {ended}: {said[-1].strip()[:300]}")


def metric_difference(one: Path, other: Path) -> float:
    """The largest relative difference of a step's loss or gradient norm."""
    worst = 0.0
    for expected, found in zip(_steps(one), _steps(other), strict=True):
        for key in ("train_loss", "grad_norm"):
            size = max(abs(expected[key]), 1e-12)
            worst = worse(worst, abs(found[key] - expected[key]) / size)
    return worst


def _steps(out: Path) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "train_loss" in line]
