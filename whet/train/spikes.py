"""Steps that are not applied: a loss or gradient that is not finite, or a norm far out of range.

A GPU computes while the CPU prepares what comes next; each number that the CPU reads makes it wait
until everything before is done. So whether a step is applied is judged where its numbers are, in
float64, and fused AdamW leaves weights, moments and step counters alone where `found_inf` says so.
The CPU reads the verdict later, with the numbers, and puts it into words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Chosen, not derived, and wide on purpose: a step that is skipped is lost, and what must be caught
# (an overflow, a broken document) lies far outside.
WINDOW = 64  # applied steps whose norms are the recent range
NEEDED = 16  # norms that make a range
FACTOR = 5.0  # times the largest recent norm is "far outside"
IN_A_ROW = 3  # incidents one after the other end the run


@dataclass
class Recent:
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


def recent(norms: Sequence[float], device: torch.device) -> Recent:
    """What `facts.recent_norms` knows, on `device`."""
    known = list(norms)[-WINDOW:]
    filled = [-1.0] * (WINDOW - len(known)) + known
    return Recent(torch.tensor(filled, dtype=torch.float64, device=device))


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


def record(
    step: int, reason: str, loss: float, norm: float, documents: Sequence[dict], run: Path
) -> dict:
    """What is written to `incidents/step_XXXXXXXX.json`."""
    return {
        "step": step,
        "reason": reason,
        "train_loss": as_json(loss),
        "grad_norm": as_json(norm),
        "replay": f"whet replay {run} --step {step}",
        "documents": [{**document, "loss": as_json(document["loss"])} for document in documents],
    }


def as_json(value: float) -> float | str:
    """JSON knows no NaN and no infinity: a text stands for them."""
    return value if math.isfinite(value) else str(value)
