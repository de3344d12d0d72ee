"""The thread that computes a model's replies, with continuous batching.

A reply joins the running rows as soon as a row is free and leaves when it has ended or nobody waits
for it any more; the others never wait for it.
"""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from whet.generate.rows import Piece, Row, Rows
from whet.model.decoder import Transformer

STEPS = {"cpu": 1, "cuda": 4}
"""Tokens of each row between two looks: more is faster on a GPU, but comes in larger pieces."""


class Full(Exception):  # noqa: N818 -- an answer, not an accident
    """As many replies wait as may wait."""


@dataclass(frozen=True)
class Job:
    """A reply that is asked for; `row.index` is its number."""

    row: Row
    deliver: Callable[[Piece | Exception], None]
    """Gets each piece, or what has gone wrong, in the worker's thread."""


class Worker:
    """Computes replies of `model` until the process ends: `batch_size` at once, `queue` waiting."""

    def __init__(
        self, model: Transformer, stop_ids: set[int], context: int, batch_size: int, queue: int
    ) -> None:
        self.model, self.stop_ids, self.context = model, stop_ids, context
        self.batch_size, self.queue = batch_size, queue
        self.steps = STEPS.get(next(model.parameters()).device.type, 1)
        self.changed = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self.gone: set[int] = set()
        """Running replies that nobody waits for any more."""
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue `jobs`. Raises Full if they don't all fit, also those that could start at once."""
        with self.changed:
            free = self.batch_size - len(self.running)
            if len(self.waiting) + len(jobs) > self.queue + free:
                raise Full
            self.waiting += jobs
            self.changed.notify()

    def cancel(self, numbers: set[int]) -> None:
        """Nobody waits for these replies any more."""
        with self.changed:
            self.waiting = deque(job for job in self.waiting if job.row.index not in numbers)
            self.gone |= numbers & self.running.keys()

    def _work(self) -> None:
        rows = self._rows()
        while True:
            joining = self._joining(rows)
            try:
                while joining:
                    self._deliver(rows.begin(rows.take(joining)))
                if rows.live:
                    self._deliver(rows.step(self.steps))
            except Exception as error:  # such as the end of the GPU's memory: the server lives on
                traceback.print_exc(file=sys.stderr)
                with self.changed:
                    failed, self.running = self.running, {}
                rows = self._rows()
                for job in failed.values():
                    job.deliver(error)

    def _rows(self) -> Rows:
        size = self.batch_size, self.context, self.context
        return Rows(self.model, *size, self.stop_ids, measured=1.0)

    def _joining(self, rows: Rows) -> list[Row]:
        """Let rows go that nobody waits for; the next to run, shortest first. Waits for work."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.running)
            for number in self.gone & self.running.keys():
                rows.leave(number)
                del self.running[number]
            self.gone.clear()
            count = min(len(self.waiting), self.batch_size - len(self.running))
            jobs = [self.waiting.popleft() for _ in range(count)]
            self.running |= {job.row.index: job for job in jobs}
        return sorted((job.row for job in jobs), key=lambda row: len(row.text))

    def _deliver(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            with self.changed:
                job = self.running[piece.index]
                if piece.ended:
                    del self.running[piece.index]
            job.deliver(piece)
