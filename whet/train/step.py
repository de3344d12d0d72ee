"""One optimizer step: the gradient of a global batch, whether it is applied, and its numbers.

The loss of a step is sum(weight x nll) / sum(weight) over the global batch. Each micro-batch of
each rank gives its part of the upper sum; the lower one, `total`, is known beforehand. So
micro-batch size, accumulation and ranks change nothing but rounding.

The next step's batch is read while this step computes. A thread reads the rows; where the device is
a GPU it also copies them there, from page-locked memory and on a stream of its own, so that the
copy runs beside the step and nobody waits for it.

A step is not applied if its loss or gradient is not finite, or its norm far out of range. A GPU
computes while the CPU prepares what comes next, and each number that the CPU reads makes it wait
for all before. So a step is judged where its numbers are, in float64, and fused AdamW leaves
weights, moments and step counters alone where `found_inf` says so. The CPU reads the verdict later,
with the numbers, and puts it into words.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from whet.data.batches import Batch, map_tensors
from whet.flags.training import TrainSettings
from whet.train import distributed, ledger, optim
from whet.train.distributed import Ranks
from whet.train.signals import Stop
from whet.train.stage import Stage
from whet.train.state import Facts

# Chosen, not derived, and wide on purpose: a step that is skipped is lost, and what must be caught
# (an overflow, a broken document) lies far outside.
WINDOW = 64  # applied steps whose norms are the recent range
NEEDED = 16  # norms that make a range
FACTOR = 5.0  # times the largest recent norm is "far outside"
IN_A_ROW = 3  # incidents one after the other end the run


@dataclass(frozen=True)
class Micro:
    """A micro-batch on the device, and what the CPU knew of it: asking the device would wait."""

    batch: Batch
    segments: int
    """The most documents in a row."""
    tokens: int
    """Without padding."""


@contextmanager
def batches_ahead(
    batches: Callable[[int], Sequence[Batch]],
    start: int,
    end: int,
    device: torch.device,
    *,
    ahead: bool = True,
) -> Iterator[Iterator[list[Micro]]]:
    """Yields an iterator over the micro-batches of the steps `start` to `end`, on `device`.

    Without `ahead` a step's batch is read when it is asked for, in the caller's thread.
    """
    if not ahead:
        yield (to_device(batches(step), device) for step in range(start, end))
        return
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, "batches") as pool:

        def read(step: int) -> tuple[list[Micro], Any]:
            if side is None:
                return to_device(batches(step), device), None
            with torch.cuda.stream(side):
                return to_device(batches(step), device), side.record_event()

        def steps() -> Iterator[list[Micro]]:
            coming: Future | None = None
            for step in range(start, end):
                now = coming or pool.submit(read, step)
                coming = pool.submit(read, step + 1) if step + 1 < end else None
                micros, copied = now.result()
                if copied is not None:
                    _hand_over(micros, copied)
                yield micros

        yield steps()


def to_device(batches: Sequence[Batch], device: torch.device) -> list[Micro]:
    """Micro-batches of the CPU on `device`; a GPU gets them without waiting for its stream."""

    def moved(tensor: Tensor) -> Tensor:
        if device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)

    return [
        Micro(
            map_tensors(batch, moved),
            int(batch.segments.max()) if batch.segments.numel() else 0,
            int((batch.segments != 0).sum()),
        )
        for batch in batches
    ]


def _hand_over(micros: Sequence[Micro], copied: Any) -> None:
    """Let the step's stream wait for the copy, and keep the memory until that stream is done."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)

    def used(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)
        return tensor

    for micro in micros:
        map_tensors(micro.batch, used)


@dataclass(frozen=True)
class StepResult:
    """A step's forward and backward passes, queued on the device; nothing is applied yet."""

    step: int
    """From 0."""
    sums: Tensor
    """(4 + 2 n,) float64 on the device: loss, gradient norm, tokens, ranks that were asked to stop,
    and the sum and count of each of the n `names`."""
    names: list[str]
    """Of the numbers that the loss function gives for the log (`Sums.named`)."""
    weight: float
    epoch: int
    seen: list[ledger.Seen]


def forward_backward(
    stage: Stage,
    step: int,
    micros: Sequence[Micro],
    settings: TrainSettings,
    ranks: Ranks,
    stop: Stop,
    dtype: torch.dtype | None,
) -> StepResult:
    """Add up the gradient of global batch `step` on this rank and over all ranks."""
    model = stage.model.train()
    seed_step(settings.seed, step, ranks.rank)
    total = micros[0].batch.total
    factor = distributed.gradient_factor(model, ranks) / total if total else 0.0
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    named: dict[str, Tensor] = {}
    asked, seen = float(stop.number != 0), []
    for i, micro in enumerate(micros):
        with distributed.sync_gradients(model, now=i == len(micros) - 1):
            with record_function("forward"), autocast(ranks.device, dtype):
                part = stage.loss_fn(model, micro.batch)
            with record_function("backward"):
                (part.loss * factor).backward()
        loss += part.loss.detach()
        named = _added(named, part.named) if i else _pairs(part.named)
        seen.append(ledger.see(step + 1, micro.batch, micro.segments, part.nll))
    norm = distributed.gradient_norm(list(stage.model.parameters())).to(loss)
    # One exchange a step: the loss, the tokens, and whether some rank was asked to stop. A signal
    # that comes from here on counts in the next step: all ranks must decide alike.
    tokens = float(sum(micro.tokens for micro in micros))
    sums = torch.stack([loss, loss.new_full((), tokens), loss.new_full((), asked)])
    sums = torch.cat([sums, *(pair.to(sums) for pair in named.values())])
    loss, *counts = distributed.add_over_ranks(sums, ranks).unbind()
    return StepResult(
        step=step,
        sums=torch.stack([loss / total if total else torch.zeros_like(loss), norm, *counts]),
        names=list(named),
        weight=total,
        epoch=micros[0].batch.epoch,
        seen=seen,
    )


