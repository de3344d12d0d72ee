"""GPU rows: everything of the table that needs a CUDA device, in one script of under 8 minutes.

    python -m benchmarks.gpu                          # on a CUDA machine
    python -m benchmarks.gpu --device cpu --tiny      # the same code in a minute, numbers worthless

Needs the repository and the card, no network: weights are random, the documents made up (lengths
as GSM8K's, the second half of each trained). In turn:

- matrix rate: the best bf16 rate of a large square product, against which utilisation is given;
- training: `whet sft` with random models of 400 M and 1.4 B parameters, rows of 1,024, and TRL with
  Liger's kernels and packing where `--trl_python` has them (else the line says "not installed");
- head: `bench_head` at 4,096 tokens, vocabulary 151,936, width 4,096;
- generation: `bench_generate`, with the number of times that the host waited for the card.

The model FLOPs of a step are those that its documents ask for, recomputation not counted: 6 for
each token and parameter of the layers, 6 for each trained token and parameter of the head, and
6 x length^2 x width for each document and layer (causal attention). `mfu` divides them by the time
and the measured matrix rate. `mfu_all_tokens` counts the head at every token, as others do, and so
flatters: Whet does not do that work.

The lines go to benchmarks/results/DATE-gpu.json. What does not fit into `--minutes` is left out,
and said so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_train import REPOSITORY, read_lines, run_process
from benchmarks.lines import emit, installed, origin, spread
from benchmarks.run import RESULTS, TRL
from whet.chat.chat import Chat
from whet.chat.tokenizer import train_tokenizer
from whet.data.store import DOCUMENT, new_store
from whet.model.config import ModelConfig, llama
from whet.model.decoder import Transformer, init_weights
from whet.model.hf.checkpoint import save_model

WARM_STEPS = 4  # of each run, not counted: compilation, first allocations
SEES = "import torch, trl, liger_kernel; assert torch.cuda.is_available()"


@dataclass(frozen=True)
class Size:
    """A model and its rows."""

    name: str
    config: ModelConfig
    row: int
    rows: int
    """In a step, all of them in one forward pass."""
    steps: int


def sizes(tiny: bool) -> list[Size]:
    if tiny:
        config = llama(300, 32, 2, 2, mlp_width=64, max_positions=64)
        return [Size("tiny", config, row=64, rows=2, steps=WARM_STEPS + 2)]
    small = llama(49_152, 1024, 24, 16, mlp_width=2816, max_positions=1024, tied=False)
    large = llama(49_152, 2048, 24, 16, mlp_width=5632, max_positions=1024, tied=False)
    return [Size("400M", small, 1024, 16, 24), Size("1.4B", large, 1024, 16, 16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script itself")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--trl_python", default=str(TRL) if TRL.exists() else sys.executable)
    parser.add_argument("--out", type=Path, help="file of results instead of DATE-gpu.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --tiny tries the script without one")
    out = args.out or RESULTS / f"{time.strftime('%Y-%m-%d')}-gpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    started, lines = time.monotonic(), list[dict[str, Any]]()
    for line in measurements(args, started):
        emit(line, None)
        lines.append(line)
        found = {**origin(args.device), "lines": lines}
        found["minutes"] = round((time.monotonic() - started) / 60, 1)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{found['minutes']} minutes; wrote {out}", file=sys.stderr)


def measurements(args: argparse.Namespace, started: float) -> Iterator[dict[str, Any]]:
    """The lines of all benchmarks, as they come."""

    def late(name: str) -> dict[str, Any] | None:
        minutes = (time.monotonic() - started) / 60
        if minutes < args.minutes:
            return None
        return {"benchmark": name, "not_measured": f"{minutes:.1f} minutes had passed"}

    rate = matrix_rate(args.device, args.tiny)
    yield {"benchmark": "matrix rate", **rate, **origin(args.device)}
    for size in sizes(args.tiny):
        with tempfile.TemporaryDirectory(dir=os.environ.get("WHET_BENCH_DIR")) as folder:
            work = Path(folder)
            flops = build(size, work)
            yield late(f"train {size.name}") or whet(size, work, flops, rate, args.device)
            yield late(f"train {size.name}, TRL") or trl(size, work, flops, rate, args)
    head = ["--tokens", "4096", "--vocab", "151936", "--width", "4096", "--rounds", "2"]
    new = ["--new", "256", "--prompts", "32", "--rounds", "1"]
    others = [("head", [*head, "--trained", share]) for share in ("0.5", "1.0")]
    if args.tiny:
        head = ["--tokens", "64", "--vocab", "300", "--width", "32", "--rounds", "1"]
        new = ["--new", "4", "--prompts", "2", "--rounds", "1"]
        others = [("head", [*head, "--sides", "whet", "full"])]
    for name, words in [*others, ("generate", new)]:
        too_late = late(name)
        yield from [too_late] if too_late else run(args, name, words)


def matrix_rate(device: str, tiny: bool) -> dict[str, Any]:
    """TFLOP/s of bf16 (float32 on a CPU) products of square matrices, the best of twenty."""
    size = 128 if tiny else 8192
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    found = []
    for _ in range(20):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        found.append(2 * size**3 / (time.perf_counter() - started) / 1e12)
    return {"size": size, "tflops_best": max(found), **spread("tflops", found, 3)}


def build(size: Size, work: Path) -> dict[str, float]:
    """Write model, packed rows and the peer's examples; returns the mean model FLOPs of a row."""
    model = Transformer(size.config)
    init_weights(model, seed=0)
    tokenizer = train_tokenizer(["one two three"], 300)
    save_model(model, work / "model", Chat(tokenizer), {"made_by": "benchmarks.gpu"})
    n_rows = size.rows * size.steps
    tokens, mask, segments, documents = made_up(size, n_rows)
    attrs = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "sources": ["-"],
    }
    with new_store(work / "packed.h5", n_rows, size.row, attrs=attrs) as store:
        store.write_rows(tokens, mask, segments)
        store.write_documents(documents)
    with open(work / "examples.jsonl", "w") as file:
        for document in documents:
            here = (
                document["row"],
                slice(document["start"], document["start"] + document["length"]),
            )
            example = {"input_ids": tokens[here].tolist(), "assistant_masks": mask[here].tolist()}
            file.write(json.dumps(example) + "\n")
    return flops_of(size.config, documents["length"], documents["trained"], n_rows)


