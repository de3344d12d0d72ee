"""Real processes: two ranks give what one gives, a killed run ends as an untouched one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import whet
from whet.doctor.finding import BOUNDS, Finding, failed, judge, skipped, worse
from whet.doctor.subject import Subject
from whet.model.open import load_backbone_from_ckpt

STEPS = 6
BATCH = 4
PROCESS_S = 900.0
"""Longest time for one process of a few steps; then it is a hang."""
KILLS_TRIED = 3
MOVED_BOUND = 1e-3
"""Of the weights after `STEPS` steps, relative to how far they moved: AdamW divides a gradient by
its own size, so where it is next to nothing its rounding decides."""


class Died(Exception):  # noqa: N818 -- an answer, not an accident
    """A process of the check ended otherwise than it should."""


def processes_agree(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """One rank, two ranks, and a run killed and resumed: the same numbers; CPU, float32."""
    losses, weights = "two ranks give the losses of one", "two ranks give the weights of one"
    killed = "killed (-9) and resumed: the same weights"
    try:
        tell(f"{STEPS} steps, one process")
        one = subject.scratch / "one"
        run(command(subject, one))
    except Died as error:
        for claim in (losses, weights, killed):
            yield failed(claim, str(error))
        return
    try:
        tell(f"{STEPS} steps, two processes")
        two = subject.scratch / "two"
        run(command(subject, two), ranks=2)
        note = f"{STEPS} steps of {BATCH} rows, gloo on CPU. {subject.small_model()[1]}".rstrip(
            ". "
        )
        yield judge(losses, metric_difference(one, two), BOUNDS[torch.float32].gradient, note)
        moved = weight_difference(one, two, subject.small_model()[0])
        yield judge(weights, moved, MOVED_BOUND, f"relative to how far they moved, {note}")
    except Died as error:
        yield failed(losses, str(error))
        yield failed(weights, str(error))
    try:
        yield _killed_and_resumed(subject, one, killed, tell)
    except Died as error:
        yield failed(killed, str(error))


def _killed_and_resumed(
    subject: Subject, one: Path, claim: str, tell: Callable[[str], None]
) -> Finding:
    for attempt in range(KILLS_TRIED):
        tell("a process that is killed")
        out = subject.scratch / f"killed{attempt}"
        at = run_and_kill(command(subject, out), out)
        if at is None:
            continue
        tell("the process that resumes")
        run([*command(subject, out), "--resume"])
        note = f"killed after the save of step {at} of {STEPS}. {subject.small_model()[1]}"
        return judge(claim, float(differing(one, out)), 0, note.rstrip(". "))
    return skipped(claim, f"the run ended before it could be killed, {KILLS_TRIED} times")


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
        "save_every": 1,
        "precision": "float32",
        "device": "cpu",
    }
    return ["sft", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]


def start(words: list[str], log: Path, ranks: int = 1) -> subprocess.Popen:
    """`whet` in a process of its own; with more ranks under torchrun."""
    package = str(Path(whet.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    interpreter = [sys.executable, *(torchrun if ranks > 1 else [])]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*interpreter, "-m", "whet", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, "PYTHONPATH": path},
            start_new_session=True,
        )


def run(words: list[str], ranks: int = 1) -> None:
    """Run to the end. Raises Died with the last words of a process that fails or hangs."""
    log = Path(words[words.index("--out") + 1]).with_suffix(".log")
    process = start(words, log, ranks)
    try:
        code: int | None = process.wait(PROCESS_S)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _kill(process)
    if code != 0:
        ended = f"did not end in {PROCESS_S:.0f} s" if code is None else f"ended with code {code}"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if "error" in line.lower()] or lines or ["nothing"]
        raise Died(f"{ranks} process(es) {ended}: {told[-1].strip()[:300]}")


def run_and_kill(words: list[str], out: Path) -> int | None:
    """Start, kill -9 once a state is saved; its step, or None if the run came to its end first."""
    log = out.with_suffix(".log")
    process = start(words, log)
    until = time.monotonic() + PROCESS_S
    try:
        while process.poll() is None and time.monotonic() < until:
            saved = sorted((out / "state").glob("step_*"))
            if saved:
                _kill(process)
                break
            time.sleep(0.002)
        else:
            saved = []
    finally:
        _kill(process)
    if process.returncode == -signal.SIGKILL and saved:
        return int(saved[-1].name[5:])
    if process.returncode not in (0, -signal.SIGKILL):
        lines = log.read_text(errors="replace").splitlines() or ["nothing"]
        raise Died(f"ended with code {process.returncode}: {lines[-1][:300]}")
    return None


def _kill(process: subprocess.Popen) -> None:
    """End the process and its ranks, if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def metric_difference(one: Path, other: Path) -> float:
    """The largest relative difference of a step's loss or gradient norm."""
    worst = 0.0
    pairs = list(zip(_steps(one), _steps(other), strict=True))
    for expected, found in pairs:
        for key in ("train_loss", "grad_norm"):
            size = max(abs(expected[key]), 1e-12)
            worst = worse(worst, abs(found[key] - expected[key]) / size)
    return worst


def _steps(out: Path) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "train_loss" in line]


def weight_difference(one: Path, other: Path, base: Path) -> float:
    """Norm of the difference of two runs' weights over how far the first one moved."""
    apart = moved = 0.0
    before = dict(tensors(base))
    after = dict(tensors(other))
    for name, value in tensors(one):
        apart += float((value - after[name]).double().square().sum())
        moved += float((value - before[name]).double().square().sum())
    return (apart / moved) ** 0.5 if moved else float("inf")


def differing(one: Path, other: Path) -> int:
    """How many numbers differ, by bits, between the weights of two runs."""
    after = dict(tensors(other))
    return sum(
        int((value.view(torch.int32) != after[name].view(torch.int32)).sum())
        for name, value in tensors(one)
    )


def tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model directory by name, float32."""
    yield from load_backbone_from_ckpt(directory, quiet=True).state_dict().items()
