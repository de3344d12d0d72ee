"""The next step's batch, ready while this step computes.

A thread reads the rows; where the device is a GPU it also copies them there, from page-locked
memory and on a stream of its own, so that the copy runs beside the step and nobody waits for it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whet.data.batches import Batch, map_tensors


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
