"""Head and loss, forward and backward: Whet's fused one against full logits and the others' fused.

    python -m benchmarks.bench_head                                          # CPU, float32
    python -m benchmarks.bench_head --tokens 4096 --vocab 151936 --width 4096   # as on an H200

Half of the tokens are trained (`--trained`). All sides get the same hidden states, weights and
targets, and take turns, each round in a process of its own, so that a slow minute of the machine
meets all of them and peak memory is each one's own. Sides: `whet`; `full`, all logits and
`F.cross_entropy`; torch's own `linear_cross_entropy` where the version has it, `torch` with its
default options and only the trained tokens given to it, `torch_best` with the options that were
fastest here (chunks of as many tokens as Whet's); `liger`, where installed. Printed is one JSON
line a side: milliseconds as median, minimum and maximum over all calls, the same of processor time,
the memory above hidden states and weights, and the loss, which must agree.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lines import emit, installed, origin, spread
from whet.model.loss import Head, chunk_tokens, linear_cross_entropy

Way = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
IGNORED = -100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--trained", type=float, default=0.5, help="share of trained tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3, help="timed calls in a round")
    parser.add_argument("--sides", nargs="+", default=list(HEADS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides if available(side)}
    for _ in range(args.rounds):
        for side, runs in results.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.bench_head",
                *sys.argv[1:],
                "--child",
                side,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    lines = {side: summary(side, args, runs) for side, runs in results.items()}
    for side, line in lines.items():
        if side != "whet" and "whet" in lines:
            line["whet_is_times_faster"] = round(line["ms"] / lines["whet"]["ms"], 2)
            by_cpu = line["cpu_ms"] / lines["whet"]["cpu_ms"]
            line["whet_is_times_faster_by_cpu"] = round(by_cpu, 2)
        emit(line, args.out)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time one side in this process."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, generator=generator)
    weight = torch.randn(args.vocab, args.width, generator=generator) * 0.02
    targets = torch.randint(args.vocab, (args.tokens,), generator=generator).to(args.device)
    # Trained in stretches, as replies are.
    trained = (torch.arange(args.tokens, device=args.device) % 200) < 200 * args.trained
    hidden, weight = (t.to(args.device, dtype).requires_grad_() for t in (hidden, weight))
    before = memory(args.device)
    milliseconds, cpu_milliseconds = [], []
    for call in range(args.calls + 1):
        hidden.grad = weight.grad = None
        wait(args.device)
        started, busy = time.perf_counter(), time.process_time()
        loss = HEADS[args.child](hidden, weight, targets, trained)
        loss.backward()
        wait(args.device)
        if call:  # the first one warms up
            milliseconds.append((time.perf_counter() - started) * 1e3)
            cpu_milliseconds.append((time.process_time() - busy) * 1e3)
    return {
        "ms": milliseconds,
        "cpu_ms": cpu_milliseconds,
        "bytes": memory(args.device) - before,
        "loss": loss.item(),
    }


def whet(hidden: Tensor, weight: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
    rows = trained.nonzero().flatten()
    ones = torch.ones(len(rows), device=hidden.device)
    return linear_cross_entropy(hidden[rows], Head(weight), targets[rows], ones)[0]


def full(hidden: Tensor, weight: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
    labels = targets.masked_fill(~trained, IGNORED)
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
    rows = trained.nonzero().flatten()
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        hidden[rows], weight, targets[rows], reduction="sum", options=options
    )


def torch_best(hidden: Tensor, weight: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
    rows = trained.nonzero().flatten()
    chunk = min(len(rows), chunk_tokens(len(weight), hidden.device, hidden.dtype))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    return F.linear_cross_entropy(
        hidden[rows], weight, targets[rows], reduction="sum", options=options
    )


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    labels = targets.masked_fill(~trained, IGNORED)
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


HEADS: dict[str, Way] = {
    "whet": whet,
    "full": full,
    "torch": torchs,
    "torch_best": torch_best,
    "liger": liger,
}


def available(side: str) -> bool:
    """Whether this machine has what `side` needs."""
    if side.startswith("torch"):
        return hasattr(F, "linear_cross_entropy")
    if side == "liger":
        from importlib.util import find_spec

        return torch.cuda.is_available() and find_spec("liger_kernel") is not None
    return True


def memory(device: str) -> int:
    """Peak memory so far in bytes: of the GPU, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def summary(side: str, args: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    cuda = args.device == "cuda"
    times = [ms for run in runs for ms in run["ms"]]
    return {
        "benchmark": "head",
        "side": side,
        "tokens": args.tokens,
        "trained": args.trained,
        "vocab": args.vocab,
        "width": args.width,
        **spread("ms", times),
        **spread("cpu_ms", [ms for run in runs for ms in run["cpu_ms"]]),
        "calls": len(times),
        "peak_mb": round(max(run["bytes"] for run in runs) / 1e6),
        "loss": runs[0]["loss"],
        "precision": "bf16" if cuda else "float32",
        **origin(args.device, installed("liger-kernel")),
    }


if __name__ == "__main__":
    main()
