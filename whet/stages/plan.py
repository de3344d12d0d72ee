"""`whet plan`: what `whet sft` with the same flags will need, and settings that fit.

Nothing is derived that can be tried: a setting is measured by a few real steps (`train/dry.py`).
Between settings memory is estimated by the one rule that it grows no faster than the rows of a
micro-batch, and the one chosen so is measured, too.
"""

import dataclasses
import json
from dataclasses import dataclass

import torch

from whet.config import check
from whet.data.batches import Batch
from whet.errors import UserError
from whet.flags.plan import Config
from whet.model.decoder import Transformer
from whet.model.float8 import use_float8
from whet.model.footprint import attention_flops, head_bytes
from whet.progress import Progress, duration, say, track
from whet.stages import sft
from whet.train import distributed, dry, memory
from whet.train.distributed import Ranks
from whet.train.dry import Cost
from whet.train.session import DEFAULT_MICRO_BATCH, make_optimizers, resolve
from whet.train.stage import Stage
from whet.train.state import saving_bytes

FITS = 0.9
"""Share of the memory that a proposal may need: predictions are good to a tenth."""
LARGEST = {"cpu": DEFAULT_MICRO_BATCH, "cuda": 32}
"""Rows of a micro-batch beyond which nothing is gained: the matrices are large enough."""
RECOMPUTE = ("none", "selective", "full")
LOOKED_AT = 32
"""Steps among which the fullest micro-batch is looked for."""


@dataclass(frozen=True)
class Measured:
    """A setting's cost on one rank, with what the command needs to know of the model."""

    cost: Cost
    head: int
    """Bytes of the head's buffers, counted."""
    parameters: int
    trained: int
    steps: int
    """Of the whole run."""
    micros: int
    """Micro-batches of a step, on a rank."""


@dataclass(frozen=True)
class Plan:
    """What was found. Memory in bytes."""

    flagged: Measured | None
    """The cost of the flags' own setting; None if there is no memory for it."""
    proposed: Measured | None
    limit: float


