"""Training speed and memory on CPU: Whet, TRL and a plain loop, same work, in turn, in one run.

    python -m benchmarks.bench_train --precision float32 --rounds 3

Each round runs every side once as a process of its own, so a slow minute of the machine meets all
of them. A process takes `--steps` optimizer steps of 4 rows of 1,024; the first is not counted.
Printed is one JSON line a side: tokens/s (the documents' own tokens, without padding) as median,
minimum and maximum over all counted steps, and the peak memory of the process; then the ratios.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.workload import ROW, build

REPOSITORY = Path(__file__).resolve().parent.parent
BENCH = REPOSITORY / ".bench"
BATCH_ROWS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sides", nargs="+", default=["whet", "plain", "trl"])
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()

    work = BENCH / "work"
    build(work)
    prepare(work)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
    for number in range(args.rounds):
        for side in args.sides:
            started = time.monotonic()
            runs[side].append(SIDES[side](work, args.precision, args.steps))
            took = time.monotonic() - started
            print(f"round {number + 1}: {side} took {took:.0f} s", file=sys.stderr, flush=True)
    lines = [summary(side, args.precision, runs[side]) for side in args.sides]
    ours = next((line for line in lines if line["side"] == "whet"), None)
    for line in lines:
        if ours and line is not ours:
            line["whet_is_times_faster"] = round(ours["tokens_per_s"] / line["tokens_per_s"], 2)
            line["whet_needs_share_of_memory"] = round(ours["peak_gb"] / line["peak_gb"], 2)
        text = json.dumps(line)
        print(text)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(text + "\n")


def prepare(work: Path) -> None:
    """Pack the same conversations with Whet's own command."""
    if not (work / "packed.h5").exists():
        words = ["prepare", "--data", "gsm8k.jsonl", "--tokenizer", "model"]
        words += ["--context_length", str(ROW), "--out", "packed.h5"]
        subprocess.run([sys.executable, "-m", "whet", *words], cwd=work, check=True)


def run_whet(work: Path, precision: str, steps: int) -> dict[str, Any]:
    """`whet sft` itself; its numbers are read from the run folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["sft", "--model", "model", "--data", "packed.h5", "--out", str(out), "--quiet"]
        words += ["--precision", precision, "--batch_size", str(BATCH_ROWS), "--lr", "1e-5"]
        words += ["--micro_batch_size", str(BATCH_ROWS), "--max_steps", str(steps)]
        words += ["--eval_every", "0", "--save_every", "0", "--samples", "0"]
        peak, _ = run_process([sys.executable, "-m", "whet", *words], work)
        timing = read_lines(out / "timing.jsonl")
        metrics = [line for line in read_lines(out / "metrics.jsonl") if "train_loss" in line]
    seen = [0, *(line["tokens"] for line in metrics)]
    import torch

    return {
        "seconds": [line["seconds"] for line in timing],
        "tokens": [b - a for a, b in itertools.pairwise(seen)],
        "losses": [line["train_loss"] for line in metrics],
        "peak_gb": peak,
        "versions": {"torch": torch.__version__},
    }


def run_plain(work: Path, precision: str, steps: int) -> dict[str, Any]:
    return run_peer(Path(sys.executable), "plain_train.py", work, precision, steps)


def run_trl(work: Path, precision: str, steps: int) -> dict[str, Any]:
    """TRL in an environment of its own, made from pinned versions if there is none."""
    python = BENCH / "trl" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(BENCH / "trl")], check=True)
        pins = REPOSITORY / "benchmarks" / "requirements-trl.txt"
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(pins)], check=True)
    try:
        return run_peer(python, "trl_train.py", work, precision, steps)
    finally:
        shutil.rmtree(work / "trl", ignore_errors=True)


def run_peer(python: Path, script: str, work: Path, precision: str, steps: int) -> dict[str, Any]:
    words = [str(python), str(REPOSITORY / "benchmarks" / "peers" / script), "--work", str(work)]
    words += ["--precision", precision, "--steps", str(steps), "--batch_size", str(BATCH_ROWS)]
    peak, printed = run_process(words, work)
    return {**json.loads(printed.splitlines()[-1]), "peak_gb": peak}


def run_process(words: list[str], folder: Path) -> tuple[float, str]:
    """Run to the end; returns the peak resident memory in GB and what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        child = subprocess.Popen(words, cwd=folder, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, err):
            stream.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(words)}\nfailed:\n{err.read()[-3000:]}")
        return usage.ru_maxrss / 1e6, out.read()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(side: str, precision: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One side's numbers over all its processes."""
    rates = [
        tokens / seconds
        for run in runs
        for tokens, seconds in list(zip(run["tokens"], run["seconds"], strict=True))[1:]
    ]
    return {
        "benchmark": "train",
        "side": side,
        "precision": precision,
        "tokens_per_s": round(statistics.median(rates), 1),
        "tokens_per_s_min": round(min(rates), 1),
        "tokens_per_s_max": round(max(rates), 1),
        "steps_counted": len(rates),
        "peak_gb": round(statistics.median(run["peak_gb"] for run in runs), 2),
        "first_loss": round(runs[0]["losses"][0], 4),
        "versions": {"python": platform.python_version(), **runs[0]["versions"]},
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }


SIDES = {"whet": run_whet, "plain": run_plain, "trl": run_trl}

if __name__ == "__main__":
    main()
