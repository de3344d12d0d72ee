"""Training speed and memory on CPU: Whet, TRL and a plain loop, same work, in turn, in one run.

    python -m benchmarks.bench_train --precision float32 --rounds 3

Each round runs every side once as a process of its own, so a slow minute of the machine meets all
of them. A process takes `--steps` optimizer steps of `--rows` rows of 1,024; the first is not
counted. Sides:

- whet: `whet sft`;
- plain: a loop as teaching code writes it (peers/plain_train.py);
- trl: TRL's SFTTrainer, packed, all rows of a step in one forward pass (peers/trl_train.py);
- trl_by_row: the same with one row a pass and the others accumulated. Without flash attention
  TRL's attention makes a mask over all tokens of a pass, so this is its faster way on a CPU;
- whet_by_row: `whet sft --micro_batch_size 1`, whose memory is compared with that of trl_by_row.

Printed is one JSON line a side: tokens/s (the documents' own tokens, without padding) as median,
minimum and maximum over all counted steps, the same for a second of processor time, which other
work on the machine disturbs less, and the peak memory of the process; then the ratios.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lines import cpu_of, emit, origin, spread
from benchmarks.workload import ROW, build

REPOSITORY = Path(__file__).resolve().parent.parent
BENCH = REPOSITORY / ".bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="rows in an optimizer step")
    parser.add_argument("--sides", nargs="+", default=list(SIDES))
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()

    work = BENCH / "work"
    build(work)
    prepare(work)
    runs = run_in_turn(
        args.sides,
        args.rounds,
        lambda side: SIDES[side](work, args.precision, args.steps, args.rows),
    )
    lines = {side: summary(side, args, runs[side]) for side in args.sides}
    ours = lines.get("whet")
    for side, line in lines.items():
        if ours and not side.startswith("whet"):
            times = compared(runs["whet"], runs[side])
            line |= spread("whet_is_times_faster", times, 2)
            by_cpu = ours["tokens_per_cpu_s"] / line["tokens_per_cpu_s"]
            line["whet_is_times_faster_by_cpu"] = round(by_cpu, 2)
            alike = lines.get("whet_by_row", ours) if side == "trl_by_row" else ours
            line["whet_needs_share_of_memory"] = round(alike["peak_gb"] / line["peak_gb"], 2)
        emit(line, args.out)


def run_in_turn(
    sides: Sequence[str], rounds: int, run: Callable[[str], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """What `run` measures of each side, in as many rounds of all sides."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            started = time.monotonic()
            runs[side].append(run(side))
            took = time.monotonic() - started
            print(f"round {number + 1}: {side} took {took:.0f} s", file=sys.stderr, flush=True)
    return runs


def prepare(work: Path) -> None:
    """Pack the same conversations with Whet's own command."""
    if not (work / "packed.h5").exists():
        words = ["prepare", "--data", "gsm8k.jsonl", "--tokenizer", "model"]
        words += ["--context_length", str(ROW), "--out", "packed.h5"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "whet", *words]
        subprocess.run(command, cwd=work, check=True, env=environment, stdout=sys.stderr)


