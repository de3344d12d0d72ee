"""The only optimizer loop. A stage brings model, batches and loss; this brings the steps.

The loss of a step is sum(weight x nll) / sum(weight) over the global batch. Each micro-batch of
each rank gives its part of the upper sum; the lower one, `total`, is known beforehand. So
micro-batch size, accumulation and ranks change nothing but rounding.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet.data.batches import Batch
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.progress import Progress, track
from whet.train import distributed, incidents, ledger, optim
from whet.train.distributed import Ranks
from whet.train.run import RunFolder
from whet.train.settings import TrainSettings
from whet.train.signals import Interrupted, Stop
from whet.train.state import tensors_of

LEDGER_EVERY = 32  # steps whose documents wait on the device before they are read


@dataclass(frozen=True)
class Sums:
    """What a loss function gives for a micro-batch: sums, never means."""

    loss: Tensor
    """sum(weight x nll), a float32 scalar with a gradient."""
    nll: Tensor
    """(B, T) float32, detached: the loss of each token, 0 where the weight is 0."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; `metrics["dev_loss"]` decides which model is the best."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """What differs between pretraining, SFT and what comes after them."""

    model: nn.Module
    """As it was loaded; `session` spreads it over the ranks."""
    store: PackedStore
    """Where the rows come from; the ledger names their documents."""
    total_steps: int
    batches: Callable[[int], list[Batch]]
    """Step -> this rank's micro-batches of that global batch, on the CPU."""
    loss_fn: Callable[[nn.Module, Batch], Sums]
    evaluate: Callable[[nn.Module, Ranks, Stop], Evaluation]
    """All ranks call it; it raises Interrupted, on all of them, when the run was asked to stop."""
    save_model: Callable[[nn.Module, Path, dict[str, float]], None]
    """Write a model directory with these metrics in its lineage; all ranks call it."""
    header: Sequence[tuple[str, str]] = ()
    """What to tell before training: (word, line)."""


@dataclass
class StepResult:
    """A step's forward and backward passes, before anything is applied."""

    loss: float
    norm: Tensor
    tokens: int
    weight: float
    epoch: int
    stop: int
    seen: list[ledger.Seen]


def train(
    stage: Stage,
    settings: TrainSettings,
    optimizers: Sequence[torch.optim.Optimizer],
    ranks: Ranks,
    run: RunFolder,
    stop: Stop,
) -> int:
    """Train from where `run.facts` stands to the end.

    Returns 0, or the number of the signal that ended it. Raises UserError if a step is not to be
    applied and `--on_spike` says stop, or the third in a row.
    """
    facts, seen, asked = run.facts, list[ledger.Seen](), 0
    dtype = dtype_of(settings)

    def save(wait: bool) -> None:
        _write_ledger(seen, stage.store, run, ranks)
        run.save(tensors_of(stage.model, optimizers), wait=wait)

    with (
        _batches_ahead(stage.batches, facts.step, stage.total_steps) as batches,
        _bar(stage, run) as bar,
    ):
        while True:
            at_end = facts.step == stage.total_steps
            to_evaluate = at_end or facts.step == 0 or _due(facts.step, settings.eval_every)
            if to_evaluate and facts.evaluated < facts.step and not asked:
                asked = _evaluate(stage, run, stop, ranks, dtype)
            if asked:
                save(wait=True)
                return asked
            if settings.save_every and (at_end or _due(facts.step, settings.save_every)):
                save(wait=at_end or not settings.save_async)
            if at_end:
                _write_ledger(seen, stage.store, run, ranks)
                return 0
            started = time.monotonic()
            result = forward_backward(
                stage, facts.step, next(batches), settings, ranks, stop, dtype
            )
            seen += result.seen
            asked = result.stop
            apply_step(result, stage, settings, optimizers, run, ranks)
            _log_step(result, time.monotonic() - started, settings, stage, run, bar)
            facts.step += 1
            if facts.step % LEDGER_EVERY == 0:
                _write_ledger(seen, stage.store, run, ranks)


