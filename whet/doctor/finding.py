"""What a check finds: a claim, the measured difference, its bound, and the verdict."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table."""

    claim: str
    """What Whet promises, as a sentence without a full stop."""
    verdict: Literal["pass", "fail", "skipped"]
    measured: float | None = None
    """The difference that was seen; None where nothing was measured."""
    bound: float | None = None
    """The largest difference that still passes."""
    note: str = ""
    """On what it was measured, why it was skipped, or how it failed."""


def judge(claim: str, measured: float, bound: float, note: str = "") -> Finding:
    """Pass if `measured` is at most `bound`; NaN fails."""
    verdict: Literal["pass", "fail"] = "pass" if measured <= bound else "fail"
    return Finding(claim, verdict, float(measured), float(bound), note)


def skipped(claim: str, why: str) -> Finding:
    """A claim that cannot be tried here."""
    return Finding(claim, "skipped", note=why)


def failed(claim: str, how: str) -> Finding:
    """A claim whose check ended without a number."""
    return Finding(claim, "fail", note=how)


def worse(one: float, other: float) -> float:
    """The larger of two differences; NaN, which `max` may lose, is the largest."""
    return one if one != one or one > other else other


@dataclass(frozen=True)
class Bounds:
    """Relative differences that rounding explains, when the same is summed in another order."""

    loss: float
    gradient: float


BOUNDS = {
    # Some 20 times and 200 times what is seen (docs/doctor.md), as depth and vocabulary add to it.
    torch.float32: Bounds(1e-5, 1e-4),
    # bf16 has 8 bits: each product is rounded by up to 0.4 %.
    torch.bfloat16: Bounds(1e-2, 1e-1),
}
