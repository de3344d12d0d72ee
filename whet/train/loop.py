"""The only optimizer loop. It puts steps, evaluations and saves into their order."""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from whet.errors import UserError
from whet.flags.training import TrainSettings
from whet.progress import Progress, track
from whet.train import distributed, ledger, memory
from whet.train.distributed import Ranks
from whet.train.profile import profiled
from whet.train.run import RunFolder
from whet.train.signals import Interrupted, Stop
from whet.train.stage import BeforeStep, Documents, Stage
from whet.train.state import tensors_of
from whet.train.step import (
    IN_A_ROW,
    StepResult,
    apply_step,
    autocast,
    batches_ahead,
    count_step,
    dtype_of,
    forward_backward,
    lr_of,
    recent_norms,
)

R = TypeVar("R")
LEDGER_EVERY = 32  # steps whose documents wait on the device before they are read


@dataclass(frozen=True)
class StepNumbers:
    """What the CPU reads of a step."""

    loss: float
    """sum(weight x nll) / sum(weight) over the global batch."""
    norm: float
    """Gradient norm over all parameters and ranks."""
    tokens: int
    """Of the global batch, without padding."""
    named: Mapping[str, float]
    """What else the loss function gave for the log."""
    asked: bool
    """Whether some rank was asked to stop."""
    skipped: str | None
    """Why the step is not applied; None if it is."""


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

    On a GPU the numbers of a step are read while the next one runs; all are read before anything
    is evaluated or saved.
    """
    facts, seen, asked = run.facts, list[ledger.Seen](), 0
    dtype, recent = dtype_of(settings), recent_norms(facts.recent_norms, ranks.device)
    queued, read_at = deque[tuple[float, StepResult, Tensor, Mapping[str, float]]](), 0.0

    def read(left: int) -> None:
        """Read and log queued steps until `left` of them are left."""
        nonlocal asked, read_at
        while len(queued) > left:
            started, result, verdict, made = queued.popleft()
            numbers = settle_step(result, verdict, stage, settings, run, ranks)
            if numbers.asked:
                asked = stop.number or signal.SIGTERM
            seen.extend(result.seen)
            # A queued step begins, for the device, where the one before it ended.
            started, read_at = max(started, read_at), time.monotonic()
            _log_step(result, numbers, made, read_at - started, settings, stage, run, bar)

    def save(wait: bool) -> None:
        _write_ledger(seen, stage.documents, run, ranks)
        run.save(tensors_of(stage.model, optimizers), wait=wait)

    @contextmanager
    def kept_on_failure() -> Iterator[None]:
        """Save the steps so far where the block raises UserError on all ranks; one reports it."""
        try:
            yield
        except UserError:
            save(wait=True)
            if ranks.first:
                raise
            raise SystemExit(2) from None

    def make_batches(before_step: BeforeStep) -> Mapping[str, float]:
        """Make what the next step trains on, by the weights of today; sets `asked` if a signal
        has cut it short."""
        nonlocal asked
        read(left=0)
        call = partial(before_step, facts.step, stage.model, ranks, stop)
        with kept_on_failure():
            found = None if asked else _between_steps(call, stage, stop, ranks, dtype)
        if found is None:
            asked = asked or stop.number or signal.SIGTERM
        return found or {}

    left, ahead = stage.total_steps - facts.step, stage.before_step is None
    profile = profiled(run, left) if settings.profile else nullcontext(lambda: None)
    coming = batches_ahead(stage.batches, facts.step, stage.total_steps, ranks.device, ahead=ahead)
    quiet = run.quiet or not ranks.first
    with coming as batches, track("Training", left, "steps", quiet=quiet) as bar, profile as done:
        while True:
            at_end = facts.step == stage.total_steps
            to_evaluate = at_end or facts.step == 0 or _due(facts.step, settings.eval_every)
            to_evaluate = to_evaluate and stage.evaluate is not None
            decays = settings.schedule == "wsd" and facts.step == facts.decay_step
            due = at_end or decays or _due(facts.step, settings.save_every)
            to_save = settings.save_every and due
            if to_evaluate or to_save or asked:
                read(left=0)
            if to_evaluate and facts.evaluated < facts.step and not asked:
                with bar.paused(), kept_on_failure():
                    asked = _evaluate(stage, run, stop, ranks, dtype)
            if asked:
                save(wait=True)
                return asked
            if to_save:
                save(wait=at_end or not settings.save_async)
            if at_end:
                _write_ledger(seen, stage.documents, run, ranks)
                return 0
            started = time.monotonic()
            made = make_batches(stage.before_step) if stage.before_step is not None else {}
            if asked:
                continue
            result = forward_backward(
                stage, facts.step, next(batches), settings, ranks, stop, dtype
            )
            verdict = apply_step(result, stage, settings, optimizers, recent)
            queued.append((started, result, verdict, made))
            facts.step += 1
            done()
            read(left=steps_behind(ranks.device))
            if facts.step % LEDGER_EVERY == 0:
                _write_ledger(seen, stage.documents, run, ranks)


def steps_behind(device: torch.device) -> int:
    """How many steps may be queued on the device before the CPU reads their numbers."""
    return 1 if device.type == "cuda" else 0


def settle_step(
    result: StepResult,
    verdict: Tensor,
    stage: Stage,
    settings: TrainSettings,
    run: RunFolder,
    ranks: Ranks,
) -> StepNumbers:
    """Wait for a step's numbers, and count it or record why it was not applied.

    All ranks call it, step after step.
    """
    loss, norm, tokens, asked, *pairs = result.sums.tolist()
    facts = run.facts
    reason = count_step(result, verdict, facts)
    named = zip(result.names, pairs[::2], pairs[1::2], strict=True)
    means = {name: total / count for name, total, count in named if count}
    numbers = StepNumbers(loss, norm, int(tokens), means, asked != 0, reason)
    if reason is None:
        return numbers
    _record_incident(reason, result, numbers, stage, run, ranks)
    if settings.on_spike == "stop" or facts.spikes_in_a_row >= IN_A_ROW:
        run.finish_saving()
        raise UserError(
            f"stopped at step {result.step + 1}: {reason} ({facts.spikes_in_a_row} in a row); "
            f"its documents and the command that replays it: {run.incident(result.step + 1)}; "
            "earlier states are kept"
        )
    return numbers


def _due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def _evaluate(
    stage: Stage, run: RunFolder, stop: Stop, ranks: Ranks, dtype: torch.dtype | None
) -> int:
    """Evaluate and log; returns the signal's number if it was cut short, and logs nothing then."""
    assert stage.evaluate is not None, "the caller asks"
    facts, evaluate = run.facts, partial(stage.evaluate, stage.model, ranks, stop)
    found = _between_steps(evaluate, stage, stop, ranks, dtype)
    if found is None:
        return stop.number or signal.SIGTERM
    facts.evaluated = facts.step
    for sample in found.samples:
        run.append("samples.jsonl", {"step": facts.step, **sample})
    if found.metrics:
        run.metrics(facts.step, found.metrics, {})
        shown = [f"{key} {v:.4g}" for key, v in found.metrics.items() if "/" not in key]
        run.say(f"step {facts.step}: {found.words or ', '.join(shown)}")
    value = found.metrics.get(stage.best)
    if value is not None and _is_better(value, facts.best_value, stage.higher_is_better):
        facts.best_value, facts.best_step = value, facts.step
        if facts.step:
            _save_best(stage, run, found.metrics)
    return 0