def forward_backward(
    stage: Stage,
    step: int,
    micros: Sequence[Batch],
    settings: TrainSettings,
    ranks: Ranks,
    stop: Stop,
    dtype: torch.dtype | None,
) -> StepResult:
    """Add up the gradient of global batch `step` on this rank and over all ranks."""
    model = stage.model.train()
    seed_step(settings.seed, step, ranks.rank)
    total = micros[0].total
    factor = distributed.gradient_factor(model, ranks) / total if total else 0.0
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    asked = stop.number
    seen, tokens = [], 0
    for i, micro in enumerate(micros):
        segments = int(micro.segments.max()) if micro.segments.numel() else 0
        tokens += int((micro.segments != 0).sum())
        batch = micro.to(ranks.device)
        with distributed.sync_gradients(model, now=i == len(micros) - 1):
            with autocast(ranks.device, dtype):
                part = stage.loss_fn(model, batch)
            (part.loss * factor).backward()
        loss += part.loss.detach()
        seen.append(ledger.see(step + 1, batch, segments, part.nll))
    norm = distributed.gradient_norm(list(stage.model.parameters()))
    # One exchange a step: the loss, the tokens, and whether some rank was asked to stop. A signal
    # that comes from here on counts in the next step: all ranks must decide alike.
    sums = distributed.sum_over_ranks([float(loss), tokens, asked], ranks)
    return StepResult(
        loss=sums[0] / total if total else 0.0,
        norm=norm,
        tokens=int(sums[1]),
        weight=total,
        epoch=micros[0].epoch,
        stop=asked or (signal.SIGTERM if sums[2] else 0),
        seen=seen,
    )


def apply_step(
    result: StepResult,
    stage: Stage,
    settings: TrainSettings,
    optimizers: Sequence[torch.optim.Optimizer],
    run: RunFolder,
    ranks: Ranks,
) -> None:
    """Clip and take the optimizer step, or record why not."""
    facts, norm = run.facts, float(result.norm)
    reason = incidents.judge(result.loss, norm, facts, settings.clip)
    if reason is not None:
        facts.spikes_in_a_row += 1
        facts.incident_step = facts.step + 1
        _record_incident(reason, result, norm, stage, run, ranks)
        if settings.on_spike == "stop" or facts.spikes_in_a_row >= incidents.IN_A_ROW:
            run.finish_saving()
            raise UserError(
                f"stopped at step {facts.step + 1}: {reason} ({facts.spikes_in_a_row} in a row); "
                f"its documents and the command that replays it: {run.incident(facts.step + 1)}; "
                "earlier states are kept"
            )
    elif result.weight:  # where nothing is trained, not even weight decay moves the weights
        if settings.clip:
            distributed.scale_gradients(list(stage.model.parameters()), result.norm, settings.clip)
        optim.set_lr(optimizers, lr_of(settings, facts.step, stage.total_steps))
        for optimizer in optimizers:
            optimizer.step()
        incidents.remember(norm, facts)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def lr_of(settings: TrainSettings, step: int, total_steps: int) -> float:
    """Learning rate of a step of this run."""
    return optim.lr_at(
        step,
        total_steps,
        peak=settings.lr,
        schedule=settings.schedule,
        warmup=settings.warmup,
        final=settings.final_lr,
    )


