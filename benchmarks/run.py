"""`make bench`: every benchmark that a CPU can run, one after another, in under 20 minutes.

    python -m benchmarks.run                 # all
    python -m benchmarks.run head generate   # some
    python -m benchmarks.table FILE          # the result as rows of docs/history/measurements.md

Each benchmark is a command of its own. What they print goes to benchmarks/results/DATE-cpu.json,
which is written again after each of them, so that a run that was cut short keeps what it had. A
benchmark that fails is reported and the others go on; the exit code is 1 then.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.lines import origin
from benchmarks.workload import data_folder
from whet.model.precision import multiplies_bf16

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
TRL = REPOSITORY / ".bench" / "trl" / "bin" / "python"  # made by bench_train
NEEDS_DATA = {"train", "train_bf16", "prepare", "packing", "generate_gsm8k"}


def commands() -> dict[str, list[str]]:
    """Name -> words after `python -m benchmarks.`.

    Training in bf16 only where the CPU multiplies it natively; elsewhere a step takes many minutes
    on all sides, and the rates of the bare products say why.
    """
    gsm8k = str(data_folder() / "gsm8k" / "train.jsonl")
    tokenizer = str(data_folder() / "tokenizers" / "qwen2")
    data = ["--data", gsm8k, "--tokenizer", tokenizer]
    bf16 = ["bench_products"]
    if multiplies_bf16(torch.device("cpu")):
        sides = ["whet", "plain", "trl_by_row", "whet_by_row"]
        bf16 = ["bench_train", "--precision", "bf16", "--rounds", "1", "--sides", *sides]
    against = ["--prompts", "64", "--peers", "transformers", "--rounds", "1"]
    return {
        "help": ["bench_help"],
        "head": ["bench_head", "--rounds", "2"],
        "shared": ["bench_shared"],
        "generate": ["bench_generate", "--rounds", "1"],
        "generate_64": ["bench_generate", "--new", "128", *against],
        "generate_gsm8k": ["bench_generate", "--replies", "gsm8k", *against],
        "train": ["bench_train", "--rounds", "2", "--steps", "3"],
        "train_bf16": bf16,
        "open": ["bench_open", "--rounds", "2"],
        "packing": ["bench_packing", *data],
        "prepare": [
            "bench_prepare",
            *data,
            "--repeat",
            "4",
            "--rounds",
            "2",
            "--trl_python",
            str(TRL),
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(commands())}; all if none")
    parser.add_argument("--out", type=Path, help="file of results instead of DATE-cpu.json")
    args = parser.parse_args()
    unknown = set(args.names) - set(commands())
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(commands())}")
    out = args.out or RESULTS / f"{time.strftime('%Y-%m-%d')}-cpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {**origin(), "load_before": os.getloadavg()[0], "rows": []}
    failed, started = [], time.monotonic()
    for name, words in commands().items():
        if args.names and name not in args.names:
            continue
        if name in NEEDS_DATA and not data_folder().is_dir():
            print(f"{name}: left out, {data_folder()} is missing (WHET_SHARED_DATA names it)")
            failed.append(name)
            continue
        row = run(name, words)
        if row is None:
            failed.append(name)
        else:
            found["rows"].append(row)
        found["minutes"] = round((time.monotonic() - started) / 60, 1)
        found["load_after"] = os.getloadavg()[0]
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{found.get('minutes', 0)} minutes; wrote {out}", file=sys.stderr)
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def run(name: str, words: list[str]) -> dict[str, Any] | None:
    """One benchmark's lines, or None if it failed."""
    print(f"{name}: python -m benchmarks.{' '.join(words)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.jsonl"
        started = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:], "--out", str(lines)]
        done = subprocess.run(command, cwd=REPOSITORY)
        if done.returncode or not lines.exists():
            return None
        texts = lines.read_text(encoding="utf-8").splitlines()
    return {
        "name": name,
        "command": "python -m benchmarks." + " ".join(words).replace(str(data_folder()), "DATA"),
        "seconds": round(time.monotonic() - started),
        "lines": [json.loads(text) for text in texts],
    }


if __name__ == "__main__":
    sys.exit(main())
