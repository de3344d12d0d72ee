"""One function over many items in worker processes: in order, in bounded memory, ended cleanly."""

import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from whet.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
"""Results per worker that may wait for a slower one before them: bounds the memory."""


def usable_cores() -> int:
    """Cores that this process may use, which in a container or under SLURM are not all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """`map(function, items)` by `workers` processes; with none, in this one.

    `function` is pickled once for each worker, items and results for each call. Processes are
    spawned, not forked: the caller may have threads (torch, tokenizers), which a fork would break.
    They end when the iterator is closed or fails, on Ctrl-C, and when this process dies. An
    exception of `function` is raised here; a worker that is killed raises UserError.
    """
    if workers < 1:
        for item in items:
            with _unswept():
                result = function(item)
            yield result
        return
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # starting it later would undo `_without_interrupts`
    processes: list[Any] = []
    connections: list[Any] = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs), daemon=True)
            with _without_interrupts():
                process.start()
            theirs.close()  # so that a worker's death is seen as the end of its pipe
            processes.append(process)
            connections.append(ours)
        yield from _dispatch(connections, items)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _dispatch(connections: list[Any], items: Iterable[Any]) -> Iterator[Any]:
    """Hand items to idle workers; yield the results in the order of the items."""
    numbered = enumerate(items)
    idle = list(connections)
    working: dict[Any, int] = {}
    done: dict[int, Any] = {}
    next_out, exhausted = 0, False
    while True:
        while idle and not exhausted and len(done) < AHEAD * len(connections):
            number, item = next(numbered, (-1, None))
            exhausted = number < 0
            if not exhausted:
                connection = idle.pop()
                _send(connection, item)
                working[connection] = number
        if not working and not done:
            return
        if next_out in done:
            yield done.pop(next_out)
            next_out += 1
            continue
        for connection in wait(list(working)):
            done[working.pop(connection)] = _receive(connection)
            idle.append(connection)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started here never see Ctrl-C, which the terminal sends to all of them:
    the main process ends them. For itself it only comes a moment later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _unswept() -> Iterator[None]:
    """Python looks for unreachable cycles each 700 objects, a twentieth of the time of encoding.

    An item makes few; they are swept up when it is done.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


KILLED = (
    "a worker process was killed, probably because memory ran out; "
    "use fewer with --workers, or look into the system's log"
)


def _send(connection: Any, item: Any) -> None:
    try:
        connection.send(item)
    except BrokenPipeError:
        raise UserError(KILLED) from None


def _receive(connection: Any) -> Any:
    try:
        failed, value = connection.recv()
    except (EOFError, ConnectionResetError):
        raise UserError(KILLED) from None
    if failed:
        raise value
    return value


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """A worker's life: items in, results out, until the pipe ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    while True:
        try:
            item = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            with _unswept():
                answer: tuple[bool, Any] = (False, function(item))
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            answer = (True, error)
        try:
            connection.send(answer)
        except BrokenPipeError:
            return
