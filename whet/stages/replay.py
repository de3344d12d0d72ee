"""`whet replay RUN --step N`: run one step of a run again and look at it, changing nothing.

Takes the newest valid state before the step, trains up to it in memory, and prints the step's loss,
gradient norm and documents. Since data, dropout and schedule are functions of the step, it is the
same step, of one rank on a CPU to the last bit; only an adapter's dropout is another one where the
run had several ranks, as each of them drops by its own numbers.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from whet.config import READ, marked, read_toml
from whet.errors import UserError
from whet.flags.replay import Config
from whet.flags.training import TrainSettings
from whet.model.precision import use_float8
from whet.progress import say, track
from whet.stages import dpo, grpo, ppo, pretrain, reward, sft
from whet.train import ledger, state
from whet.train.distributed import Ranks, start_ranks
from whet.train.session import make_optimizers
from whet.train.signals import Stop
from whet.train.stage import Stage
from whet.train.state import Facts
from whet.train.step import (
    apply_step,
    autocast,
    count_step,
    dtype_of,
    forward_backward,
    reason,
    recent_norms,
    to_device,
)

STAGES: dict[str, Any] = {
    "sft": sft,
    "pretrain": pretrain,
    "reward": reward,
    "dpo": dpo,
    "grpo": grpo,
    "ppo": ppo,
}


def main(config: Config) -> int:
    """`whet replay`."""
    settings, module = run_settings(config.run)
    if config.step < 1:
        raise UserError(f"--step {config.step}: steps are counted from 1")
    with start_ranks(settings.device) as ranks, tempfile.TemporaryDirectory() as beside:
        link(config.run, Path(beside))
        stage: Stage = module.build(dataclasses.replace(settings, out=Path(beside)), ranks)
        stage.model.to(ranks.device)
        if settings.float8:
            use_float8(stage.model, ranks.device)
        if config.step > stage.total_steps:
            raise UserError(f"--step {config.step}: the run has {stage.total_steps} steps")
        record = replay(stage, settings, config.run, config.step, ranks)
    if config.json:
        say(json.dumps(record))
        return 0
    say(f"step {record['step']}: {record['reason']}")
    say(f"train_loss {record['train_loss']}  grad_norm {record['grad_norm']}")
    for document in sorted(record["documents"], key=lambda d: str(d["loss"]), reverse=True):
        trained, loss = document["trained"], document["loss"]
        say(f"{ledger.named(document)}  trained {trained}  loss {loss}")
    return 0


def link(run: Path, beside: Path) -> None:
    """Let `beside` have what the run folder has: what a stage writes there stays there."""
    for path in run.iterdir():
        if path.name == "rollouts":
            (beside / path.name).mkdir()
            link(path, beside / path.name)
        elif path.name != "weights":  # what a server was given
            (beside / path.name).symlink_to(path.resolve())


def run_settings(run: Path) -> tuple[TrainSettings, Any]:
    """The settings that a run was started with, and the module of its stage."""
    try:
        about = json.loads((run / "run.json").read_text(encoding="utf-8"))
        module = STAGES[about["command"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}: is not the folder of a run ({error})") from None
    settings = module.Config(**read_toml(module.Config, run / "config.toml"))
    settings = _with_places(settings, Path(about.get("directory", ".")))
    return dataclasses.replace(settings, out=run, resume=True, quiet=True), module


def _with_places(settings: TrainSettings, directory: Path) -> TrainSettings:
    """Paths that are relative and are not found from here are looked for in `directory`, where the
    run was started."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Path | str) and field.name in marked(type(settings), READ):
            there = directory / value
            if not Path(value).exists() and there.exists():
                found[field.name] = type(value)(there) if isinstance(value, str) else there
    return dataclasses.replace(settings, **found)


def replay(stage: Stage, settings: TrainSettings, run: Path, step: int, ranks: Ranks) -> dict:
    """The record of step `step`, as an incident would have it."""
    optimizers = make_optimizers(stage.model, settings)
    if stage.at_start is not None:
        with autocast(ranks.device, dtype_of(settings)):
            stage.at_start(stage.model, ranks)
    start, passed_over = state.newest_valid(run / "state", at_most=step - 1)
    for line in passed_over:
        print(f"warning: {line}", file=sys.stderr)
    facts = state.load_state(start, stage.model, optimizers, ranks) if start else Facts()
    dtype, stop = dtype_of(settings), Stop(grace_s=0.0)
    recent = recent_norms(facts.recent_norms, ranks.device)
    with track("Replaying", step - 1 - facts.step, "steps") as bar:
        while True:
            if stage.before_step is not None:
                with autocast(ranks.device, dtype):
                    stage.before_step(facts.step, stage.model, ranks, stop)
            micros = to_device(stage.batches(facts.step), ranks.device)
            result = forward_backward(stage, facts.step, micros, settings, ranks, stop, dtype)
            if facts.step == step - 1:
                break
            verdict = apply_step(result, stage, settings, optimizers, recent)
            count_step(result, verdict, facts)
            facts.step += 1
            bar.advance()
    loss, norm = result.sums[:2].tolist()
    verdict = recent.judge(result.sums[0], result.sums[1], settings.clip)
    why = reason(loss, norm, verdict.tolist()) or "an ordinary step"
    records = ledger.records_of(result.seen, stage.documents)
    documents = ledger.describe(records, stage.documents)
    return ledger.incident(step, why, loss, norm, documents, run)
