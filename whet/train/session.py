"""A training command from its flags to its exit code, the same for every stage.

ranks -> settings -> where the run stands -> stage -> all checks -> header -> loop -> final model
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from whet.config import FREE, check, marked, problems, read_toml
from whet.errors import UserError
from whet.files import unwritable_folder
from whet.flags.training import TrainSettings
from whet.model.float8 import use_float8
from whet.model.precision import multiplies_bf16
from whet.train import distributed, memory, optim, state
from whet.train.curves import open_curves
from whet.train.distributed import Ranks
from whet.train.loop import train
from whet.train.profile import check_profile
from whet.train.run import RunFolder
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
    prepare: Callable[[C, Ranks], C] = lambda config, ranks: config,
) -> int:
    """Train the stage that `build` makes of `config`; returns the exit code of `whet <command>`.

    `prepare` runs on rank 0, before, and returns the settings that all ranks go on with. `build`
    loads and checks on every rank, and must not talk to other ranks.
    """
    with distributed.start_ranks(config.device, config.rank_timeout) as ranks:
        memory.keep_freed(ranks.device)
        with distributed.told_once(ranks):
            config = resolve(config, ranks)
            check(config)
            start = find_start(config, command) if ranks.first else None
        start = distributed.from_first(start, ranks, ranks.setup)
        with distributed.told_once(ranks):
            if ranks.first:
                config = prepare(config, ranks)
        config = distributed.from_first(config, ranks, ranks.setup)
        run = RunFolder(config.out, ranks, quiet=config.quiet, keep=config.keep)
        with distributed.told_once(ranks):
            stage = build(config, ranks)
        return _train(config, command, stage, ranks, run, start)


def _train(
    config: C, command: str, stage: Stage, ranks: Ranks, run: RunFolder, start: Path | None
) -> int:
    with distributed.told_once(ranks):
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
        with distributed.told_once(ranks):
            use_float8(model, ranks.device)
    if config.compile:
        compile_layers(model)
    model = distributed.spread(model, ranks, shard=config.shard, bf16=config.precision == "bf16")
    stage = dataclasses.replace(stage, model=model)
    with distributed.told_once(ranks):
        optimizers = make_optimizers(model, config)
    if stage.at_start is not None:
        with autocast(ranks.device, dtype_of(config)):
            stage.at_start(model, ranks)
        distributed.reshard(model)
    run.facts = now
    if start is not None:
        run.facts = state.load_state(start, model, optimizers, ranks)
        run.resumed_at = run.facts.step
    with distributed.told_once(ranks):
        if start is None:
            check_profile(config.profile, stage.total_steps)
        else:
            _check_same_inputs(run.facts, now, config)
        run.take(about(command), config)
        run.open()
        if ranks.first:
            values = {key: str(value) for key, value in dataclasses.asdict(config).items()}
            run.curves = open_curves(run.path, run.facts.step, config.wandb_project, values)
    _tell_header(config, command, stage, run, ranks)
    try:
        with stop_on_signals(config.grace_seconds) as stop:
            try:
                ended_by = train(stage, config, optimizers, ranks, run, stop)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise UserError(out_of_memory(config, ranks)) from error
            except RuntimeError as error:
                if "can't allocate memory" not in str(error):  # what torch says on a CPU
                    raise
                raise UserError(out_of_memory(config, ranks)) from error
        run.finish_saving()
        if ended_by:
            run.say(f"stopped at step {run.facts.step}, saved; add --resume to go on")
            return 128 + ended_by
        return _finish(config, command, stage, run)
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
    if config.optimizer == "adamw8bit" and distributed.is_sharded(model):
        raise UserError("--optimizer adamw8bit: its blocks can't be sharded; leave out --shard")
    inner = distributed.unwrap(model)
    names = [name for name, p in inner.named_parameters() if p.requires_grad]
    lr_groups = optim.parse_lr_groups(config.lr_groups, names)
    return optim.make_optimizers(
        config.optimizer,
        optim.parameter_groups(inner, config.weight_decay, lr_groups),
        beta1=config.beta1,
        beta2=config.beta2,
    )


def resolve(config: C, ranks: Ranks) -> C:
    """Put numbers where a flag says `auto` or was left out, so that config.toml tells what ran."""
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(ranks.device) else "float32"
    micro = config.micro_batch_size or DEFAULT_MICRO_BATCH
    # A continued run must not compute otherwise because it woke up on another machine.
    saved = config.out / "config.toml"
    if config.precision == "auto" and saved.is_file() and continues(config):
        precision = read_toml(type(config), saved).get("precision", precision)
    return dataclasses.replace(config, precision=precision, micro_batch_size=micro)


def about(command: str) -> dict[str, str]:
    """What else made the numbers of a run: the command and the versions; and torchrun's job."""
    return {
        "command": command,
        "job": distributed.job(),
        "whet": version("whet"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def continues(config: TrainSettings) -> bool:
    """Whether this process takes up an earlier one's run: by flag, or restarted by torchrun.

    A restarted process takes up only what its own job began: the first one may have been refused
    because the folder holds another run.
    """
    if config.resume or distributed.restarts() == 0:
        return config.resume
    run = config.out / "run.json"
    return not run.exists() or json.loads(run.read_text()).get("job") == distributed.job()


def find_start(config: TrainSettings, command: str) -> Path | None:
    """The state to continue from, or None to start at step 0.

    Raises UserError if the folder holds a run that this command would overwrite, or one made with
    other flags.
    """
    marks = ("config.toml", "metrics.jsonl", "state", "model.safetensors", "config.json")
    holds = [mark for mark in marks if (config.out / mark).exists()]
    problems(unwritable_folder("--out", config.out))
    model = [mark for mark in holds if mark in ("model.safetensors", "config.json")]
    if continues(config) and model and not (config.out / "config.toml").exists():
        raise UserError(
            f"--out {config.out}: holds a model that no run of Whet made ({model[0]}), which would "
            "be overwritten; give another folder"
        )
    if not continues(config):
        if holds:
            raise UserError(
                f"--out {config.out}: already holds a run ({holds[0]}); --resume continues it, "
                "or give another folder, or remove this one"
            )
        return None
    if (config.out / "config.toml").exists():
        _check_same_flags(config, config.out / "config.toml")
    start, passed_over = state.newest_valid(config.out / "state")
    for line in passed_over:
        print(f"warning: {line}", file=sys.stderr)
    return start


def _check_same_flags(config: TrainSettings, path: Path) -> None:
    before = read_toml(type(config), path)
    found = []
    free = marked(type(config), FREE)
    for field in dataclasses.fields(config):
        now, then = getattr(config, field.name), before.get(field.name)
        if field.name not in free and now != then:
            found.append(f"--{field.name} {now}: the run in {config.out} was started with {then}")
    if found:
        found.append(f"to continue it with its own flags: --config {path} --resume")
    problems(found)


def frozen_fingerprint(model: nn.Module) -> str:
    """Tells apart the weights that are not trained, by some numbers of each; "" if there are none.

    Those packed in 4 bits are left out: another device may round them otherwise.
    """
    frozen = {
        name: weight
        for name, weight in model.named_parameters()
        if not weight.requires_grad and weight.is_floating_point()
    }
    return weights_fingerprint(frozen) if frozen else ""


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Distinguishes models by names, shapes and about a thousand numbers of each weight."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        values = weight.detach().flatten()
        some = values[:: max(1, len(values) // 1024)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:32]


def _check_same_inputs(before: Facts, now: Facts, config: TrainSettings) -> None:
    """Refuse to go on with other files under the same names."""
    what = {
        "data": f"{getattr(config, 'data', 'the data')}: is not the file",
        "dev": f"{getattr(config, 'dev', 'the dev data')}: is not the file",
        "frozen": f"{getattr(config, 'model', 'the model')}: does not hold the frozen weights",
    }
    problems(
        [
            f"{words} that this run started with; restore it, or start a new run with another --out"
            for name, words in what.items()
            if getattr(before, name) != getattr(now, name)
        ]
    )


def out_of_memory(config: TrainSettings, ranks: Ranks) -> str:
    """What to change when the device has no room for a step; the numbers stay the same."""
    micro, recompute = config.micro_batch_size or 1, getattr(config, "recompute", "full")
    ways = []
    if micro > 1:
        ways.append(f"--micro_batch_size {micro // 2}")
    if recompute != "full":
        ways.append("--recompute selective" if recompute == "none" else "--recompute full")
    if ranks.size > 1 and not config.shard:
        ways.append("--shard")
    if not ways:
        ways = ["more GPUs with --shard", "--optimizer adamw8bit", "--lora_rank 16"]
    # What adapters and 8-bit moments are is part of the run; the others may change on the way.
    resumes = (
        "and --resume to go on from the last save; " if micro > 1 or recompute != "full" else ""
    )
    held = memory.peak_bytes(ranks.device) / 1e9
    return (
        f"--micro_batch_size {micro}: {ranks.device} is out of memory at {held:.1f} GB; use "
        f"{' or '.join(ways)} ({resumes}`whet plan` with the same flags measures what fits)"
    )


def total_steps(config: TrainSettings, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    steps = max(1, round(config.epochs * steps_per_epoch))
    return min(steps, config.max_steps) if config.max_steps else steps


def _tell_header(
    config: TrainSettings, command: str, stage: Stage, run: RunFolder, ranks: Ranks
) -> None:
    run.say(f"whet {command}")
    trained = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    layout = "1 rank" if ranks.size == 1 else f"{ranks.size} ranks"
    layout += " (sharded)" if config.shard and ranks.size > 1 else ""
    where = (
        torch.cuda.get_device_name()
        if ranks.device.type == "cuda"
        else (f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores a rank")
    )
    there = min(len(stage.documents), config.overfit_rows or len(stage.documents))
    rows = f"{config.batch_size} rows"
    if there < config.batch_size:
        rows = f"{there} rows (all there are; --batch_size is {config.batch_size})"
    lines = [
        *stage.header,
        (
            "steps",
            f"{stage.total_steps:,} of {rows}, {config.micro_batch_size} a forward pass, {layout}",
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


def _finish(config: TrainSettings, command: str, stage: Stage, run: RunFolder) -> int:
    """Write the final model; a kill in the middle of it is made good by `--resume`."""
    metrics = last_metrics(run.path / "metrics.jsonl") if run.ranks.first else {}
    stage.save_model(stage.model, run.path, metrics)
    distributed.wait_for_all(run.ranks)
    run.say(f"done: {run.facts.step} steps in {run.facts.seconds:,.0f} s; the model is {run.path}")
    if run.ranks.first:
        from whet.report.run_page import write_page

        with contextlib.suppress(UserError):  # a full disk: the model is what counts
            run.say(f"curves and samples: {write_page([run.path])}")
    return 0


def last_metrics(path: Path) -> dict[str, float]:
    """The numbers of the last step and the last evaluation."""
    merged: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a broken line must not cost the model
            merged |= json.loads(line)
    return merged
