"""How fast this CPU multiplies matrices in float32 and in bf16.

    python -m benchmarks.bench_products

A CPU without bf16 products emulates them: then everything in bf16, of whatever tool, is bound by
that. Printed is one JSON line a type: GFLOP/s by processor time of one thread, of the three
products that a linear layer makes forward and backward.
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.lines import emit, origin, spread

SIZE = 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        rates = []
        a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        for x, y in ((a, b.t()), (a, b), (a.t(), b)):
            x @ y
            busy = time.process_time()
            x @ y
            rates.append(2 * SIZE**3 / (time.process_time() - busy) / 1e9)
        line = {"benchmark": "products", "side": name, **spread("gflops", rates, 2)}
        emit({**line, "size": SIZE, **origin()}, args.out)


if __name__ == "__main__":
    main()
