"""SIGTERM and SIGINT: finish the step, save, leave; within a bound, and at once if asked twice.

SLURM, Kubernetes and spot machines send SIGTERM and kill some 30 seconds later.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from whet.train.distributed import job

# torchrun passes on a signal that a terminal has already sent to the whole process group; its copy,
# which comes within moments, is not the user asking a second time.
TORCHRUN_REPEATS_WITHIN_S = 2.0


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Raised inside `Stop.interruptible()` when a signal arrives."""


@dataclass
class Stop:
    """Whether this process was asked to leave: `number` is the signal's, 0 if it was not."""

    grace_s: float
    number: int = 0
    asked_at: float = 0.0
    may_raise: bool = False

    @contextmanager
    def interruptible(self, on: bool = True) -> Iterator[None]:
        """A block that changes nothing that is kept: a signal cuts it short by `Interrupted`."""
        if on and self.number:
            raise Interrupted
        self.may_raise = on
        try:
            yield
        finally:
            self.may_raise = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        now = time.monotonic()
        if self.number:
            repeated = now - self.asked_at < TORCHRUN_REPEATS_WITHIN_S
            if job() and repeated:
                return
            self.leave("leaving at once, without saving")
        self.number, self.asked_at = number, now
        timer = threading.Timer(
            self.grace_s, self.leave, ("--grace_seconds are over; leaving without a new save",)
        )
        timer.daemon = True
        timer.start()
        if self.may_raise:
            self.may_raise = False
            raise Interrupted

    def leave(self, why: str) -> None:
        """End this process now. What is saved stays valid: saves are renamed when complete."""
        print(f"whet: {signal.Signals(self.number).name}: {why}", file=sys.stderr, flush=True)
        os._exit(128 + self.number)


@contextmanager
def stop_on_signals(grace_s: float) -> Iterator[Stop]:
    """Handle SIGTERM and SIGINT in the block; in a thread other than the main one, do nothing."""
    stop = Stop(grace_s)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: signal.signal(n, stop.handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
