"""Settings that fit into the memory there is: what `whet plan` shows and `--auto` takes.

Nothing is derived that can be tried: a setting is measured by a few real steps (`measure.py`).
Between settings memory is estimated by the one rule that it grows no faster than the rows of a
micro-batch, and the one chosen so is measured, too.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from whet.config import read_toml
from whet.errors import UserError
from whet.files import replaced, write_json
from whet.flags.training import lighter
from whet.progress import Progress, say, track
from whet.train import distributed, memory
from whet.train.distributed import Ranks
from whet.train.measure import Cost, cost_of, measure
from whet.train.run import priced
from whet.train.session import DEFAULT_MICRO_BATCH
from whet.train.stage import Stage
from whet.train.state import saving_bytes

C = TypeVar("C", bound=Any)
FITS = 0.9
"""Share of the memory that a proposal may need: predictions are good to a tenth."""
LARGEST = {"cpu": DEFAULT_MICRO_BATCH, "cuda": 32}
"""Rows of a micro-batch beyond which nothing is gained: the matrices are large enough."""
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """What was found. Memory in bytes."""

    flagged: Cost | None
    """The cost of the flags' own setting; None if there is no memory for it."""
    proposed: Cost | None
    limit: float


def make_plan(
    build: Callable[[Any, Ranks], Stage], config: Any, device: torch.device, ranks: int, quiet: bool
) -> Plan:
    """Measure the flags' setting, and the best that fits, for one of `ranks` ranks."""
    limit = memory_limit(config, device)
    share = -(-config.batch_size // ranks)
    cap = min(share, LARGEST[device.type])
    wanted = (min(config.micro_batch_size or DEFAULT_MICRO_BATCH, share), config.recompute)
    found: dict[tuple[int, str], Cost | None] = {}

    def at(rows: int, recompute: str, bar: Progress) -> Cost | None:
        if (rows, recompute) not in found:
            bar.advance(0, f"{rows} rows a micro-batch, recompute {recompute}")
            found[rows, recompute] = measure(cost_of, build, config, device, ranks, rows, recompute)
            bar.advance(1)
        return found[rows, recompute]

    with track("Measuring", unit="settings", quiet=quiet) as bar:
        flagged = at(*wanted, bar)
        for recompute in RECOMPUTE:
            one = at(1, recompute, bar)
            if one is None or needed(one, config, ranks) > FITS * limit:
                continue
            steps = needed(one, config, ranks) - (one.peak - one.stepped)
            rows, room = 1, FITS * limit - steps
            while 2 * rows <= cap and (2 * rows - 1) * one.transient <= room:
                rows *= 2
            proposed = at(rows, recompute, bar)
            while rows > 1 and (proposed is None or needed(proposed, config, ranks) > FITS * limit):
                rows //= 2
                proposed = at(rows, recompute, bar)
            return Plan(flagged, proposed, limit)
        return Plan(flagged, None, limit)


def memory_limit(config: Any, device: torch.device) -> float:
    """Bytes for one rank: --memory_gb, or what there is; ranks on a CPU share it."""
    if config.memory_gb is not None:
        return config.memory_gb * 1e9
    sharing = distributed.ranks_on_machine() if device.type == "cpu" else 1
    return memory.limit_bytes(device) / sharing


def needed(found: Cost, config: Any, ranks: int) -> float:
    """The peak of a run on one rank: what was measured, and what saving states takes beside it.

    Sharded ranks hold their share of what is held all the time; that part is not measured.
    """
    spared = found.state * (1 - 1 / ranks) if config.shard else 0.0
    return found.peak + saving(found, config, ranks) - spared


def saving(found: Cost, config: Any, ranks: int) -> float:
    """Bytes that a save takes, where a state is saved before the last step."""
    if not config.save_async or not 0 < config.save_every < found.steps:
        return 0.0
    trained = found.weights * found.trained / found.parameters
    return saving_bytes((trained + found.optimizer) / (ranks if config.shard else 1))


def step_seconds(found: Cost) -> float:
    """Seconds of an optimizer step: its micro-batches and the update."""
    return found.micros * found.micro_seconds + found.update_seconds


def as_json(found: Cost, config: Any, ranks: int) -> dict:
    """A setting with its cost; memory in GB (1e9 bytes)."""
    parts = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "activations": max(0, found.transient - found.head),
        "head": min(found.head, found.transient),
        "saving": saving(found, config, ranks),
        "process": found.process,
    }
    if found.peak > found.stepped:
        parts["rollouts"] = found.peak - found.stepped  # beyond what a step holds
    seconds = step_seconds(found)
    return {
        "micro_batch_size": found.rows,
        "recompute": found.recompute,
        "memory_gb": needed(found, config, ranks) / 1e9,
        "memory_parts_gb": {name: size / 1e9 for name, size in parts.items()},
        "parameters": found.parameters,
        "trained_parameters": found.trained,
        "flops_per_step": found.micros * found.micro_flops * ranks,
        "seconds_per_step": seconds,
        "tokens_per_s": found.micros * found.tokens * ranks / seconds,
        "steps": found.steps,
        "seconds": found.steps * seconds,
    }


def record(plan: Plan, config: Any, ranks: int) -> None:
    """Write `plan.json` for the report of the run in --out, unless a run stands there already."""
    if (config.out / "config.toml").exists():
        return
    costs = [as_json(found, config, ranks) for found in (plan.flagged, plan.proposed) if found]
    try:
        with replaced(config.out / "plan.json") as aside:
            write_json(aside, {"settings": priced(config, ranks), "costs": costs})
    except UserError as error:  # the plan itself is shown all the same
        print(f"note: {error}; the report will lack the plan", file=sys.stderr)


def flags_of(found: Cost) -> str:
    """The flags that make `whet sft` take this setting."""
    return f"--micro_batch_size {found.rows} --recompute {found.recompute}"


def no_room(plan: Plan, config: Any) -> str:
    """What to say where nothing fits."""
    return (
        f"no setting fits into {plan.limit / 1e9:.2f} GB, not even --micro_batch_size 1 "
        f"--recompute full; try {' or '.join(lighter(config))}"
    )


def with_proposal(config: C, ranks: Ranks, *, build: Callable[[Any, Ranks], Stage]) -> C:
    """`config` of `--auto` with the settings that fit; a continued run keeps those that it has.
    Only one rank calls it.

    Raises UserError if nothing fits.
    """
    saved = config.out / "config.toml"
    if saved.is_file():  # or the run would have been refused
        before = read_toml(type(config), saved)
        kept = {name: before[name] for name in ("micro_batch_size", "recompute")}
        return dataclasses.replace(config, **kept)
    plan = make_plan(build, config, ranks.device, ranks.size, config.quiet)
    if plan.proposed is None:
        raise UserError(f"--auto: {no_room(plan, config)}")
    record(plan, config, ranks.size)
    row = as_json(plan.proposed, config, ranks.size)
    if not config.quiet:
        gb, limit = row["memory_gb"], plan.limit / 1e9
        say(f"--auto chose {flags_of(plan.proposed)}: {gb:.2f} of {limit:.2f} GB")
    chosen = {"micro_batch_size": plan.proposed.rows, "recompute": plan.proposed.recompute}
    return dataclasses.replace(config, **chosen)
