"""A training command from its flags to its exit code, the same for every stage.

ranks -> settings -> where the run stands -> stage -> all checks -> header -> loop -> final model
"""

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from whet.config import check, read_toml
from whet.errors import UserError
from whet.flags.training import TrainSettings, lighter, sharding_flaws
from whet.model.precision import multiplies_bf16, use_float8
from whet.progress import count, duration
from whet.report.run_page import write_page
from whet.train import distributed, memory, optim, state
from whet.train.distributed import Ranks
from whet.train.loop import train
from whet.train.profile import check_profile
from whet.train.resume import (
    check_same_inputs,
    continues,
    find_start,
    frozen_fingerprint,
    is_longer,
)
from whet.train.run import RunFolder, open_curves, planned
from whet.train.signals import stop_on_signals
from whet.train.stage import Stage
from whet.train.state import Facts
from whet.train.step import autocast, dtype_of

C = TypeVar("C", bound=TrainSettings)
DEFAULT_MICRO_BATCH = 4


def run_stage(
    config: C,
    command: str,
    build: Callable[[C, Ranks], Stage],
    prepare: Callable[[C, Ranks], C] | None = None,
) -> int:
    """Train the stage that `build` makes of `config`; returns the exit code of `whet <command>`.

    `prepare` runs on rank 0, before, and returns the settings that all ranks go on with. `build`
    loads and checks on every rank, and must not talk to other ranks.
    """
    with distributed.start_ranks(config.device, config.rank_timeout) as ranks:
        memory.keep_freed(ranks.device)
        with distributed.together(ranks):
            config = resolve(config, ranks)
            check(config)
            start = find_start(config, command) if ranks.first else None
            longer = is_longer(config)
        start = distributed.from_first(start, ranks, ranks.setup)
        with distributed.together(ranks):
            if ranks.first and prepare is not None:
                config = prepare(config, ranks)
        config = distributed.from_first(config, ranks, ranks.setup)
        run = RunFolder(config.out, ranks, quiet=config.quiet, keep=config.keep)
        with distributed.together(ranks):
            stage = build(config, ranks)
        return _train(config, command, stage, ranks, run, start, longer)


def _train(
    config: C,
    command: str,
    stage: Stage,
    ranks: Ranks,
    run: RunFolder,
    start: Path | None,
    longer: bool,
) -> int:
    with distributed.together(ranks):
        if ranks.first and stage.rehearse is not None:
            stage.rehearse(stage.model)
        if config.compile and not len(getattr(stage.model, "layers", ())):
            raise UserError("--compile: this architecture has no list of layers; leave it out")
    model = stage.model.to(ranks.device)
    now = Facts(
        data=stage.documents.fingerprint,
        dev=stage.dev.fingerprint if stage.dev is not None else "",
        frozen=frozen_fingerprint(model),
    )
    if config.float8:
        with distributed.together(ranks):
            use_float8(model, ranks.device)
    if config.compile:
        compile_layers(model)
    if ranks.size > 1:
        bf16 = config.precision == "bf16"
        model = distributed.spread(model, ranks, shard=config.shard, bf16=bf16)
    stage = dataclasses.replace(stage, model=model)
    with distributed.together(ranks):
        optimizers = make_optimizers(model, config)
    if stage.at_start is not None:
        with autocast(ranks.device, dtype_of(config)), memory_in_words(config, command, ranks):
            stage.at_start(model, ranks)
        distributed.reshard(model)
    run.facts = now
    if start is not None:
        run.facts = state.load_state(start, model, optimizers, ranks)
        run.resumed_at = run.facts.step
    with distributed.together(ranks):
        if start is None and config.profile:
            check_profile(stage.total_steps)
        if start is not None:
            check_same_inputs(run.facts, now, config)
            if longer and ranks.first:
                state.remove_after(run.states, run.facts.step)
        run.facts.total_steps = stage.total_steps
        run.facts.decay_step = optim.decay_begin(stage.total_steps, config.schedule, config.warmup)
        known = {"total_steps": stage.total_steps, "plan": planned(config, ranks.size)}
        run.open(about(command) | known, config)
        if ranks.first:
            values = {key: str(value) for key, value in dataclasses.asdict(config).items()}
            run.curves = open_curves(run.path, run.facts.step, config.wandb_project, values)
    _print_header(config, command, stage, run, ranks)
    if config.compile or config.optimizer == "adamw8bit":
        run.say("the first step compiles code, too: it can take a minute or more")
    try:
        in_words = memory_in_words(config, command, ranks)
        with stop_on_signals(config.grace_seconds) as stop, in_words:
            ended_by = train(stage, config, optimizers, ranks, run, stop)
        run.finish_saving()
        if ended_by:
            run.say(f"stopped at step {run.facts.step}, saved; add --resume to go on")
            return 128 + ended_by
        return _finish(stage, run)
    finally:
        run.finish_saving()
        run.close()


