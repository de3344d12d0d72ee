"""Real processes: two ranks give the losses that one gives, and a killed run loses nothing."""

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

import whet
from whet.doctor.subject import BOUNDS, Finding, Subject, judge, skipped, worse
from whet.model.decoder import Transformer

AGREE = "two ranks give the losses of one"
RESUMED = "a killed and resumed run ends as an untouched one"
STEPS = 8
KILLED_AT = 2
BATCH = 4
PROCESS_S = 900.0
"""Longest time for one process of a few steps; then it is a hang."""


def processes_agree(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """The same steps by `whet sft` in one process, in two, and killed on the way; CPU, float32."""
    if subject.is_large and not isinstance(subject.model, Transformer):
        why = "too large for processes of its own, and only Whet's own families can be cut"
        yield from skipped(why, AGREE, RESUMED)
        return
    one, two, killed = (subject.scratch / name for name in ("one", "two", "killed"))
    tell(f"{STEPS} steps, one process")
    run(command(subject, one))
    tell(f"{STEPS} steps, two processes")
    run(command(subject, two), ranks=2)
    note = f"{STEPS} steps of {BATCH} rows, gloo on CPU. {subject.small_model()[1]}".rstrip(". ")
    bound = BOUNDS[torch.float32].gradient
    yield judge(AGREE, metric_difference(one, two), bound, note)
    tell("a run that is killed")
    words = [*command(subject, killed), "--save_every", "1", "--resume"]
    if not kill(words, lambda: (killed / "state" / f"step_{KILLED_AT:08d}").exists()):
        yield from skipped("the run ended before it could be killed", RESUMED)
        return
    run(words)
    files = ("metrics.jsonl", "ledger.bin", "model.safetensors")
    different = [n for n in files if (one / n).read_bytes() != (killed / n).read_bytes()]
    note = f"by SIGKILL after step {KILLED_AT}; {', '.join(different or files)}"
    yield judge(RESUMED, len(different), 0, note)


def command(subject: Subject, out: Path) -> list[str]:
    """The words after `whet` of a run of a few steps."""
    places = {"model": subject.small_model()[0], "data": subject.packed_file(), "out": out}
    words = (
        f"--lr 1e-4 --schedule constant --warmup 0 --epochs {STEPS} --max_steps {STEPS} "
        f"--batch_size {BATCH} --micro_batch_size 1 --eval_every 0 --samples 0 --save_every 0 "
        "--precision float32 --device cpu"
    )
    given = [word for key, path in places.items() for word in (f"--{key}", str(path))]
    return ["sft", *given, *words.split()]


def run(words: list[str], ranks: int = 1) -> None:
    """`whet` in a process of its own, with more ranks under torchrun, to its end.

    Raises ChildProcessError with the last words of a process that fails or hangs.
    """
    process, log = start(words, ranks)
    try:
        code: int | None = process.wait(PROCESS_S)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end(process)
    if code != 0:
        ended = f"did not end in {PROCESS_S:.0f} s" if code is None else f"ended with code {code}"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if "error" in line.lower()] or lines or ["nothing"]
        raise ChildProcessError(f"{ranks} process(es) {ended}: {said[-1].strip()[:300]}")


def kill(words: list[str], when: Callable[[], bool]) -> bool:
    """Start `whet`, and kill it as soon as `when` is true; whether it was killed."""
    process, _ = start(words)
    until = time.monotonic() + PROCESS_S
    while process.poll() is None and not when() and time.monotonic() < until:
        time.sleep(0.002)
    end(process)
    return process.returncode == -signal.SIGKILL


def start(words: list[str], ranks: int = 1) -> tuple[subprocess.Popen, Path]:
    """`whet` in a process of its own, and the file that it prints to."""
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
    return process, log


def end(process: subprocess.Popen) -> None:
    """Kill the process and its ranks, if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
