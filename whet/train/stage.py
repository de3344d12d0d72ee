"""What a stage brings to the loop: model, batches, loss, and how it is measured and saved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from whet.data.batches import Batch
from whet.data.store import PackedStore
from whet.train.distributed import Ranks
from whet.train.signals import Stop


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
