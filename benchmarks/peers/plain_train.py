"""A training loop as teaching code writes it: the baseline that many projects grow from.

One small matrix per head, a dense causal mask over the whole row, full logits, rows made by
concatenating all documents and slicing every ROW tokens. Documents see each other.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROW = 1024


class Head(nn.Module):
    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, size, bias=False)
        self.key = nn.Linear(width, size, bias=False)
        self.value = nn.Linear(width, size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(ROW, ROW, dtype=torch.bool)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(~self.tril, float("-inf"))
        return F.softmax(scores, dim=-1) @ v


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width, width // heads) for _ in range(heads))
        self.proj = nn.Linear(width, width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.gate = nn.Linear(width, mlp, bias=False)
        self.up = nn.Linear(width, mlp, bias=False)
        self.down = nn.Linear(mlp, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.proj(torch.cat([head(h) for head in self.heads], dim=-1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Plain(nn.Module):
    """The benchmark's shapes; learned positions, as teaching code has them, in place of rotary."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.embed = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(ROW, width)
        self.blocks = nn.ModuleList(
            Block(width, config["num_attention_heads"], config["intermediate_size"])
            for _ in range(config["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, config["vocab_size"], bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", choices=["float32", "bf16"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    args = parser.parse_args()

    lines = (args.work / "examples.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    ids = torch.tensor([i for e in examples for i in e["input_ids"]])
    mask = torch.tensor([m for e in examples for m in e["assistant_masks"]])
    rows = len(ids) // ROW
    ids, mask = ids[: rows * ROW].view(rows, ROW), mask[: rows * ROW].view(rows, ROW)

    torch.manual_seed(0)
    model = Plain(json.loads((args.work / "model" / "config.json").read_text()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    order = torch.randperm(rows)
    seconds, cpu_seconds, tokens, losses = [], [], [], []
    for step in range(args.steps):
        started, busy = time.perf_counter(), time.process_time()
        at = order[step * args.batch_size : (step + 1) * args.batch_size]
        x, m = ids[at], mask[at]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model(x)
        targets = x[:, 1:].masked_fill(m[:, 1:] == 0, -100)
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - busy)
        tokens.append(x.numel())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        json.dumps(
            {
                "side": "plain loop",
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "tokens": tokens,
                "losses": losses,
                "peak_gib": peak,
                "versions": {"torch": torch.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
