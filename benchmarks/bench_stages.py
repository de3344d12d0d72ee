"""What comes after SFT, on CPU: Whet and TRL, same model, data and precision, in turn, in one run.

    python -m benchmarks.bench_stages dpo --rounds 3
    python -m benchmarks.bench_stages reward --precision bf16
    python -m benchmarks.bench_stages grpo

Each round runs every side once as a process of its own, so that a slow minute of the machine meets
all of them; the first optimizer step is not counted. Pairs are GSM8K's questions with their own
answer against that of another question; GRPO samples answers to the same questions. Sides:

- whet: the command itself, all rows of a step in one pass;
- whet_by_row: `--micro_batch_size 1`;
- trl: all pairs (replies) of a step in one pass, padded, since TRL 1.16 has no other way;
- trl_by_pair: one pair (one group) a pass, so that nothing is padded but the shorter of a pair.

`dpo` and `reward` count pairs a second, the reference's pass excluded on both sides; `grpo` counts
sampled tokens a second of rollout, reward and update together. Printed is one JSON line a side.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench_train import (
    BENCH,
    REPOSITORY,
    compared,
    rates,
    read_lines,
    run_in_turn,
    run_process,
)
from benchmarks.lines import emit, origin, spread
from benchmarks.workload import ROW, build, data_folder

PAIRS_OF_ROWS = 3  # pairs that a row of 1,024 holds, about
REWARD = """
def vowels(completions):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
"""
GROUP, NEW = 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["dpo", "reward", "grpo"])
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="rows, or prompts, of a step")
    parser.add_argument("--trl_python", type=Path, default=BENCH / "trl" / "bin" / "python")
    parser.add_argument("--sides", nargs="+", default=list(SIDES))
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    if not args.trl_python.exists():
        parser.error(f"{args.trl_python} is missing: python -m benchmarks.bench_train makes it")

    work = BENCH / "stages"
    build(work)
    prepare(work)
    runs = run_in_turn(args.sides, args.rounds, lambda side: SIDES[side](work, args))
    lines = {side: summary(side, args, runs[side]) for side in args.sides}
    for side, line in lines.items():
        if side.startswith("trl"):
            ours = "whet_by_row" if side == "trl_by_pair" and "whet_by_row" in runs else "whet"
            line |= spread("whet_is_times_faster", compared(runs["whet"], runs[side]), 2)
            by_cpu = lines["whet"]["per_cpu_s"] / line["per_cpu_s"]
            line["whet_is_times_faster_by_cpu"] = round(by_cpu, 2)
            line["whet_needs_share_of_memory"] = round(lines[ours]["peak_gb"] / line["peak_gb"], 2)
        emit(line, args.out)


def prepare(work: Path) -> None:
    """Pairs as TRL and `whet prepare` both read them, and packed."""
    if (work / "pairs.h5").exists():
        return
    gsm8k = data_folder() / "gsm8k" / "train.jsonl"
    problems = [json.loads(line) for line in gsm8k.read_text().splitlines()[:200]]
    with open(work / "pairs.jsonl", "w") as out:
        for one, other in itertools.pairwise(problems):
            said = [[{"role": "assistant", "content": p["answer"]}] for p in (one, other)]
            prompt = [{"role": "user", "content": one["question"]}]
            pair = {"prompt": prompt, "chosen": said[0], "rejected": said[1]}
            out.write(json.dumps(pair) + "\n")
    # A reference is computed of the whole file: it holds what is trained.
    lines = (work / "pairs.jsonl").read_text().splitlines()
    (work / "few.jsonl").write_text("\n".join(lines[:60]) + "\n")
    (work / "reward.py").write_text(REWARD)
    words = ["prepare", "--data", "few.jsonl", "--tokenizer", "model"]
    words += ["--context_length", str(ROW), "--out", "pairs.h5"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "whet", *words]
    subprocess.run(command, cwd=work, check=True, env=environment, stdout=sys.stderr)


def run_whet(work: Path, args: Any, by_row: bool) -> dict[str, Any]:
    """The command itself; its numbers are read from the run folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [args.kind, "--model", "model", "--out", str(out), "--quiet", "--lr", "1e-6"]
        words += ["--precision", args.precision, "--batch_size", str(args.rows), "--warmup", "0"]
        words += ["--max_steps", str(args.steps), "--eval_every", "0", "--save_every", "0"]
        if args.kind == "grpo":
            words += ["--prompts", "pairs.jsonl", "--reward", "reward.py:vowels"]
            words += ["--group_size", str(GROUP), "--max_new_tokens", str(NEW)]
            words += ["--truncated", "score", "--cohort", str(GROUP * args.rows)]
        else:
            words += ["--data", "pairs.h5"]
        words += ["--micro_batch_size", "1" if by_row else str(4 * args.rows)]
        command = [sys.executable, "-m", "whet", *words]
        peak, _, marks = run_process(command, work, out / "timing.jsonl")
        timing = read_lines(out / "timing.jsonl")
        metrics = [line for line in read_lines(out / "metrics.jsonl") if "train_loss" in line]
    if args.kind == "grpo":
        counts = [GROUP * args.rows * line["reply_tokens"] for line in metrics]
    else:
        counts = [line["pairs_per_s"] * line["seconds"] for line in timing]
    return {
        "seconds": [line["seconds"] for line in timing],
        "cpu_seconds": [b - a for a, b in itertools.pairwise([0.0, *marks])],
        "tokens": counts,
        "losses": [line["train_loss"] for line in metrics],
        "peak_gb": peak,
        "versions": {},
    }


def run_trl(work: Path, args: Any, by_pair: bool) -> dict[str, Any]:
    batch = args.rows * (GROUP if args.kind == "grpo" else PAIRS_OF_ROWS)
    small = GROUP if args.kind == "grpo" else 1
    words = [str(args.trl_python), str(REPOSITORY / "benchmarks" / "peers" / "trl_stages.py")]
    words += [args.kind, "--work", str(work), "--steps", str(args.steps)]
    words += ["--batch_size", str(batch), "--pass_size", str(small if by_pair else batch)]
    words += ["--new_tokens", str(NEW), "--group_size", str(GROUP)]
    words += ["--precision", args.precision]
    try:
        peak, printed, _ = run_process(words, work)
    finally:
        shutil.rmtree(work / "trl", ignore_errors=True)
    return {**json.loads(printed.splitlines()[-1]), "peak_gb": peak}


def summary(side: str, args: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One side's numbers over all its processes."""
    by_clock = {
        clock: [rate for run in runs for rate in rates(run, clock)]
        for clock in ("seconds", "cpu_seconds")
    }
    return {
        "benchmark": args.kind,
        "side": side,
        "precision": args.precision,
        "counted": "sampled tokens" if args.kind == "grpo" else "pairs",
        "rows": args.rows,
        **spread("per_s", by_clock["seconds"], 3),
        **spread("per_cpu_s", by_clock["cpu_seconds"], 3),
        "steps_counted": len(by_clock["seconds"]),
        **spread("peak_gb", [run["peak_gb"] for run in runs], 2),
        "first_loss": round(runs[0]["losses"][0], 4),
        **origin(versions=runs[0]["versions"]),
    }


SIDES = {
    "whet": partial(run_whet, by_row=False),
    "trl": partial(run_trl, by_pair=False),
    "trl_by_pair": partial(run_trl, by_pair=True),
    "whet_by_row": partial(run_whet, by_row=True),
}

if __name__ == "__main__":
    main()
