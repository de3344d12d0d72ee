"""The judgement of `incidents.judge`, made where the numbers are.

A GPU computes while the CPU prepares what comes next; each number that the CPU reads makes it wait
until everything before is done. So whether a step is applied is decided on the device, by the rule
and with the float64 arithmetic of `incidents.judge`, and fused AdamW leaves weights, moments and
step counters alone where `found_inf` says so. The CPU reads loss and norm later, comes to the same
verdict, and tells it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whet.train.incidents import FACTOR, NEEDED, WINDOW


@dataclass
class Recent:
    """The norms of the last applied steps, on the device; -1 where there is none yet."""

    norms: Tensor
    """(WINDOW,) float64, oldest first."""

    def judge(self, loss: Tensor, norm: Tensor, clip: float) -> Tensor:
        """Whether a step with these float64 scalars must not be applied: a bool scalar. If it may,
        its norm is remembered."""
        enough = (self.norms >= 0).sum() >= NEEDED
        limit = (FACTOR * self.norms.max()).clamp(min=clip)
        bad = ~torch.isfinite(loss) | ~torch.isfinite(norm) | (enough & (norm > limit))
        after = torch.cat([self.norms[1:], norm[None]])
        self.norms = torch.where(bad, self.norms, after)
        return bad


def recent(norms: Sequence[float], device: torch.device) -> Recent:
    """What `facts.recent_norms` knows, on `device`."""
    known = list(norms)[-WINDOW:]
    filled = [-1.0] * (WINDOW - len(known)) + known
    return Recent(torch.tensor(filled, dtype=torch.float64, device=device))


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