def run_whet(work: Path, precision: str, steps: int, rows: int, by_row: bool) -> dict[str, Any]:
    """`whet sft` itself; its numbers are read from the run folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["sft", "--model", "model", "--data", "packed.h5", "--out", str(out), "--quiet"]
        words += ["--precision", precision, "--batch_size", str(rows), "--lr", "1e-5"]
        words += ["--micro_batch_size", str(1 if by_row else rows), "--max_steps", str(steps)]
        words += ["--eval_every", "0", "--save_every", "0", "--samples", "0"]
        command = [sys.executable, "-m", "whet", *words]
        peak, _, marks = run_process(command, work, out / "timing.jsonl")
        timing = read_lines(out / "timing.jsonl")
        metrics = [line for line in read_lines(out / "metrics.jsonl") if "train_loss" in line]
    seen = [0, *(line["tokens"] for line in metrics)]
    return {
        "seconds": [line["seconds"] for line in timing],
        "cpu_seconds": [b - a for a, b in itertools.pairwise([0.0, *marks])],
        "tokens": [b - a for a, b in itertools.pairwise(seen)],
        "losses": [line["train_loss"] for line in metrics],
        "peak_gb": peak,
        "versions": {},
    }


def run_plain(work: Path, precision: str, steps: int, rows: int) -> dict[str, Any]:
    return run_peer(Path(sys.executable), "plain_train.py", work, precision, steps, rows, [])


def run_trl(work: Path, precision: str, steps: int, rows: int, by_row: bool) -> dict[str, Any]:
    """TRL in an environment of its own, made from pinned versions if there is none."""
    python = BENCH / "trl" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(BENCH / "trl")], check=True)
        pins = REPOSITORY / "benchmarks" / "requirements-trl.txt"
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(pins)], check=True)
    more = ["--by_row"] if by_row else []
    try:
        return run_peer(python, "trl_train.py", work, precision, steps, rows, more)
    finally:
        shutil.rmtree(work / "trl", ignore_errors=True)


def run_peer(
    python: Path, script: str, work: Path, precision: str, steps: int, rows: int, more: list[str]
) -> dict[str, Any]:
    words = [str(python), str(REPOSITORY / "benchmarks" / "peers" / script), "--work", str(work)]
    words += ["--precision", precision, "--steps", str(steps), "--batch_size", str(rows), *more]
    peak, printed, _ = run_process(words, work)
    return {**json.loads(printed.splitlines()[-1]), "peak_gb": peak}


def run_process(
    words: list[str], folder: Path, watched: Path | None = None
) -> tuple[float, str, list[float]]:
    """Run to the end; returns the peak resident memory in GB, what it printed, and the processor
    seconds that it had used whenever the file `watched` had become a line longer."""
    marks: list[float] = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        child = subprocess.Popen(words, cwd=folder, stdout=out, stderr=err, env=environment)
        ended = 0
        while not ended:
            used = cpu_of(child.pid)
            lines = watched.read_bytes().count(b"\n") if watched and watched.exists() else 0
            marks += [used] * (lines - len(marks))
            ended, status, usage = os.wait4(child.pid, os.WNOHANG if watched else 0)
            time.sleep(0.02)
        child.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, err):
            stream.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(words)}\nfailed:\n{err.read()[-3000:]}")
        return usage.ru_maxrss * 1024 / 1e9, out.read(), marks


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rates(run: dict[str, Any], clock: str) -> list[float]:
    """Tokens a second of the counted steps."""
    return [n / s for n, s in list(zip(run["tokens"], run[clock], strict=True))[1:]]


def compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[float]:
    """How many times faster we were in each round: both ran next to each other."""
    return [
        sum(rates(a, "seconds"))
        / len(rates(a, "seconds"))
        * len(rates(b, "seconds"))
        / sum(rates(b, "seconds"))
        for a, b in zip(ours, theirs, strict=True)
    ]


def summary(side: str, args: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One side's numbers over all its processes."""
    by_clock = {
        clock: [rate for run in runs for rate in rates(run, clock)]
        for clock in ("seconds", "cpu_seconds")
    }
    peaks = [run["peak_gb"] for run in runs]
    return {
        "benchmark": "train",
        "side": side,
        "precision": args.precision,
        "rows": args.rows,
        **spread("tokens_per_s", by_clock["seconds"]),
        **spread("tokens_per_cpu_s", by_clock["cpu_seconds"]),
        "steps_counted": len(by_clock["seconds"]),
        **spread("peak_gb", peaks, 2),
        "first_loss": round(runs[0]["losses"][0], 4),
        **origin(versions=runs[0]["versions"]),
    }


SIDES: dict[str, Callable[[Path, str, int, int], dict[str, Any]]] = {
    "whet": partial(run_whet, by_row=False),
    "plain": run_plain,
    "trl": partial(run_trl, by_row=False),
    "trl_by_row": partial(run_trl, by_row=True),
    "whet_by_row": partial(run_whet, by_row=True),
}

if __name__ == "__main__":
    main()
