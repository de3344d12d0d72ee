"""How a rank that fails leaves: in real processes, each a rank of two."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.processes import CONTEXT, free_port, start_server, wait
from whet.errors import UserError
from whet.train import distributed


class SlowToGo:
    """Stands for gloo's destructor, which may wait for ever."""

    def __del__(self):
        time.sleep(100)


def fail(error: BaseException, held: SlowToGo) -> None:
    """Raise with a local variable that is destroyed together with the traceback."""
    assert held
    raise error


def be_a_rank(rank: int, port: int, log: Path, error: BaseException | None) -> None:
    """Raise `error` among the ranks, or go on exchanging numbers with the others."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with distributed.start_ranks("cpu", timeout_s=20) as ranks:
        distributed.sum_over_ranks([1.0], ranks)
        if error is not None:
            fail(error, SlowToGo())
        while True:
            distributed.sum_over_ranks([1.0], ranks)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("a defect"), 1, "ValueError: a defect"),
        (
            UserError("a bad file\na bad flag"),
            2,
            "whet: error: a bad file\nwhet: error: a bad flag",
        ),
        (SystemExit(2), 2, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["defect", "user", "exit", "ctrl_c"],
)
def test_a_rank_that_fails_leaves_at_once(tmp_path, error, code, words):
    """Whatever teardown would wait for; the other rank ends too, and points at this one."""
    start_server()
    port, logs = free_port(), [tmp_path / "rank0.log", tmp_path / "rank1.log"]
    ranks = []
    for rank, raised in enumerate([None, error]):
        arguments = (rank, port, logs[rank], raised)
        ranks.append(CONTEXT.Process(target=be_a_rank, args=arguments, daemon=True))
        ranks[-1].start()
    assert wait(ranks, logs, 60) == [1, code]
    told = logs[1].read_text()
    assert words in told
    assert ("Traceback" in told) == isinstance(error, ValueError)
    other = logs[0].read_text().splitlines()
    assert len(other) == 1
    assert other[0].startswith("whet: rank 0 ends, since another rank has ended")
