"""How long help, a typing error and a missing file take, and whether they import torch.

    python -m benchmarks.bench_help

Printed is one JSON line for each: processor seconds of a whole process as median, minimum and
maximum, and whether torch was imported. Aim: under 0.6 s.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.lines import emit, origin, spread

RUN = "from whet.cli import main; import sys; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
GIVEN = ["--data", __file__, "--out", "runs/none"]
CASES = {
    "whet --help": ["--help"],
    "sft --help": ["sft", "--help"],
    "typo in a flag": ["sft", "--model", ".", *GIVEN, "--learning_rate", "1"],
    "typo in a TOML file": ["sft", "--config", "typo.toml"],
    "missing data file": ["sft", "--model", ".", "--data", "none.h5", "--out", "runs/none"],
    "missing text": ["pretrain", "--data", "none.txt", "--out", "runs/none"],
    "missing model": ["chat", "none"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "typo.toml").write_text("learning_rate = 1e-5\n")
        for name, words in {"empty python": None, **CASES}.items():
            runs = [processor_seconds(words, folder) for _ in range(args.rounds)]
            line = {"benchmark": "help", "case": name, "torch_imported": any(t for _, t in runs)}
            line |= spread("processor_seconds", [seconds for seconds, _ in runs], 3)
            emit({**line, "rounds": args.rounds, **origin()}, args.out)


def processor_seconds(words: list[str] | None, folder: str) -> tuple[float, bool]:
    """User and system time of one process, and whether it imported torch."""
    code = ["-c", RUN, *words] if words else ["-c", "pass"]
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        [sys.executable, *code], cwd=folder, env={**os.environ, "PYTHONPATH": paths}, **quiet
    )
    _, status, used = os.wait4(process.pid, 0)
    return used.ru_utime + used.ru_stime, status != 0


if __name__ == "__main__":
    main()