def made_up(size: Size, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Full rows of documents as long as GSM8K's, the second half of each trained."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 300, (n_rows, size.row), np.int32)
    mask, segments = np.zeros((n_rows, size.row), np.int32), np.zeros((n_rows, size.row), np.int32)
    documents = []
    for row in range(n_rows):
        start = segment = 0
        while start < size.row:
            length = int(rng.integers(size.row // 10, size.row // 3))
            if size.row - start - length < size.row // 10:
                length = size.row - start
            segment += 1
            segments[row, start : start + length] = segment
            mask[row, start + length // 2 : start + length] = 1
            trained = length - length // 2
            documents.append((row, start, length, trained, 0, len(documents) + 1, 0))
            start += length
    return tokens, mask, segments, np.array(documents, DOCUMENT)


def flops_of(
    config: ModelConfig, lengths: np.ndarray, trained: np.ndarray, rows: int
) -> dict[str, float]:
    """Model FLOPs, forward and backward, of a mean row; see the top of this file."""
    width, heads = config.width, (config.n_heads + config.n_kv_heads) * config.head_size
    layer = 2 * width * heads + (3 if config.gated_mlp else 2) * width * config.mlp_width
    layers = 6 * config.n_layers * layer * lengths.sum(dtype=float)
    attention = 6 * config.n_layers * config.n_heads * config.head_size * (lengths**2.0).sum()
    head = 6 * width * config.vocab_size
    return {
        "mfu": (layers + attention + head * trained.sum(dtype=float)) / rows,
        "mfu_all_tokens": (layers + attention + head * lengths.sum(dtype=float)) / rows,
    }


def whet(
    size: Size, work: Path, flops: dict[str, float], rate: dict[str, Any], device: str
) -> dict[str, Any]:
    """`whet sft` itself."""
    cuda = device == "cuda"
    words = ["sft", "--model", "model", "--data", "packed.h5", "--out", "run", "--quiet"]
    words += ["--precision", "bf16" if cuda else "float32", "--device", device, "--lr", "1e-5"]
    words += ["--batch_size", str(size.rows), "--micro_batch_size", str(size.rows)]
    words += ["--max_steps", str(size.steps), "--eval_every", "0", "--save_every", "0"]
    words += ["--samples", "0", *(["--compile"] if cuda else [])]
    run_process([sys.executable, "-m", "whet", *words], work)
    timing = read_lines(work / "run" / "timing.jsonl")
    seconds = [line["seconds"] for line in timing]
    peak = max(line["memory_gb"] for line in timing)
    return trained("whet", size, seconds, peak, flops, rate, origin(device))


def trl(
    size: Size,
    work: Path,
    flops: dict[str, float],
    rate: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """TRL with Liger's kernels, packed without padding."""
    side = {"benchmark": "train", "side": "trl + liger", "model": size.name}
    if args.device == "cpu":
        return {**side, "not_measured": "needs a CUDA device"}
    seen = subprocess.run([args.trl_python, "-c", SEES], capture_output=True)
    if seen.returncode:
        return {**side, "not_measured": f"not installed: trl, liger-kernel ({args.trl_python})"}
    script = str(REPOSITORY / "benchmarks" / "peers" / "trl_train.py")
    words = [args.trl_python, script, "--work", str(work), "--precision", "bf16", "--cuda"]
    words += ["--steps", str(size.steps), "--batch_size", str(size.rows), "--row", str(size.row)]
    try:
        _, printed, _ = run_process(words, work)
    except SystemExit as failure:  # out of memory, a wheel that does not fit: the rest goes on
        return {**side, "not_measured": str(failure)[-500:]}
    found = json.loads(printed.splitlines()[-1])
    where = origin(args.device, found["versions"])
    line = trained("trl + liger", size, found["seconds"], found["peak_cuda_gb"], flops, rate, where)
    return {**line, "attention": found["attention"]}


def trained(
    side: str,
    size: Size,
    seconds: list[float],
    peak_gb: float,
    flops: dict[str, float],
    rate: dict[str, Any],
    where: dict[str, Any],
) -> dict[str, Any]:
    """The line of a training run."""
    counted = seconds[WARM_STEPS:]
    per_second = size.rows / statistics.median(counted)
    best = rate["tflops_best"] * 1e12
    return {
        "benchmark": "train",
        "side": side,
        "model": size.name,
        "rows": size.rows,
        **spread("tokens_per_s", [size.rows * size.row / each for each in counted]),
        **{name: round(per_second * each / best, 4) for name, each in flops.items()},
        "peak_gb": round(peak_gb, 2),
        "steps_counted": len(counted),
        **where,
    }


def run(args: argparse.Namespace, name: str, words: list[str]) -> list[dict[str, Any]]:
    """The lines of another benchmark, or one that says why there are none."""
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", *words, "--device", args.device]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        return [{"benchmark": name, "not_measured": done.stderr[-500:]}]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [{**line, **installed("liger-kernel")} for line in found]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
