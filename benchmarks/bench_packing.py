"""How fast and how full rows are packed.

    python -m benchmarks.bench_packing --data gsm8k/train.jsonl --tokenizer DIR

Two sets of lengths: the conversations of the data file, and a million lengths drawn from them.
Printed is one JSON line for each: documents, rows, share of the places that are filled, seconds,
and the same share for best-fit decreasing.
"""

import argparse
import bisect
import time
from pathlib import Path

import numpy as np

from benchmarks.lines import emit, origin
from whet.chat.chat import load_tokenizer
from whet.chat.encode import Encoded, encode_many
from whet.data.formats import to_example
from whet.data.packing import Packing, pack
from whet.data.reader import parse, read_units


def fill(lengths: np.ndarray, packing: Packing, capacity: int) -> float:
    """The share of the rows' places that hold a token (1.0 is full)."""
    return float(np.sum(lengths)) / max(1, packing.n_rows * capacity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--context_length", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    lengths = lengths_of(args.data, args.tokenizer, args.context_length)
    drawn = np.random.default_rng(0).choice(lengths, 1_000_000)
    for name, some in ((args.data.name, lengths), ("a million drawn from it", drawn)):
        started = time.perf_counter()
        packing = pack(some, args.context_length)
        seconds = time.perf_counter() - started
        line = {
            "benchmark": "packing",
            "data": name,
            "context_length": args.context_length,
            "documents": len(some),
            "rows": packing.n_rows,
            "filled": round(fill(some, packing, args.context_length), 5),
            "filled_by_best_fit_decreasing": round(best_fit(some, args.context_length), 5),
            "seconds": round(seconds, 2),
            **origin(),
        }
        emit(line, args.out)


def lengths_of(data: Path, directory: Path, limit: int) -> np.ndarray:
    """Tokens of each conversation that fits into `limit`."""
    chat = load_tokenizer(directory)
    conversations = [to_example(parse(unit)) for unit in read_units(str(data))]
    encoded = encode_many(conversations, chat)
    lengths = [len(e.ids) for one in encoded if isinstance(one, Encoded) for e in one.examples]
    return np.array([length for length in lengths if length <= limit])


def best_fit(lengths: np.ndarray, capacity: int) -> float:
    """The share that best-fit decreasing fills, one document after another."""
    free: list[int] = []
    n_rows = 0
    for length in np.sort(lengths)[::-1].tolist():
        i = bisect.bisect_left(free, length)
        if i < len(free):
            space = free.pop(i)
        else:
            space, n_rows = capacity, n_rows + 1
        bisect.insort(free, space - length)
    return float(lengths.sum()) / (n_rows * capacity)


if __name__ == "__main__":
    main()
