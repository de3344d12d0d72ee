"""One function over many items in worker processes: in order, in bounded memory, ended cleanly."""

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from types import ModuleType
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


def start_server(*needed: Any) -> None:
    """Start the process from which workers are forked; it imports the modules of `needed` once.

    `ordered_map` does so itself. Called before something slow it saves their time.
    """
    modules = [__name__, *(item.__module__ for item in needed)]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    resource_tracker.ensure_running()  # starting it later would undo `_without_interrupts`
    with _without_interrupts():
        forkserver.ensure_running()


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """`map(function, items)` by `workers` processes, started at once; with none, in this one.

    `function` is pickled once, items and results for each call. Processes are forked from a server,
    not from the caller, whose threads (torch, tokenizers) a fork would break.
    They end when the iterator is closed or fails, on Ctrl-C, and when this process dies. An
    exception of `function` is raised here; a worker that is killed raises UserError.
    """
    if workers < 1:
        return _alone(function, items)
    results = _results(function, items, workers)
    next(results)
    return results


def _alone(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        with _unswept():
            result = function(item)
        yield result


def _results(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """None when the processes have been started, then the results."""
    start_server(function)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = zip(*(context.Pipe() for _ in range(workers)), strict=True)
    process = context.Process(target=_fork_workers, args=(function, theirs), daemon=True)
    try:
        with _without_interrupts(), _without_main():
            process.start()
        for connection in theirs:
            connection.close()  # so that a worker's death is seen as the end of its pipe
        yield None
        yield from _dispatch(ours, items)
    finally:
        for connection in ours:
            connection.close()
        if process.is_alive():  # it may have failed to start
            process.terminate()
            process.join()


def _fork_workers(function: Callable[[Any], Any], connections: Sequence[Connection]) -> None:
    """One worker for each connection. They share what `function` holds: made once, held once."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    gc.freeze()  # so that sweeping does not touch, and thereby copy, what they share
    running = set()
    for connection in connections:
        worker = os.fork()
        if not worker:
            for other in connections:
                if other is not connection:
                    other.close()
            _serve(function, connection)
            os._exit(0)
        running.add(worker)
    for connection in connections:
        connection.close()

    def end(*_: Any) -> None:
        for worker in running:
            with suppress(ProcessLookupError):  # it has ended, and is about to leave `running`
                os.kill(worker, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    while running:
        running.remove(os.wait()[0])


def _dispatch(connections: Sequence[Any], items: Iterable[Any]) -> Iterator[Any]:
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
def _without_main() -> Iterator[None]:
    """Processes that are started here do not import the caller's script, as multiprocessing has it.

    They need nothing of it; it may take seconds (torch), and would start them again where it lacks
    `if __name__ == "__main__"`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


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