def _pairs(named: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Each (sum, count) as one tensor (2,) float64, by name in a fixed order."""
    return {name: torch.stack([x.detach().double() for x in named[name]]) for name in sorted(named)}


def _added(total: dict[str, Tensor], named: Mapping[str, tuple[Tensor, Tensor]]) -> dict:
    if named.keys() != total.keys():
        raise ValueError(f"the micro-batches of a step name {sorted(named)} and {sorted(total)}")
    return {name: total[name] + pair for name, pair in _pairs(named).items()}


@dataclass
class RecentNorms:
    """The norms of the last applied steps, on the device; -1 where there is none yet."""

    norms: Tensor
    """(WINDOW,) float64, oldest first."""

    def judge(self, loss: Tensor, norm: Tensor, clip: float) -> Tensor:
        """The verdict on a step with these float64 scalars, (3,) float64: 1 if it must not be
        applied, the largest recent norm, and how many there are. If it may, its norm is remembered.

        Equal on all ranks, since both numbers are. A norm that clipping would not even touch is
        never a spike: near the end of a run, norms of 0.01 follow norms of 0.001.
        """
        known, largest = (self.norms >= 0).sum(), self.norms.max()
        limit = (FACTOR * largest).clamp(min=clip)
        bad = ~torch.isfinite(loss) | ~torch.isfinite(norm) | ((known >= NEEDED) & (norm > limit))
        after = torch.cat([self.norms[1:], norm[None]])
        self.norms = torch.where(bad, self.norms, after)
        return torch.stack([bad.to(norm), largest, known.to(norm)])


def recent_norms(norms: Sequence[float], device: torch.device) -> RecentNorms:
    """What `facts.recent_norms` knows, on `device`."""
    known = list(norms)[-WINDOW:]
    filled = [-1.0] * (WINDOW - len(known)) + known
    return RecentNorms(torch.tensor(filled, dtype=torch.float64, device=device))


def apply_step(
    result: StepResult,
    stage: Stage,
    settings: TrainSettings,
    optimizers: Sequence[torch.optim.Optimizer],
    recent: RecentNorms,
) -> Tensor:
    """Clip and take the optimizer step, unless the device finds that it must not be applied.

    Returns the verdict, on the device.
    """
    verdict = torch.zeros(3, dtype=torch.float64, device=result.sums.device)
    if result.weight:  # where nothing is trained, not even weight decay moves the weights
        loss, norm = result.sums[0], result.sums[1]
        with record_function("optimizer"):
            verdict = recent.judge(loss, norm, settings.clip)
            if settings.clip:
                parameters = list(stage.model.parameters())
                distributed.scale_gradients(parameters, norm.float(), settings.clip)
            optim.set_lr(optimizers, lr_of(settings, result.step, stage.total_steps))
            step_unless(verdict[0] != 0, optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return verdict


def count_step(result: StepResult, verdict: Tensor, facts: Facts) -> str | None:
    """Take a step into `facts`; returns why it is not applied, or None if it is."""
    loss, norm = result.sums[:2].tolist()
    why = reason(loss, norm, verdict.tolist())
    if why is not None:
        facts.spikes_in_a_row += 1
        facts.incident_step = result.step + 1
    elif result.weight:
        facts.recent_norms = [*facts.recent_norms, norm][-WINDOW:]
        facts.spikes_in_a_row = 0
    return why


def reason(loss: float, norm: float, verdict: Sequence[float]) -> str | None:
    """Why a step with this loss, norm and verdict must not be applied, or None if it may."""
    bad, largest, known = verdict
    if not bad:
        return None
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    return f"the gradient norm is {norm:.4g}; the last {known:.0f} were at most {largest:.4g}"


def skips_on_device(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether all of them obey a `found_inf` on the device; fused AdamW does."""
    return all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers)


def step_unless(bad: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Take the optimizer step, or leave everything as it is where `bad`.

    Optimizers without such a switch (Muon, 8-bit AdamW) cost a wait for the device.
    """
    if skips_on_device(optimizers):
        found = bad.to(torch.float32)
        for optimizer in optimizers:
            optimizer.found_inf = found  # type: ignore[attr-defined]
    elif bool(bad):
        return
    for optimizer in optimizers:
        optimizer.step()


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
