"""How long `whet --help` takes, and whether it imports torch.

    python -m benchmarks.bench_help

Printed is one JSON line: seconds of a whole process as median, minimum and maximum, the same for a
Python that does nothing, and whether torch was imported.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.lines import emit, origin, spread

HELP = "from whet.cli import main; import sys; main(['--help']); sys.exit('torch' in sys.modules)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="append the JSON line to this file")
    args = parser.parse_args()
    codes = {"seconds": HELP, "empty_python_seconds": "pass"}
    found: dict[str, list[float]] = {name: [] for name in codes}
    imported = False
    for _ in range(args.rounds):
        for name, code in codes.items():
            started = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
            found[name].append(time.perf_counter() - started)
            imported |= done.returncode != 0
    line = {"benchmark": "help", "side": "whet", "torch_imported": imported}
    for name, seconds in found.items():
        line |= spread(name, seconds, 3)
    emit({**line, "rounds": args.rounds, **origin()}, args.out)


if __name__ == "__main__":
    main()
