"""`whet plan`: what `whet sft` with the same flags will need, and settings that fit."""

import dataclasses
import json

import torch

from whet.config import check
from whet.flags.plan import Config
from whet.progress import duration, say
from whet.stages import sft
from whet.train import distributed
from whet.train.proposal import Plan, as_json, flags_of, make_plan, no_room, record
from whet.train.session import resolve


def show(plan: Plan, config: Config, device: torch.device, ranks: int) -> None:
    """The plan for people."""
    known = plan.flagged or plan.proposed
    if known is not None:
        say(f"{'parameters':<11} {known.parameters:,}, of which {known.trained:,} are trained")
    say(f"{'memory':<11} {plan.limit / 1e9:.2f} GB for a rank on {device.type}")
    for word, found in (("as flagged", plan.flagged), ("proposed", plan.proposed)):
        if found is not None:
            say(f"{word:<11} {flags_of(found)}")
            for line in describe(as_json(found, config, ranks)):
                say(f"  {line}")
    if plan.proposed is None:
        say(no_room(plan, config))


def describe(row: dict) -> list[str]:
    """A setting's cost in three lines."""
    parts = ", ".join(f"{name} {size:.2f}" for name, size in row["memory_parts_gb"].items())
    seconds, flops = row["seconds_per_step"], row["flops_per_step"] / 1e12
    return [
        f"memory    {row['memory_gb']:.2f} GB: {parts}",
        f"step      {seconds:.3g} s, {flops:.3g} TFLOP, {flops / seconds:.3g} TFLOP/s, "
        f"{row['tokens_per_s']:,.0f} tokens/s",
        f"run       {row['steps']:,} steps in {duration(row['seconds'])}, besides start, "
        "evaluations and saves",
    ]


def main(config: Config) -> int:
    """`whet plan`."""
    with distributed.start_ranks(config.device, config.rank_timeout) as ranks:
        if not ranks.first:
            return 0
        resolved = resolve(dataclasses.replace(config, resume=False), ranks)
        check(resolved)
        plan = make_plan(sft.build, resolved, ranks.device, ranks.size, config.quiet)
        record(plan, resolved, ranks.size)
        if config.json:
            rows = {"flagged": plan.flagged, "proposed": plan.proposed}
            found = {name: row and as_json(row, resolved, ranks.size) for name, row in rows.items()}
            say(json.dumps({"memory_limit_gb": plan.limit / 1e9, **found}))
        else:
            show(plan, resolved, ranks.device, ranks.size)
    return 0