def make_plan(config: sft.Config, device: torch.device, ranks: int, quiet: bool) -> Plan:
    """Measure the flags' setting, and the best that fits, for one of `ranks` ranks."""
    limit = memory_limit(config, device)
    share = -(-config.batch_size // ranks)
    cap = min(share, LARGEST[device.type])
    wanted = (min(config.micro_batch_size or DEFAULT_MICRO_BATCH, share), config.recompute)
    found: dict[tuple[int, str], Measured | None] = {}

    def at(rows: int, recompute: str, bar: Progress) -> Measured | None:
        if (rows, recompute) not in found:
            bar.advance(0, f"{rows} rows a micro-batch, recompute {recompute}")
            found[rows, recompute] = dry.measure(cost_of, config, device, ranks, rows, recompute)
            bar.advance(1)
        return found[rows, recompute]

    with track("Measuring", unit="settings", quiet=quiet) as bar:
        flagged = at(*wanted, bar)
        for recompute in RECOMPUTE:
            one = at(1, recompute, bar)
            if one is None or needed(one, config, ranks) > FITS * limit:
                continue
            rows, room = 1, FITS * limit - needed(one, config, ranks)
            while 2 * rows <= cap and (2 * rows - 1) * one.cost.transient <= room:
                rows *= 2
            proposed = at(rows, recompute, bar)
            while rows > 1 and (proposed is None or needed(proposed, config, ranks) > FITS * limit):
                rows //= 2
                proposed = at(rows, recompute, bar)
            return Plan(flagged, proposed, limit)
        return Plan(flagged, None, limit)


def cost_of(
    config: sft.Config, device: torch.device, ranks: int, rows: int, recompute: str
) -> Measured:
    """Measure one setting; runs in a process of its own."""
    process = dry.process_bytes(device)
    config = dataclasses.replace(config, micro_batch_size=rows, quiet=True)
    stage = sft.build(config, Ranks(0, ranks, device))  # whose batches are the first rank's share
    model = stage.model.to(device)
    model.recompute = recompute  # type: ignore[assignment]
    if config.float8:
        use_float8(model, device)
    optimizers = make_optimizers(model, config)
    batches = dry_batches(stage)
    micros = batches[0]
    cost = dry.dry_run(stage, config, optimizers, batches, recompute, process, device)
    flops, head = 0.0, 0
    if isinstance(model, Transformer):
        plan = micros[0].plan
        flops = attention_flops(model.config, plan.sizes, again=recompute == "full")
        head = head_bytes(model, len(plan.trained), device, config.precision == "bf16")
    parameters = list(model.parameters())
    return Measured(
        cost=dataclasses.replace(cost, micro_flops=cost.micro_flops + flops),
        head=head,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        steps=stage.total_steps,
        micros=len(micros),
    )


def dry_batches(stage: Stage) -> list[list[Batch]]:
    """A rank's micro-batches of the run's first steps, in their order, and at last the step of the
    early ones that computes the most tokens.

    In their order, since an allocator's need depends on it: a block fits where a larger one was.
    """
    found = [stage.batches(step) for step in range(min(stage.total_steps, LOOKED_AT))]
    return [*found[: dry.STEPS - 1], max(found, key=lambda micros: sum(micros[0].plan.sizes))]


def memory_limit(config: sft.Config, device: torch.device) -> float:
    """Bytes for one rank: --memory_gb, or what there is; ranks on a CPU share it."""
    if config.memory_gb is not None:
        return config.memory_gb * 1e9
    sharing = distributed.ranks_on_machine() if device.type == "cpu" else 1
    return memory.limit_bytes(device) / sharing


def needed(found: Measured, config: sft.Config, ranks: int) -> float:
    """The peak of a run on one rank: what was measured, and what saving states takes beside it.

    Sharded ranks hold their share of what is held all the time; that part is not measured.
    """
    cost = found.cost
    spared = cost.state * (1 - 1 / ranks) if config.shard else 0.0
    return cost.peak + saving(found, config, ranks) - spared


def saving(found: Measured, config: sft.Config, ranks: int) -> float:
    """Bytes that a save takes, where a state is saved before the last step."""
    if not config.save_async or not 0 < config.save_every < found.steps:
        return 0.0
    trained = found.cost.weights * found.trained / found.parameters
    return saving_bytes((trained + found.cost.optimizer) / (ranks if config.shard else 1))


def step_seconds(found: Measured) -> float:
    """Seconds of an optimizer step: its micro-batches and the update."""
    return found.micros * found.cost.micro_seconds + found.cost.update_seconds


def as_json(found: Measured, config: sft.Config, ranks: int) -> dict:
    """A setting with its cost; memory in GB (1e9 bytes)."""
    cost = found.cost
    parts = {
        "weights": cost.weights,
        "gradients": cost.gradients,
        "optimizer": cost.optimizer,
        "activations": max(0, cost.transient - found.head),
        "head": min(found.head, cost.transient),
        "saving": saving(found, config, ranks),
        "process": cost.process,
    }
    seconds = step_seconds(found)
    return {
        "micro_batch_size": cost.rows,
        "recompute": cost.recompute,
        "memory_gb": needed(found, config, ranks) / 1e9,
        "memory_parts_gb": {name: size / 1e9 for name, size in parts.items()},
        "parameters": found.parameters,
        "trained_parameters": found.trained,
        "flops_per_step": found.micros * cost.micro_flops * ranks,
        "seconds_per_step": seconds,
        "tokens_per_s": found.micros * cost.tokens * ranks / seconds,
        "steps": found.steps,
        "seconds": found.steps * seconds,
    }


def show(plan: Plan, config: sft.Config, device: torch.device, ranks: int) -> None:
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
        say(no_room(plan))


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


def flags_of(found: Measured) -> str:
    """The flags that make `whet sft` take this setting."""
    return f"--micro_batch_size {found.cost.rows} --recompute {found.cost.recompute}"


def no_room(plan: Plan) -> str:
    """What to say where nothing fits."""
    return (
        f"no setting fits into {plan.limit / 1e9:.2f} GB, not even --micro_batch_size 1 "
        "--recompute full; try --lora_rank 16, or --shard on more ranks"
    )


def with_proposal(config: sft.Config, ranks: Ranks) -> sft.Config:
    """`whet sft --auto`: `config` with the proposed settings. Only one rank calls it.

    Raises UserError if nothing fits.
    """
    plan = make_plan(config, ranks.device, ranks.size, config.quiet)
    if plan.proposed is None:
        raise UserError(f"--auto: {no_room(plan)}")
    row = as_json(plan.proposed, config, ranks.size)
    if not config.quiet:
        gb, limit = row["memory_gb"], plan.limit / 1e9
        say(f"--auto chose {flags_of(plan.proposed)}: {gb:.2f} of {limit:.2f} GB")
    cost = plan.proposed.cost
    return dataclasses.replace(
        config,
        micro_batch_size=cost.rows,
        recompute=cost.recompute,  # type: ignore[arg-type]
    )


def main(config: Config) -> int:
    """`whet plan`."""
    with distributed.start_ranks(config.device, config.rank_timeout) as ranks:
        if not ranks.first:
            return 0
        resolved = resolve(dataclasses.replace(config, resume=False), ranks)
        check(resolved)
        plan = make_plan(resolved, ranks.device, ranks.size, config.quiet)
        if config.json:
            rows = {"flagged": plan.flagged, "proposed": plan.proposed}
            found = {name: row and as_json(row, resolved, ranks.size) for name, row in rows.items()}
            say(json.dumps({"memory_limit_gb": plan.limit / 1e9, **found}))
        else:
            show(plan, resolved, ranks.device, ranks.size)
    return 0
