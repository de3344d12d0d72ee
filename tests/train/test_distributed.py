"""Real processes, each a rank of two: how one that fails leaves, and a save that one can't make."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.processes import CONTEXT, free_port, start_server, wait
from whet.errors import UserError
from whet.train import distributed
from whet.train.run import RunFolder
from whet.train.state import Facts, damage, saved_states


class SlowToGo:
    """Stands for gloo's destructor, which may wait for ever."""

    def __del__(self):
        time.sleep(100)


def fail(error: BaseException, held: SlowToGo) -> None:
    """Raise with a local variable that is destroyed together with the traceback."""
    assert held
    raise error


def become_a_rank(rank: int, port: int, log: Path) -> None:
    """What torchrun does: a log and an environment."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def exchange(rank: int, port: int, log: Path, error: BaseException | None) -> None:
    """Raise `error` among the ranks, or go on exchanging numbers with the others."""
    become_a_rank(rank, port, log)
    with distributed.start_ranks("cpu", timeout_s=20) as ranks:
        distributed.sum_over_ranks([1.0], ranks)
        if error is not None:
            fail(error, SlowToGo())
        while True:
            distributed.sum_over_ranks([1.0], ranks)


def save_five_times(rank: int, port: int, log: Path, states: Path) -> None:
    """Rank 0 can't make the folder of the second save; the run goes on."""
    become_a_rank(rank, port, log)
    make = Path.mkdir

    def refuse(path: Path, **how: bool) -> None:
        if path.name == ".saving_step_00000002":
            raise OSError(28, "No space left on device")
        make(path, **how)

    Path.mkdir = refuse  # type: ignore[method-assign]
    with distributed.start_ranks("cpu", timeout_s=20) as ranks:
        run = RunFolder(states.parent, ranks)
        run.open({}, Facts())
        mesh = init_device_mesh("cpu", (2,))
        for step in range(1, 6):
            run.facts.step = step
            value = distribute_tensor(torch.full((4,), float(step)), mesh, [Shard(0)])
            run.save({"model.x": value}, wait=False)
        run.finish_saving()


def wait_for_rank_0(rank: int, port: int, log: Path, seconds: float) -> None:
    """Rank 0 has long to do before the steps, in a block for itself and in one of all ranks."""
    become_a_rank(rank, port, log)
    with distributed.start_ranks("cpu", timeout_s=1) as ranks:
        with distributed.together(ranks):
            time.sleep(0 if rank else seconds)
        time.sleep(0 if rank else seconds)
        assert distributed.from_first(rank, ranks, ranks.setup) == 0


def run_two(target: Callable, folder: Path, last: Sequence[Any]) -> tuple[list[int], list[Path]]:
    """Exit codes and logs of two ranks that run `target`, each with its argument of `last`."""
    start_server()
    port, logs = free_port(), [folder / "rank0.log", folder / "rank1.log"]
    ranks = []
    for rank, argument in enumerate(last):
        arguments = (rank, port, logs[rank], argument)
        ranks.append(CONTEXT.Process(target=target, args=arguments, daemon=True))
        ranks[-1].start()
    return wait(ranks, logs, 60), logs


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
    codes, logs = run_two(exchange, tmp_path, [None, error])
    assert codes == [1, code]
    told = logs[1].read_text()
    assert words in told
    assert ("Traceback" in told) == isinstance(error, ValueError)
    other = logs[0].read_text().splitlines()
    assert len(other) == 1
    assert other[0].startswith("whet: rank 0 ends, since another rank has ended")


def test_a_save_that_rank_0_cannot_begin_costs_this_save_only(tmp_path):
    """All ranks leave it out; else the others would write the next one into the wrong folder."""
    states = tmp_path / "state"
    codes, logs = run_two(save_five_times, tmp_path, [states, states])
    assert codes == [0, 0]
    assert logs[0].read_text().count("could not be saved") == 1
    kept = saved_states(states)
    assert [path.name for path in kept] == ["step_00000004", "step_00000005"]
    for path in kept:
        assert damage(path) is None
        shards = [load_file(file)["model.x"] for file in sorted(path.glob("*.safetensors"))]
        assert torch.equal(torch.cat(shards), torch.full((4,), float(path.name[-1])))


def test_what_comes_before_the_steps_may_take_longer_than_rank_timeout(tmp_path):
    """A corpus is tokenised by rank 0 alone."""
    codes, logs = run_two(wait_for_rank_0, tmp_path, [3.0, 3.0])
    assert codes == [0, 0], logs[1].read_text()


def save_slowly(rank: int, port: int, log: Path) -> None:
    """Rank 0 writes and verifies for longer than the ranks wait for each other's numbers."""
    become_a_rank(rank, port, log)
    with distributed.start_ranks("cpu", timeout_s=2) as ranks:
        distributed.sum_over_ranks([1.0], ranks)
        if ranks.first:
            time.sleep(4)
        distributed.wait_for_all(ranks)
        distributed.sum_over_ranks([1.0], ranks)


def test_ranks_wait_for_a_slow_save_beyond_the_rank_timeout(tmp_path):
    start_server()
    port, logs = free_port(), [tmp_path / f"rank{rank}.log" for rank in range(2)]
    ranks = [CONTEXT.Process(target=save_slowly, args=(r, port, logs[r])) for r in range(2)]
    for process in ranks:
        process.start()
    assert wait(ranks, logs, timeout_s=60) == [0, 0]
