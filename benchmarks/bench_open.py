"""Opening a model against reading its file: time and peak memory.

    python -m benchmarks.bench_open --gb 1.1

Random Llama-layout models are written once under .bench/, one in float32 and one in bf16. Each
round opens them in processes of their own, in turn with a plain read of the same bytes into memory
(`read`) and one through a small buffer that keeps nothing (`skim`), with the file out of the page
cache (`cold`) and in it (`warm`). A bf16 file is opened as
it is (evaluation, LoRA) and as float32 (full fine-tuning).

Printed is one JSON line for each: seconds as median, minimum and maximum; how many times longer
opening takes than each of the two, by round; and the peak memory of opening above what the process
held before (`resident`, with the file's mapped pages, which the system can take back; `own`,
without), as a share of the opened weights.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.lines import emit, origin, spread

BENCH = Path(__file__).resolve().parent.parent / ".bench"
OPENED = {"float32": ("float32",), "bf16": ("bf16", "float32")}  # file -> as what it is opened
READS = ("read", "skim")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
PIECE = 2**24  # bytes of one read
WIDTH, VOCABULARY = 1024, 32_000
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * 2816  # parameters of a layer, its norms left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.1, help="size of each file in GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--caches", nargs="+", default=["warm", "cold"])
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, what, cache = args.child
        print(json.dumps(measure(Path(folder), what, cache == "cold")))
        return
    for kind, ways in OPENED.items():
        folder = BENCH / f"open-{kind}-{args.gb}"
        make(folder, kind, args.gb)
        for cache in args.caches:
            sides = [*READS, *ways]
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side in sides:
                    runs[side].append(child(folder, side, cache))
            for side in sides:
                emit(summary(kind, cache, side, runs), args.out)
        shutil.rmtree(folder)


def make(folder: Path, kind: str, gb: float) -> None:
    """Write a random model of about `gb` GB."""
    from whet.model.config import llama
    from whet.model.decoder import Transformer
    from whet.model.hf.checkpoint import save_model

    if (folder / "config.json").exists():
        return
    parameters = gb * 1e9 / DTYPES[kind].itemsize - VOCABULARY * WIDTH
    layers = max(1, round(parameters / LAYER))
    config = llama(VOCABULARY, WIDTH, layers, 16, mlp_width=2816, max_positions=128)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(DTYPES[kind]).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    save_model(model, folder, None, {"made_by": "benchmarks.bench_open"}, DTYPES[kind])


def child(folder: Path, side: str, cache: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_open", "--child", str(folder), side, cache]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, what: str, cold: bool) -> dict[str, Any]:
    """Read the file of weights, or open the model as `what`, in this process."""
    from whet.model.open import load_backbone_from_ckpt

    file = folder / "model.safetensors"
    size = file.stat().st_size
    set_cache(file, cold)
    before = memory()
    with Peak() as peak:
        started = time.perf_counter()
        if what in READS:
            view = memoryview(bytearray(size if what == "read" else PIECE))
            done = 0
            with file.open("rb", buffering=0) as stream:
                while done < size:
                    start = done if what == "read" else 0
                    done += stream.readinto(view[start : start + PIECE]) or 0
            weights = size
        else:
            model = load_backbone_from_ckpt(folder, dtype=DTYPES[what])
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "file_gb": size / 1e9,
        "resident": (peak.resident - before[0]) / weights,
        "own": (peak.own - before[1]) / weights,
    }


def set_cache(file: Path, cold: bool) -> None:
    """Put `file` out of the page cache, or into it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if cold:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, PIECE):
                pass
    finally:
        os.close(descriptor)


def memory() -> tuple[int, int]:
    """Bytes of this process in memory: all of them, and those that are no file's pages."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "RssFile"):
            found[key] = int(value.split()[0]) * 1024
    return found["VmRSS"], found["VmRSS"] - found["RssFile"]


class Peak:
    """Watches `memory` from a thread, every 5 ms."""

    def __enter__(self) -> "Peak":
        self.resident = self.own = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def look(self) -> None:
        resident, own = memory()
        self.resident, self.own = max(self.resident, resident), max(self.own, own)

    def watch(self) -> None:
        while not self.ended.wait(0.005):
            self.look()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.look()


def summary(
    kind: str, cache: str, side: str, runs: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    mine = runs[side]
    line = {
        "benchmark": "open",
        "side": side if side in READS else f"whet, as {side}",
        "file": f"{mine[0]['file_gb']:.2f} GB, {kind}",
        "cache": cache,
        **spread("seconds", [run["seconds"] for run in mine], 3),
    }
    if side not in READS:
        for read in READS:
            pairs = zip(mine, runs[read], strict=True)
            line |= spread(f"times_the_{read}", [a["seconds"] / b["seconds"] for a, b in pairs], 2)
        for what in ("resident", "own"):
            line |= spread(f"peak_{what}_of_weights", [run[what] for run in mine], 2)
    return {**line, "rounds": len(mine), **origin()}


if __name__ == "__main__":
    main()
