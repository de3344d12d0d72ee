"""Dry steps: some real steps in a process of their own, to learn what they cost.

The kernel's count of a process's peak memory only rises, and an allocator keeps what it once had;
so each setting is measured in a fresh process, which ends with all that it held. What it measures
is the real thing: the model as it is loaded, real rows, the loop's own step.
"""

import contextlib
import importlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from whet.data.batches import Batch
from whet.errors import UserError
from whet.flags.training import TrainSettings
from whet.train import memory, verdict
from whet.train.ahead import Micro, to_device
from whet.train.distributed import Ranks
from whet.train.signals import Stop
from whet.train.stage import Stage
from whet.train.step import apply_step, dtype_of, forward_backward

R = TypeVar("R")
STEPS = 5
"""Dry steps, each of other rows: the first makes the optimizer's state, the others are timed. An
allocator needs more room for blocks that differ from step to step."""
MICROS = 4
"""Micro-batches of a dry step: the first makes the gradients, the others add to them. Only the
allocator could tell the third from the second."""


@dataclass(frozen=True)
class Cost:
    """What a step costs on one rank. Memory in bytes, time in seconds."""

    rows: int
    """Of a micro-batch."""
    recompute: str
    peak: int
    """The most that was held, as `memory.peak_bytes` defines it."""
    process: int
    """Of it, what was held before the model: Python and libraries; 0 on a GPU."""
    weights: int
    gradients: int
    optimizer: int
    micro_seconds: float
    """Forward and backward of one micro-batch: the fastest of the timed steps."""
    update_seconds: float
    """Clipping and optimizer step."""
    micro_flops: float
    """Of the matrix products of a micro-batch, forward and backward: 2 for a multiply-add."""
    tokens: float
    """Of a micro-batch, without padding."""

    @property
    def state(self) -> int:
        """What is held all the time, besides the process."""
        return self.weights + self.gradients + self.optimizer

    @property
    def transient(self) -> int:
        """The rest: activations, the head's buffers, what the allocator could not give back."""
        return max(0, self.peak - self.process - self.state)


def measure(target: Callable[..., R], *arguments: Any) -> R | None:
    """`target(*arguments)` in a fresh process; None if the memory was not enough.

    Raises UserError with the process's own, if it met one.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, target, *arguments), daemon=True)
    process.start()
    theirs.close()
    found: Any = None
    with contextlib.suppress(EOFError):  # the kernel killed it, as it does without memory
        found = ours.recv()
    process.join()
    if isinstance(found, str):
        raise UserError(found)
    return found


def _answer(pipe: Connection, target: Callable, *arguments: Any) -> None:
    try:
        pipe.send(target(*arguments))
    except UserError as error:
        pipe.send(str(error))
    except (torch.OutOfMemoryError, MemoryError):
        pipe.send(None)


def process_bytes(device: torch.device) -> int:
    """What this process holds before its model, once all that a run imports is imported."""
    memory.keep_freed(device)
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")  # as curves.py does
    return memory.peak_bytes(device)


def dry_run(
    stage: Stage,
    settings: TrainSettings,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Sequence[Batch]],
    recompute: str,
    process: int,
    device: torch.device,
) -> Cost:
    """Take `STEPS` steps with the stage's model, which is on `device`; `batches` are micro-batches
    of some steps, on the CPU."""
    ranks, stop = Ranks(device=device), Stop(grace_s=0.0)
    recent, dtype = verdict.recent([], device), dtype_of(settings)
    times: list[tuple[float, float]] = []
    first: list[Micro] = []
    flops, gradients = 0, 0
    for step in range(STEPS):
        moved = to_device(batches[step % len(batches)][:MICROS], device)
        counter = FlopCounterMode(display=False) if step == 0 else contextlib.nullcontext()
        begin = _now(device)
        with counter:
            result = forward_backward(stage, 0, moved, settings, ranks, stop, dtype)
        middle = _now(device)
        if step == 0:
            first, flops = moved, counter.get_total_flops()  # type: ignore[union-attr]
            gradients = size_of([p.grad for p in stage.model.parameters() if p.grad is not None])
        apply_step(result, stage, settings, optimizers, recent)
        times.append(((middle - begin) / len(moved), _now(device) - middle))
    states = [v for o in optimizers for s in o.state.values() for v in s.values()]
    return Cost(
        rows=len(first[0].batch.tokens),
        recompute=recompute,
        peak=memory.peak_bytes(device),
        process=process,
        weights=size_of([*stage.model.parameters(), *stage.model.buffers()]),
        gradients=gradients,
        optimizer=size_of([v for v in states if isinstance(v, torch.Tensor)]),
        micro_seconds=min(forward for forward, _ in times[1:]),
        update_seconds=min(update for _, update in times[1:]),
        micro_flops=flops / len(first),
        tokens=sum(micro.tokens for micro in first) / len(first),
    )


def size_of(tensors: Sequence[torch.Tensor | nn.Parameter]) -> int:
    """Bytes of the storages of `tensors`, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
