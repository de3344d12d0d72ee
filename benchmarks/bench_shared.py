"""A system prompt shared by all documents: computed once against once for each document.

    python -m benchmarks.bench_shared --prompt 370

Whet's own model and loss on both sides, 2 rows of 2,048 tokens, documents of a common beginning of
`--prompt` tokens and 100 to 230 of their own, the second half of those trained; float32 on a CPU.
The sides take turns. Printed is one JSON line a side: processor seconds of a forward and backward
pass as median, minimum and maximum, the tokens that were computed, and the loss, which must agree.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.lines import emit, origin, spread
from benchmarks.workload import MODEL
from whet.model import attention
from whet.model.decoder import Transformer, init_weights
from whet.model.hf.config import from_hf

ROWS, ROW = 2, 2048
NEVER = ROWS * ROW  # no beginning is as long as that


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=370, help="tokens of the common beginning")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    model = Transformer(from_hf(MODEL))
    init_weights(model, seed=0)
    batch = made_up(args.prompt)
    sides = {"once": attention.SHARED, "each": NEVER}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses = {}
    for number in range(args.rounds + 1):
        for side, shortest in sides.items():
            attention.SHARED = shortest
            busy = time.process_time()
            loss = model(**batch).loss
            loss.backward()
            model.zero_grad()
            if number:  # the first one warms up
                seconds[side].append(time.process_time() - busy)
            losses[side] = loss.item()
    for side, shortest in sides.items():
        attention.SHARED = shortest
        plan = attention.plan_documents(
            batch["tokens"].shape, torch.device("cpu"), batch["segments"], batch["weight"]
        )
        computed = attention.share_prefixes(plan, plan.pack(batch["tokens"]))
        line: dict[str, Any] = {
            "benchmark": "shared",
            "side": side,
            "prompt": args.prompt,
            **spread("cpu_seconds", seconds[side], 2),
            "tokens_computed": len(computed.positions),
            "tokens_trained": int((batch["weight"] != 0).sum()),
            "loss": losses[side],
        }
        if side == "each":
            pairs = zip(seconds["each"], seconds["once"], strict=True)
            line |= spread("once_is_times_faster", [a / b for a, b in pairs], 2)
        emit({**line, "rounds": args.rounds, **origin()}, args.out)


def made_up(prompt: int) -> dict[str, torch.Tensor]:
    """Rows of documents with a common beginning, as arguments of the model."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    begin = draw(1, MODEL["vocab_size"], prompt)
    tokens = torch.zeros(ROWS, ROW, dtype=torch.long)
    segments, weight = torch.zeros_like(tokens), torch.zeros(ROWS, ROW)
    for row in range(ROWS):
        start, number = 0, 0
        while True:
            own = int(draw(100, 231, 1))
            end = start + prompt + own
            if end > ROW:
                break
            number += 1
            tokens[row, start:end] = torch.cat((begin, draw(1, MODEL["vocab_size"], own)))
            segments[row, start:end] = number
            weight[row, end - own // 2 : end - 1] = 1.0
            start = end
    targets = tokens.roll(-1, 1)
    return {"tokens": tokens, "segments": segments, "targets": targets, "weight": weight}


if __name__ == "__main__":
    main()
