"""What a stage brings to the loop: model, batches, loss, and how it is measured and saved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from whet.data.batches import Batch
from whet.train.distributed import Ranks
from whet.train.signals import Stop


class Documents(Protocol):
    """Where the rows of a stage come from, as the ledger and a continued run need to know it."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal data; a run goes on with the data that it started with."""

    def __len__(self) -> int:
        """How many rows there are."""

    def numbers(self, rows: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """The number of document `segments[i]`, from 1, of row `rows[i]`: what the ledger keeps."""

    def places(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """Of each document: `file`, `line` in it from 1, and of pairs its `side`."""

    def find(self, file: str, line: int) -> np.ndarray:
        """The numbers of the documents from there. Raises UserError if there are none."""


@dataclass(frozen=True)
class Sums:
    """What a loss function gives for a micro-batch: sums, never means."""

    loss: Tensor
    """sum(weight x nll), a float32 scalar with a gradient."""
    nll: Tensor
    """(B, T) float32, detached: the loss of each token, 0 where the weight is 0."""
    named: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """More numbers for the log, name -> (sum, count), two detached scalars: added up over the
    micro-batches and ranks of the step and logged as sum / count, or not at all if the count is 0.
    Every micro-batch gives the same names."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    words: str = ""
    """The metrics for people, in one line."""


BeforeStep = Callable[[int, nn.Module, Ranks, Stop], Mapping[str, float]]
"""(step, model, ranks, stop) -> numbers for the step's log."""


@dataclass(frozen=True)
class Stage:
    """What differs between pretraining, SFT and what comes after them."""

    model: nn.Module
    """As it was loaded; `session` spreads it over the ranks."""
    documents: Documents
    """Where the rows come from."""
    total_steps: int
    batches: Callable[[int], list[Batch]]
    """Step (from 0) -> this rank's micro-batches of that global batch, on the CPU."""
    loss_fn: Callable[[nn.Module, Batch], Sums]
    evaluate: Callable[[nn.Module, Ranks, Stop], Evaluation] | None
    """All ranks call it; it raises Interrupted, on all of them, when the run was asked to stop, and
    UserError on all of them if one fails (`evaluation.Meeting` sees to both). None where there is
    nothing to measure."""
    save_model: Callable[[nn.Module, Path, dict[str, float]], None]
    """Write a model directory with these metrics in its lineage; all ranks call it."""
    rows: str = "rows"
    """What `--batch_size` counts, for the header."""
    unit: str = "trained_tokens"
    """What a batch's `total` counts, as it is named in the log."""
    rehearse: Callable[[nn.Module], None] | None = None
    """Write what `save_model` will write, read it back and remove it: called on rank 0 before the
    first step. Raises UserError if that fails."""
    dev: Documents | None = None
    """What is evaluated on."""
    at_start: Callable[[nn.Module, Ranks], None] | None = None
    """Called once by all ranks with the model as it was opened, on its device and spread, before a
    state is loaded: what is computed from the weights that training begins with."""
    before_step: BeforeStep | None = None
    """Make what `batches(step)` reads with the current weights, as a rollout does, and return
    numbers for the step's log, equal on all ranks. With it no batch is read ahead. All ranks call
    it, after the step before was applied; raises Interrupted and UserError as `evaluate` does."""
    dry_steps: Callable[[nn.Module], list[list[Batch]]] | None = None
    """Micro-batches of some steps that cost as much as any, where only `before_step` could make the
    real ones: what `--auto` measures."""
    dry_rollout: Callable[[nn.Module], None] | None = None
    """Hold what `before_step` and `evaluate` hold at most, changing nothing: `--auto` measures it
    beside the state that its dry steps have made."""
    warn: Callable[[Mapping[str, float]], str] = lambda numbers: ""
    """What the numbers of a step, by their names in the log, warn of; said once a run."""
    best: str = "dev_loss"
    """The metric of the evaluation that decides which model is kept in `best/`."""
    higher_is_better: bool = False
    """Which way `best` improves."""
    next: str = "whet chat {run}"
    """What to type when the model is trained; {run} stands for its folder."""
    header: Sequence[tuple[str, str]] = ()
    """What to print before training: (word, line)."""
