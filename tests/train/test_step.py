"""Batches that are read ahead are those that the stage would give, with what the CPU knows."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from whet.data.batches import map_tensors
from whet.data.store import PackedStore
from whet.stages.packed import batches_of_step
from whet.train.distributed import Ranks
from whet.train.step import batches_ahead


@pytest.fixture
def batches(tmp_path):
    store = PackedStore(tiny.packed_file(tmp_path / "train.h5", n_rows=7))
    config = SimpleNamespace(overfit_rows=None, batch_size=4, micro_rows=2, seed=0)
    return partial(batches_of_step, config=config, store=store, ranks=Ranks())


def test_same_batches_in_the_same_order(batches):
    with batches_ahead(batches, 1, 5, torch.device("cpu")) as steps:
        for step, micros in enumerate(steps, 1):
            expected = batches(step)
            assert len(micros) == len(expected)
            for micro, batch in zip(micros, expected, strict=True):
                assert torch.equal(micro.batch.tokens, batch.tokens)
                assert torch.equal(micro.batch.plan.trained, batch.plan.trained)
                assert micro.segments == int(batch.segments.max())
                assert micro.tokens == int((batch.segments != 0).sum())
    assert step == 4


def test_a_problem_of_the_reader_reaches_the_loop(batches):
    def broken(step):
        if step == 1:
            raise OSError("the disk is gone")
        return batches(step)

    with (
        pytest.raises(OSError, match="the disk is gone"),
        batches_ahead(broken, 0, 5, torch.device("cpu")) as steps,
    ):
        list(steps)


def test_every_tensor_is_moved(batches):
    """Those of the plan, too: one that stayed behind would be found only on a GPU."""
    moved = map_tensors(batches(0)[0], lambda tensor: tensor.to("meta"))
    for found in (moved, moved.plan):
        tensors = {k: v.device.type for k, v in vars(found).items() if isinstance(v, torch.Tensor)}
        assert set(tensors.values()) == {"meta"}, tensors
