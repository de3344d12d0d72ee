"""Generation against other ways to the same tokens: same weights and prompts, in turn, in one run.

    python -m benchmarks.bench_generate --new 256 --prompts 8 --peers no_cache
    python -m benchmarks.bench_generate --new 128 --prompts 64 --peers transformers
    python -m benchmarks.bench_generate --prompts 64 --replies gsm8k --peers transformers

With `--replies gsm8k` the prompts are as long as GSM8K's questions and each reply ends, on both
sides, where the problem's own answer does, as the replies of an evaluation differ in length.

`cache` is Whet's `generate`. Its peers: `no_cache`, `generate_without_cache`, which runs the
whole text again for each token (the head at its last position only, padding left out: a fair one of
its kind); `transformers`, `model.generate` on a batch padded on the left, as its documentation has
it. Sides take turns, so a slow minute of the machine meets all. Their replies are compared. Printed
is one JSON line a side: new tokens/s as median, minimum and maximum over the rounds; on a GPU also
how often the host waited for it while `--new` tokens were made.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.lines import emit, origin, spread
from benchmarks.without_cache import generate_without_cache
from benchmarks.workload import MODEL, data_folder
from whet.chat.chat import load_tokenizer
from whet.generate.engine import CHECK_EVERY
from whet.generate.rows import GREEDY, Row, Rows
from whet.model.decoder import Transformer, init_weights
from whet.model.hf.checkpoint import save_model
from whet.model.hf.config import from_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", type=int, default=256, help="new tokens for each prompt")
    parser.add_argument("--prompts", type=int, default=8, help="prompts, run as one batch")
    parser.add_argument("--peers", nargs="+", choices=["no_cache", "transformers"])
    parser.add_argument("--replies", choices=["alike", "gsm8k"], default="alike")
    parser.add_argument("--precision", choices=["float32", "bf16"], help="bf16 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    peers = args.peers or ["no_cache"]
    if args.replies == "gsm8k" and "no_cache" in peers:
        parser.error("--replies gsm8k: without a cache all replies are alike in length")

    model = Transformer(from_hf(MODEL))
    init_weights(model, seed=0)
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "float32")
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model = model.to(args.device, dtype)
    prompts, ends = some_prompts(args.prompts), [args.new] * args.prompts
    if args.replies == "gsm8k":
        prompts, ends = gsm8k(args.prompts)

    def cached(most: int) -> list[list[int]]:
        return batched(model, prompts, [min(most, end) for end in ends])

    def no_cache(new: int) -> list[list[int]]:
        return generate_without_cache(model, prompts, max_new_tokens=new, stop_ids=())

    sides: dict[str, Callable[[int], list[list[int]]]] = {"cache": cached}
    if "no_cache" in peers:
        sides["no cache"] = no_cache
    if "transformers" in peers:
        sides["transformers"] = transformers_side(model, prompts, ends, dtype)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    busy: dict[str, list[float]] = {side: [] for side in sides}
    replies: dict[str, list[list[int]]] = {}
    for run in sides.values():
        run(4)  # warm-up
    waits = {side: host_waits(run, args) for side, run in sides.items()}
    for _ in range(args.rounds):
        for side, run in sides.items():
            started, cpu = time.perf_counter(), time.process_time()
            replies[side] = run(max(ends))  # ends with a copy to the host
            seconds[side].append(time.perf_counter() - started)
            busy[side].append(time.process_time() - cpu)
    count = sum(map(len, replies["cache"]))
    for side in sides:
        line = summary(side, args, [count / each for each in seconds[side]])
        line["host_waits"] = waits[side]
        if side != "cache":
            pairs = zip(replies["cache"], replies[side], strict=True)
            same = sum(a == b for ours, other in pairs for a, b in zip(ours, other, strict=True))
            line["share_of_equal_tokens"] = round(same / count, 4)
            times = [b / a for a, b in zip(seconds["cache"], seconds[side], strict=True)]
            line |= spread("cache_is_times_faster", times, 2)
            by_cpu = statistics.median(busy[side]) / statistics.median(busy["cache"])
            line["cache_is_times_faster_by_cpu"] = round(by_cpu, 2)
        emit(line, args.out)


def batched(model: Transformer, prompts: list[list[int]], ends: list[int]) -> list[list[int]]:
    """Greedy replies of Whet's engine, all prompts at once; reply i has `ends[i]` tokens."""
    slots = max(len(prompt) + end for prompt, end in zip(prompts, ends, strict=True))
    rows = Rows(model, len(prompts), slots, max(ends), set())
    waiting = [
        Row(i, (i,), list(prompts[i]), len(prompts[i]) + ends[i], GREEDY)
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    ]
    replies: list[list[int]] = [[] for _ in prompts]
    while waiting or rows.live:
        pieces = (
            rows.begin(rows.take(waiting)) if waiting else rows.step(CHECK_EVERY[rows.device.type])
        )
        for piece in pieces:
            replies[piece.index] += piece.tokens
    return replies


def transformers_side(
    model: Transformer, prompts: list[list[int]], ends: list[int], dtype: torch.dtype
) -> Callable[[int], list[list[int]]]:
    """The same weights in transformers' own model."""
    from transformers import AutoModelForCausalLM, StoppingCriteria

    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model", None, {"made_by": "benchmarks.bench_generate"})
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
    theirs = theirs.to(device).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    full = torch.tensor(ends, device=device) + longest

    class Ended(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return ids.shape[1] >= full

    @torch.no_grad()
    def run(most: int) -> list[list[int]]:
        new = min(most, max(ends))
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        found = theirs.generate(
            ids, attention_mask=mask, pad_token_id=0, stopping_criteria=[Ended()], **options
        )
        return [row[:end] for row, end in zip(found[:, longest:].tolist(), ends, strict=True)]

    return run


def host_waits(run: Callable[[int], list[list[int]]], args: argparse.Namespace) -> int | None:
    """How often the host waits for the GPU while it makes `args.new` tokens; None on a CPU."""
    if args.device == "cpu":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(args.new)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def gsm8k(count: int) -> tuple[list[list[int]], list[int]]:
    """Questions of GSM8K as ids, and how many tokens the answer to each has with its end."""
    encode = load_tokenizer(data_folder() / "tokenizers" / "gpt2").tokenizer.encode
    lines = (data_folder() / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines[:count]]
    return [encode(p["question"]) for p in problems], [
        len(encode(p["answer"])) + 1 for p in problems
    ]


def some_prompts(count: int) -> list[list[int]]:
    """Prompts of 60 to 140 tokens, as long as GSM8K's questions."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(60, 141, (count,), generator=generator).tolist()
    vocabulary = MODEL["vocab_size"]
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def summary(side: str, args: argparse.Namespace, rates: list[float]) -> dict[str, Any]:
    return {
        "benchmark": "generate",
        "side": side,
        "new_tokens": args.new,
        "prompts": args.prompts,
        **spread("tokens_per_s", rates),
        "rounds": len(rates),
        "replies": args.replies,
        "precision": args.precision,
        **origin(args.device),
    }


if __name__ == "__main__":
    main()
