"""Dry steps: some real steps in a process of their own, to learn what they cost.

The kernel's count of a process's peak memory only rises, and an allocator keeps what it once had;
so each setting is measured in a fresh process, which ends with all that it held. What it measures
is the real thing: the model as it is loaded, real rows, the loop's own step.

`build` is a stage's: a function of a module, which another process can import.
"""

import contextlib
import dataclasses
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
from whet.model.attention import attention_flops
from whet.model.decoder import Transformer
from whet.model.loss import head_bytes
from whet.model.precision import use_float8
from whet.train import memory
from whet.train.distributed import Ranks
from whet.train.session import make_optimizers
from whet.train.signals import Stop
from whet.train.stage import Stage
from whet.train.step import (
    Micro,
    apply_step,
    autocast,
    dtype_of,
    forward_backward,
    recent_norms,
    to_device,
)

R = TypeVar("R")
LOOKED_AT = 32
"""Steps among which the fullest micro-batch is looked for."""
STEPS = 5
"""Dry steps, each of other rows: the first makes the optimizer's state, the others are timed. An
allocator needs more room for blocks that differ from step to step."""
MICROS = 4
"""Micro-batches of a dry step: the first makes the gradients, the others add to them. Only the
allocator could distinguish the third from the second."""


@dataclass(frozen=True)
class Cost:
    """What a step of a setting costs on one rank, and what else `whet plan` says of the run. Memory
    in bytes, time in seconds."""

    rows: int
    """Of a micro-batch."""
    recompute: str
    peak: int
    """The most that was held, as `memory.peak_bytes` defines it."""
    stepped: int
    """The most that steps alone held; rollouts may hold more."""
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
    head: int
    """Bytes of the head's buffers, counted."""
    parameters: int
    trained: int
    steps: int
    """Of the whole run."""
    micros: int
    """Micro-batches of a step, on a rank."""

    @property
    def state(self) -> int:
        """What is held all the time, besides the process."""
        return self.weights + self.gradients + self.optimizer

    @property
    def transient(self) -> int:
        """The rest of a step: activations, the head's buffers, what the allocator could not give
        back."""
        return max(0, self.stepped - self.process - self.state)


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
        importlib.import_module("torch.utils.tensorboard")  # as run.py does
    return memory.peak_bytes(device)


def size_of(tensors: Sequence[torch.Tensor | nn.Parameter]) -> int:
    """Bytes of the storages of `tensors`, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def cost_of(
    build: Callable[[Any, Ranks], Stage],
    config: Any,
    device: torch.device,
    ranks: int,
    rows: int,
    recompute: str,
) -> Cost:
    """Measure one setting; runs in a process of its own."""
    process = process_bytes(device)
    config = dataclasses.replace(config, micro_batch_size=rows, recompute=recompute, quiet=True)
    stage = build(config, Ranks(0, ranks, device))  # whose batches are the first rank's share
    model = stage.model.to(device)
    if config.float8:
        use_float8(model, device)
    return dry_run(stage, config, make_optimizers(model, config), process, device)


def dry_run(
    stage: Stage,
    config: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    process: int,
    device: torch.device,
) -> Cost:
    """Take `STEPS` steps with the stage's model, which is on `device`; `process` is what was held
    before it."""
    ranks, stop = Ranks(device=device), Stop(grace_s=0.0)
    recent, dtype = recent_norms([], device), dtype_of(config)
    parameters = list(stage.model.parameters())
    with autocast(device, dtype):
        batches = dry_batches(stage)
    times: list[tuple[float, float]] = []
    first: list[Micro] = []
    flops, gradients = 0.0, 0
    for step in range(STEPS):
        moved = to_device(batches[step % len(batches)][:MICROS], device)
        counter = FlopCounterMode(display=False) if step == 0 else contextlib.nullcontext()
        begin = _now(device)
        with counter:
            result = forward_backward(stage, 0, moved, config, ranks, stop, dtype)
        middle = _now(device)
        if step == 0:
            first, flops = moved, counter.get_total_flops() / len(moved)  # type: ignore[union-attr]
            gradients = size_of([p.grad for p in parameters if p.grad is not None])
        apply_step(result, stage, config, optimizers, recent)
        times.append(((middle - begin) / len(moved), _now(device) - middle))
    peak = stepped = memory.peak_bytes(device)
    if stage.dry_rollout is not None:
        with autocast(device, dtype):
            stage.dry_rollout(stage.model)
        peak = memory.peak_bytes(device)
    states = [v for o in optimizers for s in o.state.values() for v in s.values()]
    model, head = stage.model, 0
    if isinstance(model, Transformer):
        plan, vocabulary = batches[0][0].plan, model.config.vocab_size
        flops += attention_flops(model.config, plan.sizes, again=config.recompute == "full")
        head = head_bytes(vocabulary, len(plan.trained), device, config.precision == "bf16")
    return Cost(
        rows=len(first[0].batch.tokens),
        recompute=config.recompute,
        peak=peak,
        stepped=stepped,
        process=process,
        weights=size_of([*parameters, *model.buffers()]),
        gradients=gradients,
        optimizer=size_of([v for v in states if isinstance(v, torch.Tensor)]),
        micro_seconds=min(forward for forward, _ in times[1:]),
        update_seconds=min(update for _, update in times[1:]),
        micro_flops=flops,
        tokens=sum(micro.tokens for micro in first) / len(first),
        head=head,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        steps=stage.total_steps,
        micros=len(batches[0]),
    )


def dry_batches(stage: Stage) -> list[list[Batch]]:
    """A rank's micro-batches of the run's first steps, in their order, and at last the step of the
    early ones that computes the most tokens.

    In their order, since an allocator's need depends on it: a block fits where a larger one was.
    """
    if stage.dry_steps is not None:
        found = stage.dry_steps(stage.model)
    else:
        found = [stage.batches(step) for step in range(min(stage.total_steps, LOOKED_AT))]
    return [*found[: STEPS - 1], max(found, key=lambda micros: sum(micros[0].plan.sizes))]
