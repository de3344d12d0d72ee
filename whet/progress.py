"""Progress that a person can watch and a log file can hold.

On a terminal a rich bar; elsewhere (CI, `| tee`, SLURM) a plain line every few seconds, because a
bar that redraws itself fills a log with control characters.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TextIO

PLAIN_LINE_EVERY_S = 5.0


@dataclass
class Progress:
    """What `track` yields: `advance` it as work is done."""

    description: str
    total: float | None
    unit: str
    show: Callable[["Progress"], None]
    done: float = 0.0
    note: str = ""
    started: float = field(default_factory=time.monotonic)
    hidden: Callable[[], AbstractContextManager] = nullcontext
    """Takes the bar from the terminal while the block runs."""

    def advance(self, n: float = 1, note: str = "") -> None:
        """Count `n` more units as done; `note` is shown at the end of the line."""
        self.done += n
        self.note = note or self.note
        self.show(self)

    def line(self) -> str:
        """One line of text, such as `Packing: 1,200 of 5,000 rows (24 %), 600 rows/s, 6 s left`."""
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        unit = f" {self.unit}" if self.unit else ""
        digits = 0 if (self.total or self.done) >= 10 or self.done == round(self.done) else 2
        text = f"{self.description}: {self.done:,.{digits}f}"
        if self.total:
            whole = f"{self.total:,.{digits}f}{unit}"
            text += f" of {whole} ({100 * self.done / self.total:.0f} %)"
        else:
            text += unit
        if rate >= 0.2:
            text += f", {rate:,.0f}{unit}/s" if rate >= 100 else f", {rate:.3g}{unit}/s"
        elif rate:
            each = f"a {self.unit.removesuffix('s')}" if self.unit else "each"
            text += f", {1 / rate:,.3g} s {each}"
        if self.total and 0 < self.done < self.total:
            text += f", {duration((self.total - self.done) / rate)} left"
        return f"{text}  {self.note}".rstrip()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block may show progress of its own, and its time counts not for the rate of this."""
        before = time.monotonic()
        try:
            with self.hidden():
                yield
        finally:
            self.started += time.monotonic() - before


def duration(seconds: float) -> str:
    """`42 s`, `7:05 min` or `3:07 h`: as exact as an estimate can be."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def count(n: int, things: str) -> str:
    """`2,000 rows` or `1 row`: a count for people; `things` begin with a plural in -s."""
    word, space, rest = things.partition(" ")
    return f"{n:,} {word[:-1] if n == 1 else word}{space}{rest}"


@contextmanager
def track(
    description: str, total: float | None = None, unit: str = "", quiet: bool = False
) -> Iterator[Progress]:
    """Show the progress of the block it surrounds.

    `total` is in `unit`s (None where it is not known beforehand). `quiet` shows nothing: ranks
    other than 0 and tests pass it.
    """
    if quiet:
        yield Progress(description, total, unit, show=lambda _: None)
    elif sys.stderr.isatty():
        yield from _bar(description, total, unit)
    else:
        yield from _lines(description, total, unit)


def _lines(description: str, total: float | None, unit: str) -> Iterator[Progress]:
    shown_at = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if now - shown_at >= PLAIN_LINE_EVERY_S:
            shown_at = now
            _put(progress.line(), sys.stderr)

    progress = Progress(description, total, unit, show)
    yield progress
    if shown_at > progress.started:  # something was shown: show the end, too
        _put(progress.line(), sys.stderr)


def _bar(description: str, total: float | None, unit: str) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.TextColumn("{task.fields[counts]}"),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(description, total=total, counts="")

        def show(progress: Progress) -> None:
            counts = progress.line().removeprefix(f"{description}: ")
            bar.update(task, completed=progress.done, counts=counts)

        @contextmanager
        def hidden() -> Iterator[None]:
            bar.live.transient = True
            bar.stop()
            try:
                yield
            finally:
                bar.live.transient = False
                bar.start()

        progress = Progress(description, total, unit, show, hidden=hidden)
        yield progress
        # As in a log: what was short leaves no line.
        bar.live.transient = time.monotonic() - progress.started < PLAIN_LINE_EVERY_S


def say(text: str = "") -> None:
    """Print one line for the user, at once even into a pipe."""
    _put(text, sys.stdout)


def _put(line: str, stream: TextIO) -> None:
    """Print a line. Where the reader has gone (`whet sft | head`), the work goes on unseen."""
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