def _between_steps(
    call: Callable[[], R], stage: Stage, stop: Stop, ranks: Ranks, dtype: torch.dtype | None
) -> R | None:
    """What `call` gives, an evaluation or a rollout; None if a signal cut it short.

    With several ranks an exception at any moment would leave the others waiting; there `call`
    itself asks all ranks between its parts.
    """
    try:
        with stop.interruptible(ranks.size == 1), autocast(ranks.device, dtype):
            return call()
    except Interrupted:
        return None
    finally:
        distributed.reshard(stage.model)


def _is_better(value: float, best: float | None, higher: bool) -> bool:
    return not math.isnan(value) and (best is None or (value > best if higher else value < best))


def _save_best(stage: Stage, run: RunFolder, metrics: dict[str, float]) -> None:
    """Keep the model of the best evaluation; a full disk costs no more than this copy."""
    try:
        stage.save_model(stage.model, run.path / "best", metrics)
    except (OSError, UserError) as error:
        run.say(f"warning: {run.path / 'best'} could not be written: {error}")
    distributed.wait_for_all(run.ranks)


def _log_step(
    result: StepResult,
    numbers: StepNumbers,
    made: Mapping[str, float],
    seconds: float,
    settings: TrainSettings,
    stage: Stage,
    run: RunFolder,
    bar: Progress,
) -> None:
    facts = run.facts
    facts.tokens += numbers.tokens
    facts.seconds += seconds
    lr = lr_of(settings, result.step, stage.total_steps)
    values = {
        "epoch": result.epoch,
        "train_loss": numbers.loss,
        "lr": lr,
        "grad_norm": numbers.norm,
        "tokens": facts.tokens,
        stage.unit: result.weight,
        **numbers.named,
        **made,
    }
    if numbers.skipped:
        values["skipped"] = 1
    timing = {
        "seconds": seconds,
        "tokens_per_s": numbers.tokens / seconds,
        "memory_gb": memory.peak_bytes(run.ranks.device) / 1e9,
    }
    timing[f"{stage.unit.removesuffix('_tokens')}_per_s"] = result.weight / seconds
    run.metrics(result.step + 1, values, timing)
    if not run.warned and (warning := stage.warn(numbers.named)):
        run.warned = True
        run.say(f"warning: step {result.step + 1}: {warning}")
    rate = f"{timing['tokens_per_s']:,.0f} tokens/s"
    bar.advance(1, f"loss {numbers.loss:.4f}  lr {lr:.2e}  {rate}")


def _record_incident(
    reason: str,
    result: StepResult,
    numbers: StepNumbers,
    stage: Stage,
    run: RunFolder,
    ranks: Ranks,
) -> None:
    """Tell of a step that is not applied, and write its documents; all ranks call it."""
    step = result.step + 1
    mine = ledger.records_of(result.seen, stage.documents)
    records = ledger.in_order(np.concatenate(distributed.gather(mine, ranks)))
    documents = ledger.describe(records, stage.documents)
    record = ledger.incident(step, reason, numbers.loss, numbers.norm, documents, run.path)
    run.incident_found(record)


def _write_ledger(
    seen: list[ledger.Seen], documents: Documents, run: RunFolder, ranks: Ranks
) -> None:
    """Append the documents that wait on all ranks, and empty `seen`."""
    parts = distributed.gather(ledger.records_of(seen, documents), ranks)
    seen.clear()
    run.append("ledger.bin", ledger.in_order(np.concatenate(parts)).tobytes())
