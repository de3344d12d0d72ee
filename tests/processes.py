"""Real processes for tests: ranks that talk to each other, and runs that are killed.

A fork server imports torch and Whet once; each process is a fork of it and starts in milliseconds.
It is no fork of pytest itself, since torch refuses to fork once it has run a backward pass.
"""

import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["tests.processes", "whet.stages.sft", "whet.stages.pretrain", "whet.cli"]
PRELOAD += ["torch.utils.tensorboard", "torch.distributed.checkpoint", "torch.distributed.fsdp"]


def start_server() -> None:
    """Let the server begin to import; whoever starts it first decides what it imports."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the server inherits it
    CONTEXT.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


def start(
    commands: Sequence[Sequence[str]],
    *,
    log: Path,
    rank: int = 0,
    size: int = 1,
    ports: Sequence[int] = (),
    environment: dict[str, str] | None = None,
    file_limit: int | None = None,
) -> multiprocessing.Process:
    """Start a process that runs `whet` commands one after the other and ends with the last code.

    It may write no file longer than `file_limit` bytes: what a full disk is to a program.
    """
    start_server()
    lists = [list(map(str, words)) for words in commands]
    arguments = (lists, str(log), rank, size, list(ports), environment or {}, file_limit)
    process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
    process.start()
    return process


def _run(
    commands: list[list[str]],
    log: str,
    rank: int,
    size: int,
    ports: list[int],
    environment: dict[str, str],
    file_limit: int | None,
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    import torch

    from whet import cli

    torch.set_num_threads(1)
    os.environ.update(environment)
    if file_limit is not None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, hard))
    code = 0
    for i, words in enumerate(commands):
        if size > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[i]))
        code = cli.main(words)
        if code:
            break
    sys.stdout.flush()
    sys.exit(code)


def start_ranks(
    commands: Sequence[Sequence[str]], *, size: int, folder: Path
) -> tuple[list[multiprocessing.Process], list[Path]]:
    """Start `size` ranks that run the same commands; returns them and their logs in `folder`."""
    ports = [free_port() for _ in commands]
    logs = [folder / f"rank{rank}.log" for rank in range(size)]
    ranks = [
        start(commands, log=logs[rank], rank=rank, size=size, ports=ports) for rank in range(size)
    ]
    return ranks, logs


def run_ranks(
    commands: Sequence[Sequence[str]], *, size: int, folder: Path, timeout_s: float = 120
) -> list[int]:
    """Run the same commands on `size` ranks; returns their exit codes. A rank that hangs fails."""
    return wait(*start_ranks(commands, size=size, folder=folder), timeout_s)


def wait(
    processes: Sequence[multiprocessing.Process], logs: Sequence[Path], timeout_s: float
) -> list[int]:
    """Wait for all; kill them and fail if one takes longer than `timeout_s`."""
    until = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    text = "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in logs if log.exists())
    assert not late, f"{len(late)} of {len(processes)} processes did not end\n{text}"
    return [process.exitcode for process in processes]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