def dtype_of(settings: TrainSettings) -> torch.dtype | None:
    """The dtype of autocast; None leaves everything in float32."""
    return torch.bfloat16 if settings.precision == "bf16" else None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make everything random in a step (dropout) a function of (seed, step, rank).

    So no random state has to be saved, and resuming on another number of ranks is well defined.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision: matrix products in `dtype`, weights and reductions in float32."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def _evaluate(
    stage: Stage, run: RunFolder, stop: Stop, ranks: Ranks, dtype: torch.dtype | None
) -> int:
    """Evaluate and log; returns the signal's number if it was cut short, and logs nothing then."""
    facts = run.facts
    try:
        # With several ranks an exception at any moment would leave the others waiting; there the
        # evaluation itself asks all ranks between its parts.
        with stop.interruptible(ranks.size == 1), autocast(ranks.device, dtype):
            found = stage.evaluate(stage.model, ranks, stop)
    except Interrupted:
        return stop.number or signal.SIGTERM
    facts.evaluated = facts.step
    for sample in found.samples:
        run.append("samples.jsonl", {"step": facts.step, **sample})
    if found.metrics:
        run.metrics(facts.step, found.metrics, {})
        shown = {k: v for k, v in found.metrics.items() if "/" not in k}
        run.say(f"step {facts.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))
    dev_loss = found.metrics.get("dev_loss")
    if dev_loss is not None and dev_loss < facts.best_dev_loss:
        facts.best_dev_loss, facts.best_step = dev_loss, facts.step
        if facts.step:
            _save_best(stage, run, found.metrics)
    return 0


def _save_best(stage: Stage, run: RunFolder, metrics: dict[str, float]) -> None:
    """Keep the model of the best evaluation; a full disk costs no more than this copy."""
    try:
        stage.save_model(stage.model, run.path / "best", metrics)
    except (OSError, UserError) as error:
        run.say(f"warning: {run.path / 'best'} could not be written: {error}")


def _log_step(
    result: StepResult,
    seconds: float,
    settings: TrainSettings,
    stage: Stage,
    run: RunFolder,
    bar: Progress,
) -> None:
    facts = run.facts
    facts.tokens += result.tokens
    facts.seconds += seconds
    lr = lr_of(settings, facts.step, stage.total_steps)
    values = {
        "epoch": result.epoch,
        "train_loss": result.loss,
        "lr": lr,
        "grad_norm": float(result.norm),
        "tokens": facts.tokens,
        "trained_tokens": result.weight,
    }
    if facts.spikes_in_a_row:
        values["skipped"] = 1
    timing = {"seconds": seconds, "tokens_per_s": result.tokens / seconds, "memory_gb": memory_gb()}
    timing["trained_per_s"] = result.weight / seconds
    run.metrics(facts.step + 1, values, timing)
    rate = f"{timing['tokens_per_s']:,.0f} tokens/s"
    bar.advance(1, f"loss {result.loss:.4f}  lr {lr:.2e}  {rate}")


def memory_gb() -> float:
    """Peak memory in GB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _record_incident(
    reason: str, result: StepResult, norm: float, stage: Stage, run: RunFolder, ranks: Ranks
) -> None:
    """Tell of a step that is not applied, and write its documents; all ranks call it."""
    step = run.facts.step + 1
    mine = ledger.records_of(result.seen, stage.store)
    records = ledger.in_order(np.concatenate(distributed.gather(mine, ranks)))
    documents = ledger.describe(records, stage.store)
    run.incident_found(incidents.record(step, reason, result.loss, norm, documents, run.path))


def _write_ledger(
    seen: list[ledger.Seen], store: PackedStore, run: RunFolder, ranks: Ranks
) -> None:
    """Append the documents that wait on all ranks, and empty `seen`."""
    parts = distributed.gather(ledger.records_of(seen, store), ranks)
    seen.clear()
    run.append("ledger.bin", ledger.in_order(np.concatenate(parts)).tobytes())


@contextmanager
def _batches_ahead(
    batches: Callable[[int], list[Batch]], start: int, end: int
) -> Iterator[Iterator[list[Batch]]]:
    """Read the next step's batch while this step computes."""
    with ThreadPoolExecutor(1, "batches") as pool:

        def read() -> Iterator[list[Batch]]:
            ahead: Future | None = None
            for step in range(start, end):
                now = ahead or pool.submit(batches, step)
                ahead = pool.submit(batches, step + 1) if step + 1 < end else None
                yield now.result()

        yield read()


@contextmanager
def _bar(stage: Stage, run: RunFolder) -> Iterator[Progress]:
    left = stage.total_steps - run.facts.step
    with track("Training", left, "steps", quiet=run.quiet or not run.ranks.first) as bar:
        yield bar