def compile_layers(model: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compile each layer by itself, once for all shapes: batches of packed rows differ in the
    number of tokens, and a graph for each of them would cost more than it brings."""
    for layer in getattr(model, "layers", ()):
        layer.compile(backend=backend, dynamic=True)


def make_optimizers(model: nn.Module, config: TrainSettings) -> list[torch.optim.Optimizer]:
    """The optimizer(s) of the trained parameters, by the run's settings."""
    inner, lr_groups = distributed.unwrap(model), list[tuple[str, float]]()
    if config.lr_groups:
        names = [name for name, p in inner.named_parameters() if p.requires_grad]
        lr_groups = optim.parse_lr_groups(config.lr_groups, names)
    return optim.make_optimizers(
        config.optimizer,
        optim.parameter_groups(inner, config.weight_decay, lr_groups),
        beta2=config.beta2,
    )


def resolve(config: C, ranks: Ranks) -> C:
    """Put numbers where a flag says `auto` or was left out, so that config.toml says what ran."""
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(ranks.device) else "float32"
    micro = config.micro_batch_size or DEFAULT_MICRO_BATCH
    # A continued run keeps its precision, also on another machine.
    saved = config.out / "config.toml"
    if config.precision == "auto" and saved.is_file() and continues(config):
        precision = read_toml(type(config), saved).get("precision", precision)
    return dataclasses.replace(config, precision=precision, micro_batch_size=micro)


def about(command: str) -> dict[str, str]:
    """What else made the numbers of a run: the command and the versions; torchrun's job; and the
    directory that its paths are relative to."""
    return {
        "command": command,
        "job": distributed.job(),
        "directory": os.getcwd(),
        "whet": version("whet"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@contextlib.contextmanager
def memory_in_words(config: TrainSettings, command: str, ranks: Ranks) -> Iterator[None]:
    """Raise UserError where the device has no room for what the block computes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "can't allocate memory" not in str(error):  # what torch says on a CPU
            raise
        raise UserError(out_of_memory(config, command, ranks)) from error


def out_of_memory(config: TrainSettings, command: str, ranks: Ranks) -> str:
    """What to change when the device has no room for a step; the numbers stay the same."""
    micro, recompute = config.micro_batch_size or 1, getattr(config, "recompute", "full")
    ways, hints = list[str](), list[str]()
    if micro > 1:
        ways.append(f"--micro_batch_size {micro // 2}")
    if recompute != "full":
        ways.append("--recompute selective" if recompute == "none" else "--recompute full")
    if ways:  # may change on the way; adapters, 8-bit moments are part of the run
        hints.append("and --resume to go on from the last save")
    if ranks.size > 1 and not config.shard and not sharding_flaws(config):
        ways.append("--shard")
    if command == "sft":
        hints.append("`whet plan` with the same flags measures what fits")
    elif hasattr(config, "auto"):
        hints.append("--auto measures what fits, in a new run")
    held, more = memory.peak_bytes(ranks.device) / 1e9, f" ({'; '.join(hints)})" if hints else ""
    return (
        f"--micro_batch_size {micro}: {ranks.device} is out of memory at {held:.1f} GB; use "
        f"{' or '.join(ways or lighter(config))}{more}"
    )


def total_steps(config: TrainSettings, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    steps = max(1, round(config.epochs * steps_per_epoch))
    return min(steps, config.max_steps) if config.max_steps else steps


def _print_header(
    config: TrainSettings, command: str, stage: Stage, run: RunFolder, ranks: Ranks
) -> None:
    run.say(f"whet {command}")
    trained = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    layout = count(ranks.size, "ranks")
    layout += " (sharded)" if config.shard and ranks.size > 1 else ""
    where = (
        torch.cuda.get_device_name()
        if ranks.device.type == "cuda"
        else (f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores a rank")
    )
    there = min(len(stage.documents), config.overfit_rows or len(stage.documents))
    rows = f"{config.batch_size} {stage.rows}"
    if there < config.batch_size:
        rows = f"{there} {stage.rows} (all there are; --batch_size is {config.batch_size})"
    lines = [
        *stage.header,
        (
            "steps",
            f"{stage.total_steps:,} of {rows}, {config.micro_batch_size} rows a forward pass, "
            f"{layout}",
        ),
        (
            "optimizer",
            f"{config.optimizer}, {trained:,} trained parameters, lr {config.lr:g} "
            f"{config.schedule}, clip {config.clip:g}, decay {config.weight_decay:g}",
        ),
        ("precision", f"{config.precision} on {where}"),
        ("writes", str(run.path)),
    ]
    for word, line in lines:
        run.say(f"  {word:<10} {line}")
    for line in run.curves.missing:
        run.say(f"  {'note':<10} {line}")
    if run.facts.step:
        run.say(f"  {'resumes':<10} at step {run.facts.step} of {stage.total_steps}")


def _finish(stage: Stage, run: RunFolder) -> int:
    """Write the final model; a kill in the middle of it is made good by `--resume`."""
    metrics = last_metrics(run.path / "metrics.jsonl") if run.ranks.first else {}
    stage.save_model(stage.model, run.path, metrics)
    distributed.wait_for_all(run.ranks)
    run.say(f"done: {count(run.facts.step, 'steps')} in {duration(run.facts.seconds)}")
    for word, line in files_of(stage, run):
        run.say(f"  {word:<10} {line}")
    if run.ranks.first:
        with contextlib.suppress(UserError):  # a full disk: the model is what counts
            run.say(f"  {'report':<10} {write_page([run.path])}")
    return 0


def files_of(stage: Stage, run: RunFolder) -> list[tuple[str, str]]:
    """Where the results are, and what to type next."""
    lines = [("model", str(run.path)), ("next", stage.next.format(run=run.path))]
    if run.facts.best_step > 0 and (best := run.path / "best").is_dir():
        value = f"{stage.best} {run.facts.best_value:.4g}"
        lines.append(("best", f"{best}: step {run.facts.best_step}, {value}"))
    if (run.path / "samples.jsonl").is_file() and (run.path / "samples.jsonl").stat().st_size:
        lines.append(("replies", str(run.path / "samples.jsonl")))
    if (run.path / "tensorboard").is_dir():
        lines.append(("curves", f"tensorboard --logdir {run.path / 'tensorboard'}"))
    return lines


def last_metrics(path: Path) -> dict[str, float]:
    """The numbers of the last step and the last evaluation."""
    merged: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a broken line must not cost the model
            merged |= json.loads(line)
    return merged
