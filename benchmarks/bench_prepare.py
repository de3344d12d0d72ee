"""`whet prepare` against the tokenizer's own raw rate and against the way TRL prepares.

    python -m benchmarks.bench_prepare --data gsm8k/train.jsonl --tokenizer DIR --repeat 8 \\
        --trl_python .bench/trl/bin/python

Same conversations, same tokenizer, same number of cores. The sides take turns, so a slow minute of
the machine meets all of them:

- raw: `encode_batch` of the conversations' rendered texts, with as many threads as cores: no JSON,
  no template, no mask, nothing written;
- whet: the whole command, from the start of the processes to the packed file, certificate included;
- trl: `datasets.map` over `apply_chat_template` with a tagged template (peers/trl_prepare.py),
  without its packing and without writing; the start of its processes included.

Printed is one JSON line: tokens/s of each as median over the rounds, and the two ratios, each the
median of the rounds' own, with their spread; the same by processor seconds, which other work on the
machine disturbs less.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.lines import cpu_of, emit, installed, origin, spread
from whet.chat.chat import Chat, load_tokenizer
from whet.chat.conversation import Conversation
from whet.data.account import totals
from whet.data.formats import Datum, to_example
from whet.data.prepare import Config, prepare
from whet.data.reader import parse, read_units

PEER = Path(__file__).with_name("peers") / "trl_prepare.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="conversations in any format")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="directory, with ChatML tokens"
    )
    parser.add_argument("--repeat", type=int, default=8, help="copies of the data, made different")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--trl_python", help="Python with requirements-trl.txt: runs the peer, too")
    parser.add_argument("--out", type=Path, help="append the JSON line to this file")
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.cores)  # the tokenizer's own threads
    sides = {"raw": raw, "whet": whet}
    if args.trl_python:
        sides["trl"] = partial(trl, python=args.trl_python)
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        copies(args.data, data, args.repeat)
        for _ in range(args.rounds):
            for side, run in sides.items():
                found[side].append(run(data, args.tokenizer, args.cores))
    median = {s: statistics.median(m.tokens / m.seconds for m in found[s]) for s in sides}
    by_cpu = {s: statistics.median(m.tokens / m.cpu for m in found[s]) for s in sides}
    line = {
        "benchmark": "prepare",
        "data": f"{args.data.name} x {args.repeat}",
        "tokenizer": args.tokenizer.name,
        "cores": args.cores,
        "rounds": args.rounds,
        "tokens_per_second": {side: round(rate) for side, rate in median.items()},
        "tokens_per_cpu_second": {side: round(rate) for side, rate in by_cpu.items()},
        **over("raw", found),
        **origin(versions=installed("tokenizers")),
    }
    if "trl" in found:
        line.update(over("trl", found))
    emit(line, args.out)


def over(side: str, found: dict[str, list["Measured"]]) -> dict[str, float]:
    """How many times `side`'s rate Whet's is, round by round: median and spread."""
    pairs = list(zip(found["whet"], found[side], strict=True))
    rates = [ours.tokens / ours.seconds / (it.tokens / it.seconds) for ours, it in pairs]
    by_cpu = [ours.tokens / ours.cpu / (it.tokens / it.cpu) for ours, it in pairs]
    name = f"whet_over_{side}"
    return {**spread(name, rates, 3), f"{name}_by_cpu": round(statistics.median(by_cpu), 3)}


def copies(source: Path, target: Path, repeat: int) -> None:
    """The conversations of `source`, `repeat` times, none the same as another."""
    with target.open("w") as file:
        for copy in range(repeat):
            for unit in read_units(str(source)):
                datum = to_example(parse(unit), None, str(source), unit.line)
                if not isinstance(datum, Conversation):
                    raise SystemExit(f"{datum.at.where}: is no conversation")
                messages = [dict(message) for message in datum.messages]
                messages[0]["content"] = f"({copy}) {messages[0]['content']}"
                file.write(json.dumps({"messages": messages}) + "\n")


class Measured(NamedTuple):
    tokens: int
    seconds: float
    cpu: float  # processor seconds of all processes


def cpu_seconds() -> float:
    """Of this process and all that it started, of those that still run, too."""
    lists = (file.read_text() for file in Path("/proc/self/task").glob("*/children"))
    running = [child for text in lists for child in text.split()]
    return sum(cpu_of(process, children=True) for process in ("self", *running))


def raw(data: Path, directory: Path, cores: int) -> Measured:
    """The tokenizer alone on the rendered texts, as many at a time as its threads like."""
    chat = load_tokenizer(directory)
    texts = [rendered(to_example(parse(unit)), chat) for unit in read_units(str(data))]
    started, busy = time.perf_counter(), cpu_seconds()
    tokens = 0
    for i in range(0, len(texts), 1024):
        batch = chat.tokenizer.backend.encode_batch(texts[i : i + 1024], add_special_tokens=False)
        tokens += sum(map(len, batch))
    return Measured(tokens, time.perf_counter() - started, cpu_seconds() - busy)


def rendered(datum: Datum, chat: Chat) -> str:
    assert isinstance(datum, Conversation)
    return chat.dialect.render(datum.messages)


def trl(data: Path, directory: Path, cores: int, python: str) -> Measured:
    command = [python, str(PEER), str(data), str(directory), str(cores)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    return Measured(found["tokens"], found["seconds"], found["cpu"])


def whet(data: Path, directory: Path, cores: int) -> Measured:
    started, busy = time.perf_counter(), cpu_seconds()
    accounts = prepare(
        Config(
            data=(str(data),),
            tokenizer=str(directory),
            out=str(data.with_name("packed.h5")),
            workers=cores,
        ),
        quiet=True,
    )
    seconds = time.perf_counter() - started
    return Measured(totals(accounts).tokens, seconds, cpu_seconds() - busy)


if __name__ == "__main__":
    main()
