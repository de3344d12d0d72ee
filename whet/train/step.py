"""One optimizer step: the gradient of a global batch, whether it is applied, and its numbers.

The loss of a step is sum(weight x nll) / sum(weight) over the global batch. Each micro-batch of
each rank gives its part of the upper sum; the lower one, `total`, is known beforehand. So
micro-batch size, accumulation and ranks change nothing but rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from whet.flags.training import TrainSettings
from whet.train import distributed, incidents, ledger, optim, verdict
from whet.train.ahead import Micro
from whet.train.distributed import Ranks
from whet.train.signals import Stop
from whet.train.stage import Stage
from whet.train.state import Facts


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


def apply_step(
    result: StepResult,
    stage: Stage,
    settings: TrainSettings,
    optimizers: Sequence[torch.optim.Optimizer],
    recent: verdict.Recent,
) -> None:
    """Clip and take the optimizer step, unless the device finds that it must not be applied."""
    if result.weight:  # where nothing is trained, not even weight decay moves the weights
        loss, norm = result.sums[0], result.sums[1]
        with record_function("optimizer"):
            bad = recent.judge(loss, norm, settings.clip)
            if settings.clip:
                parameters = list(stage.model.parameters())
                distributed.scale_gradients(parameters, norm.float(), settings.clip)
            optim.set_lr(optimizers, lr_of(settings, result.step, stage.total_steps))
            verdict.step_unless(bad, optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def count_step(result: StepResult, facts: Facts, clip: float) -> str | None:
    """Take a step into `facts`; returns why it is not applied, or None if it is."""
    loss, norm = result.sums[:2].tolist()
    reason = incidents.judge(loss, norm, facts, clip)
    if reason is not None:
        facts.spikes_in_a_row += 1
        facts.incident_step = result.step + 1
    elif result.weight:
        incidents.remember(norm, facts)
    return reason


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
