"""`whet serve` with requests at once against the same requests one after another.

    python -m benchmarks.bench_serve --clients 64 --new 64

Both sides are the same server and the same model (about 20 M parameters, random weights, no stop
token), asked over HTTP. The replies of both are compared. Printed is one JSON line a side: new
tokens/s as median, minimum and maximum over the rounds.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

from benchmarks.lines import emit, origin, spread
from whet.chat.chat import Chat
from whet.chat.tokenizer import train_tokenizer
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.hf.checkpoint import save_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64, help="requests, and how many at once")
    parser.add_argument("--new", type=int, default=64, help="new tokens for each request")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = model_directory(Path(folder) / "model")
        flags = ["--device", args.device, "--batch_size", str(args.batch_size)]
        process, url = start(str(model), *flags, "--context_length", "512")
        try:
            rates: dict[str, list[float]] = {"one by one": [], "at once": []}
            replies: dict[str, list[str]] = {}
            ask(url, 0, 4)  # warm-up
            for _ in range(args.rounds):
                for side in rates:
                    workers = args.clients if side == "at once" else 1
                    started = time.perf_counter()
                    with ThreadPoolExecutor(workers) as pool:
                        asked = [pool.submit(ask, url, i, args.new) for i in range(args.clients)]
                        found = [each.result() for each in asked]
                    took = time.perf_counter() - started
                    rates[side].append(sum(count for _, count in found) / took)
                    replies[side] = [text for text, _ in found]
        finally:
            process.terminate()
            process.wait()
    same = sum(a == b for a, b in zip(*replies.values(), strict=True))
    for side, values in rates.items():
        line = {
            "benchmark": "serve",
            "side": side,
            "clients": args.clients,
            "new_tokens": args.new,
            "batch_size": args.batch_size,
            **spread("tokens_per_s", values),
            "rounds": args.rounds,
            "equal_replies": same,
            **origin(args.device),
        }
        if side == "at once":
            times = [b / a for a, b in zip(rates["one by one"], values, strict=True)]
            line |= spread("at_once_is_times_faster", times, 2)
        emit(line, args.out)


def model_directory(path: Path) -> Path:
    """A random Llama-like model of about 20 M parameters whose tokenizer has no stop token."""
    tokenizer = train_tokenizer(["one two three four five six seven eight"] * 4, 300)
    config = llama(8192, 512, 6, 8, max_positions=2048)
    model = Transformer(config)
    init_weights(model, seed=0)
    save_model(model, path, Chat(tokenizer), {"stage": "benchmark"})
    return path


def start(*words: str) -> tuple[subprocess.Popen[str], str]:
    """`whet serve` with these words on a free port, and its address."""
    command = [sys.executable, "-m", "whet.cli", "serve", *words, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"chat page +(http://\S+)/", line):
            return process, found[1]
    raise RuntimeError(said)


def ask(url: str, number: int, new: int) -> tuple[str, int]:
    """The greedy reply to prompt `number`, and how many tokens it has."""
    body = {"prompt": "one two " * (number % 9) + str(number), "temperature": 0, "max_tokens": new}
    request = Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=600) as answer:
        reply = json.load(answer)
    return reply["choices"][0]["text"], reply["usage"]["completion_tokens"]


if __name__ == "__main__":
    main()
