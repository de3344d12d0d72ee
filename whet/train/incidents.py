"""Steps that are not applied: a loss or gradient that is not finite, or a norm far out of range."""

import math
from collections.abc import Sequence
from pathlib import Path

from whet.train.state import Facts

# Chosen, not derived, and wide on purpose: a step that is skipped is lost, and what must be caught
# (an overflow, a broken document) lies far outside.
WINDOW = 64  # applied steps whose norms are the recent range
NEEDED = 16  # norms that make a range
FACTOR = 5.0  # times the largest recent norm is "far outside"
IN_A_ROW = 3  # incidents one after the other end the run


def judge(loss: float, norm: float, facts: Facts, clip: float) -> str | None:
    """Why a step with this loss and gradient norm must not be applied, or None if it may.

    Equal on all ranks, since both numbers are. A norm that clipping would not even touch is never
    a spike: near the end of a run, norms of 0.01 follow norms of 0.001.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    if len(facts.recent_norms) >= NEEDED:
        limit = max(clip, FACTOR * max(facts.recent_norms))
        if norm > limit:
            return (
                f"the gradient norm is {norm:.4g}; the last {len(facts.recent_norms)} were at most "
                f"{max(facts.recent_norms):.4g}"
            )
    return None


def remember(norm: float, facts: Facts) -> None:
    """Count an applied step."""
    facts.recent_norms = [*facts.recent_norms, norm][-WINDOW:]
    facts.spikes_in_a_row = 0


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
