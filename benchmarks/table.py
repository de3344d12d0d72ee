"""A file of results -> rows of the table in docs/history/measurements.md.

python -m benchmarks.table benchmarks/results/2026-11-25-cpu.json
"""

import json
import sys
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(rows(found))


def rows(found: dict[str, Any]) -> str:
    """The table of a file of results, with where and when it was measured below."""
    text = ["| what | against | aim | measured | command |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        for cells in CELLS[row["name"]](row["lines"]):
            text.append("| " + " | ".join((*cells, f"`{row['command']}`")) + " |")
    load = f"load {found['load_before']:.1f} to {found.get('load_after', 0):.1f}"
    where = f"{found['machine']}, {found['threads']} threads, torch {found['versions']['torch']}"
    return "\n".join([*text, "", f"Of {found['date']}, on {where}, {load}."])


def ratio(line: Line, key: str) -> str:
    """`median x (minimum to maximum)`."""
    low, high = line.get(f"{key}_min"), line.get(f"{key}_max")
    around = "" if low is None else f" ({low} to {high})"
    return f"{line[key]} ×{around}"


def by_side(lines: list[Line]) -> dict[str, Line]:
    return {line["side"]: line for line in lines}


def training(lines: list[Line]) -> list[tuple[str, ...]]:
    if lines[0]["benchmark"] == "products":
        return [products(lines)]
    found, aims = by_side(lines), {"plain": "2.5 ×", "trl": "4 ×", "trl_by_row": "4 ×"}
    ours, cells = found["whet"], []
    for side, aim in aims.items():
        if side not in found:
            continue
        line = found[side]
        measured = (
            f"{ratio(line, 'whet_is_times_faster')} at {ours['tokens_per_s']:.0f} tokens/s; by "
            f"processor time {line['whet_is_times_faster_by_cpu']} ×"
        )
        cells.append((f"training, tokens/s, CPU, {ours['precision']}", side, aim, measured))
    for side in ("trl", "trl_by_row"):
        if side in found:
            share = found[side]["whet_needs_share_of_memory"]
            measured = f"{share} (TRL {found[side]['peak_gb']} GB)"
            cells.append(("peak memory of that step", side, "a third", measured))
    return cells


def products(lines: list[Line]) -> tuple[str, ...]:
    found = by_side(lines)
    measured = (
        f"not measured: this CPU emulates bf16, {found['bf16']['gflops']} GFLOP/s against "
        f"{found['float32']['gflops']} in float32; `--precision auto` takes float32"
    )
    return ("training, tokens/s, CPU, bf16", "trl, plain", "4 ×, 2.5 ×", measured)


def head(lines: list[Line]) -> list[tuple[str, ...]]:
    found = by_side(lines)
    ours, cells = found.pop("whet"), []
    for side, line in found.items():
        measured = (
            f"{line['whet_is_times_faster']} ×, by processor time "
            f"{line['whet_is_times_faster_by_cpu']} ×; {ours['peak_mb']} against "
            f"{line['peak_mb']} MB"
        )
        aim = "2 ×" if side == "full" else "faster"
        cells.append(("fused head + loss, CPU, half trained", side, aim, measured))
    return cells


def generating(lines: list[Line]) -> list[tuple[str, ...]]:
    peers = {"no cache": ("decoding without a cache", "10 ×")}
    peers["transformers"] = ("transformers' `generate`, padded", "3 ×")
    cells = []
    for line in lines:
        if line["side"] in peers:
            replies = f"{line['new_tokens']} new tokens"
            if line.get("replies") == "gsm8k":
                replies = "replies as long as GSM8K's"
            what = f"generation, {replies}, {line['prompts']} prompts"
            cells.append((what, *peers[line["side"]], ratio(line, "cache_is_times_faster")))
    return cells


def sharing(lines: list[Line]) -> list[tuple[str, ...]]:
    line = by_side(lines)["each"]
    what = f"a system prompt of {line['prompt']} tokens, once a batch (processor time)"
    return [(what, "once a document", "–", ratio(line, "once_is_times_faster"))]


def opening(lines: list[Line]) -> list[tuple[str, ...]]:
    cells = []
    for line in lines:
        if "times_the_read" not in line:
            continue
        what = f"opening {line['file']}, {line['side']}, {line['cache']} page cache"
        skim, own = line["times_the_skim"], line["peak_own_of_weights"]
        measured = (
            f"{ratio(line, 'times_the_read')}, {skim} × a read that keeps nothing; peak memory "
            f"{own} × the weights, {line['peak_resident_of_weights']} with the file's pages"
        )
        cells.append((what, "the file's read time", "1.5 ×, 1.3 × the weights", measured))
    return cells


def helping(lines: list[Line]) -> list[tuple[str, ...]]:
    line = lines[0]
    torch = "torch imported" if line["torch_imported"] else "no torch import"
    low, high = line["seconds_min"], line["seconds_max"]
    around = f"{line['seconds']} s ({low} to {high}), {torch}; an empty Python takes "
    return [("`whet --help`", "–", "0.4 s", around + f"{line['empty_python_seconds']} s")]


def packing(lines: list[Line]) -> list[tuple[str, ...]]:
    data, million = lines
    best = f"best fit decreasing {data['filled_by_best_fit_decreasing']:.2%}"
    filled = f"{data['filled']:.2%}"
    fast = f"{million['seconds']} s, {million['filled']:.2%} filled"
    return [
        (f"rows filled, {data['data']} at {data['context_length']}", best, "99.5 %", filled),
        ("packing a million documents", "–", "5 s", fast),
    ]


def preparing(lines: list[Line]) -> list[tuple[str, ...]]:
    line = lines[0]
    raw = f"{line['whet_over_raw']:.0%}, by processor time {line['whet_over_raw_by_cpu']:.0%}"
    cells = [("`whet prepare`, certificate included", "raw `encode_batch`", "70 %", raw)]
    if "whet_over_trl" in line:
        trl = f"{line['whet_over_trl']} ×, by processor time {line['whet_over_trl_by_cpu']} ×"
        cells.append(("the same", "TRL's preparation", "2 ×", trl))
    return cells


CELLS = {
    "help": helping,
    "head": head,
    "shared": sharing,
    "generate": generating,
    "generate_64": generating,
    "generate_gsm8k": generating,
    "train": training,
    "train_bf16": training,
    "open": opening,
    "packing": packing,
    "prepare": preparing,
}

if __name__ == "__main__":
    main()
