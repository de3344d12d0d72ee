import dataclasses
import itertools

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_store import example_rows, write
from whet.data.batches import (
    epoch_order,
    get_sft_batch_iterator,
    global_batch_rows,
    micro_batch_count,
    micro_batches,
    per_document,
    positions_of,
    steps_per_epoch,
)
from whet.data.store import PackedStore


@pytest.fixture
def store(tmp_path):
    return write(tmp_path / "a.h5", example_rows(n_rows=10))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 3))
def test_each_epoch_trains_each_row_once(n, size, seed):
    per_epoch = steps_per_epoch(n, size)
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        rows = np.concatenate([global_batch_rows(n, size, seed, step) for step in steps])
        assert sorted(rows.tolist()) == list(range(n))


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_order(50, s, e).tolist()) for s, e in itertools.product(range(3), [0, 1])]
    assert len(set(orders)) == 6


def test_the_order_is_fixed_for_ever():
    """A resumed run, on another version of numpy, too, must go on with the same rows."""
    assert epoch_order(8, seed=1, epoch=2).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_shares_are_disjoint_and_together_the_global_batch(store, world_size, batch_size):
    ranks = [
        list(get_sft_batch_iterator(store, batch_size, rank=r, world_size=world_size, epochs=2))
        for r in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {2 * steps_per_epoch(10, batch_size)}
    for step, shares in enumerate(zip(*ranks, strict=True)):
        rows = np.concatenate([share.rows for share in shares])
        whole = global_batch_rows(10, batch_size, 0, step)
        assert sorted(rows.tolist()) == sorted(whole.tolist())
        assert len({share.total for share in shares}) == 1
        weights = sum(share.weight.double().sum().item() for share in shares)
        assert weights == shares[0].total == store.loss_tokens[whole].sum()
        assert {share.epoch for share in shares} == {step // steps_per_epoch(10, batch_size)}


def test_resuming_gives_the_same_batches(store):
    straight = list(get_sft_batch_iterator(store, 3, seed=4, epochs=3))
    resumed = list(get_sft_batch_iterator(store, 3, seed=4, epochs=3, start_step=5))
    assert len(resumed) == len(straight) - 5
    for a, b in zip(straight[5:], resumed, strict=True):
        assert (a.rows == b.rows).all()
        assert torch.equal(a.tokens, b.tokens)


def test_without_epochs_it_never_ends(store):
    endless = get_sft_batch_iterator(store, 64)
    assert [batch.epoch for batch in itertools.islice(endless, 4)] == [0, 1, 2, 3]


def test_the_shift_by_the_definition(store):
    """Targets are the next tokens; weight is theirs; nothing crosses the border of a document."""
    batch = next(iter(get_sft_batch_iterator(store, 10)))
    tokens, mask, segments = (t.tolist() for t in (batch.tokens, batch.loss_mask, batch.segments))
    for row, t in itertools.product(range(10), range(12)):
        inside = t < 11 and segments[row][t] == segments[row][t + 1] != 0
        assert batch.weight[row, t] == (mask[row][t + 1] if inside else 0)
        if inside:
            assert batch.targets[row, t] == tokens[row][t + 1]
    assert batch.weight.sum() > 0


def test_positions_restart_in_each_document():
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1] * 8])
    assert positions_of(segments).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8))]


def test_types(store):
    batch = next(iter(get_sft_batch_iterator(store, 4)))
    integers = (batch.tokens, batch.targets, batch.positions, batch.segments)
    assert {t.dtype for t in integers} == {torch.int64}
    assert batch.weight.dtype == batch.loss_mask.dtype == torch.float32
    assert torch.equal(batch.to("cpu").tokens, batch.tokens)


def test_fractional_weights_reach_the_batch(tmp_path):
    tokens, mask, segments = example_rows()
    store = write(tmp_path / "w.h5", (tokens, mask * np.float32(0.25), segments), weighted=True)
    batch = next(iter(get_sft_batch_iterator(store, 7)))
    assert set(batch.weight.unique().tolist()) == {0, 0.25}
    assert batch.total == pytest.approx(batch.weight.sum().item())


def test_a_file_of_tokens_and_mask_alone(tmp_path):
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["tokens"] = np.arange(24).reshape(3, 8)
        file["loss_mask"] = np.tile([0, 0, 1, 1, 1, 1, 1, 1], (3, 1))
    (batch,) = get_sft_batch_iterator(tmp_path / "plain.h5", 16, epochs=1)
    assert batch.tokens.shape == (3, 8)
    assert batch.total == 18
    assert (batch.targets[:, :-1] == batch.tokens[:, 1:]).all()


def test_limit_rows(store):
    batches = list(get_sft_batch_iterator(store, 4, epochs=1, limit_rows=3))
    assert len(batches) == 1
    assert sorted(batches[0].rows.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (6, 7)])
@pytest.mark.parametrize("micro", [1, 2, 3, 50])
def test_micro_batches_hold_the_share_and_are_as_many_on_each_rank(store, rank, world_size, micro):
    batches = get_sft_batch_iterator(store, 4, rank=rank, world_size=world_size, epochs=1)
    for step, batch in enumerate(batches):
        whole = len(global_batch_rows(10, 4, 0, step))
        count = micro_batch_count(whole, world_size, micro)
        parts = micro_batches(batch, micro, count)
        assert len(parts) == count
        assert len({part.tokens.shape for part in parts}) == 1
        rows = np.concatenate([part.rows for part in parts])
        assert rows[rows >= 0].tolist() == batch.rows.tolist()
        assert sum(p.weight.sum() for p in parts) == batch.weight.sum()
        for part in parts:
            empty = torch.from_numpy(part.rows < 0)
            assert (part.segments[empty] == 0).all()
            assert (part.weight[empty] == 0).all()
            assert part.total == batch.total


def test_too_few_micro_batches_are_refused(store):
    batch = next(iter(get_sft_batch_iterator(store, 8)))
    with pytest.raises(ValueError, match="do not fit"):
        micro_batches(batch, 2, 3)


def test_a_store_in_another_process_reads_the_same(store):
    import pickle

    copy = pickle.loads(pickle.dumps(store))
    assert isinstance(copy, PackedStore)
    assert (copy.rows([3]).tokens == store.rows([3]).tokens).all()


def test_named_tensors_are_cut_moved_and_filled_up_with_the_rest(store):
    batch = next(get_sft_batch_iterator(store, 5))
    tokens, documents = torch.rand(batch.tokens.shape), torch.rand(5, 4)
    batch = dataclasses.replace(batch, extra={"place": tokens, "document": documents})
    parts = micro_batches(batch, 2, 4)
    for name, whole in (("place", tokens), ("document", documents)):
        assert torch.equal(torch.cat([part.extra[name] for part in parts])[:5], whole)
        assert not torch.cat([part.extra[name] for part in parts])[5:].any()
    assert {v.device.type for v in parts[0].to("meta").extra.values()} == {"meta"}


def test_sums_per_document_by_the_definition():
    segments = torch.tensor([[1, 1, 2, 0], [1, 2, 3, 3]])
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]], requires_grad=True)
    expected = torch.tensor([[8.0, 3.0, 4.0, 0.0], [0.0, 16.0, 32.0, 192.0]])
    assert torch.equal(per_document(x, segments), expected)
    assert torch.equal(per_document(x, segments, 5)[:, :4], expected)
    per_document(x, segments)[:, 3].sum().backward()
    assert x.grad.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert per_document(x[:0], segments[:0]).shape == (0, 1)
