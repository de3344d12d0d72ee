import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from whet.data.store import PackedStore, new_store
from whet.errors import UserError
from whet.evaluate.dev import DevLoss, dev_loss
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights

VOCABULARY, LENGTH, STOP = 40, 24, 7


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = dataclasses.replace(llama(VOCABULARY, 32, 2, 4, max_positions=LENGTH), init_std=0.2)
    model = Transformer(config)
    init_weights(model, seed=0)
    return model


def write(path: Path, rows: int = 11, mask: np.ndarray | None = None) -> PackedStore:
    """Rows of two documents and some padding, with fractional weights; row 3 trains nothing."""
    numbers = np.random.default_rng(0)
    tokens = numbers.integers(0, VOCABULARY, (rows, LENGTH))
    segments = np.ones((rows, LENGTH), np.int32)
    segments[:, 10:20] = 2
    segments[:, 20:] = 0
    if mask is None:
        mask = numbers.choice([0.0, 0.0, 0.5, 1.0, 2.0], (rows, LENGTH)).astype(np.float32)
        mask[3] = mask[:, 20:] = 0
    with new_store(path, rows, LENGTH, weighted=True) as writer:
        writer.write_rows(tokens, mask, segments)
    return PackedStore(path)


@torch.no_grad()
def by_hand(model: Transformer, store: PackedStore) -> tuple[float, int]:
    """(loss, trained tokens), each document run on its own, in float64, by the definition."""
    model = model.double()
    loss = weights = 0.0
    tokens = 0
    for row in range(len(store)):
        read = store.rows([row])
        for document in (slice(0, 10), slice(10, 20)):
            ids = torch.from_numpy(read.tokens[:, document]).long()
            weight = torch.from_numpy(read.loss_mask[0, document]).double()[1:]
            log_p = model(ids)[0, :-1].log_softmax(-1)
            nll = -log_p.gather(1, ids[0, 1:, None])[:, 0]
            loss += float((nll * weight).sum())
            weights += float(weight.sum())
            tokens += int((weight != 0).sum())
    model.float()
    return loss / weights, tokens


@pytest.mark.parametrize("micro_rows", [1, 3, 64])
def test_every_dev_token_with_its_weight(model, tmp_path, micro_rows) -> None:
    store = write(tmp_path / "dev.h5")
    found = dev_loss(model, store, micro_rows=micro_rows)
    loss, tokens = by_hand(model, store)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.ppl == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.tokens == tokens


@pytest.mark.parametrize("world_size", [2, 3, 5, 16])
def test_the_same_at_any_number_of_ranks(model, tmp_path, world_size) -> None:
    """11 rows: uneven shares, and with 16 ranks some that have none."""
    store = write(tmp_path / "dev.h5")
    forwards = [0] * world_size
    tables: list[list[float]] = []

    def one_rank(rank: int, reduce) -> DevLoss:
        hook = model.register_forward_pre_hook(
            lambda *_: forwards.__setitem__(rank, forwards[rank] + 1)
        )
        found = dev_loss(
            model, store, micro_rows=2, rank=rank, world_size=world_size, reduce=reduce,
            stop_ids=[STOP],
        )  # fmt: skip
        hook.remove()
        return found

    def remember(table):
        tables.append(list(table))
        return table

    for rank in range(world_size):
        one_rank(rank, remember)
    assert len(set(forwards)) == 1, "ranks with fewer rows must run as many forwards"
    summed = np.sum(tables, axis=0)
    alone = dev_loss(model, store, micro_rows=2, stop_ids=[STOP])
    for rank in range(world_size):
        together = one_rank(rank, lambda _: summed)
        assert together.loss == pytest.approx(alone.loss, rel=1e-6)
        assert together.tokens == alone.tokens
        assert together.stop_probability == pytest.approx(alone.stop_probability, rel=1e-5)


def test_probability_of_the_stop_token_where_it_is_trained(model, tmp_path) -> None:
    mask = np.zeros((11, LENGTH), np.float32)
    mask[:, 5:9] = 1
    store = write(tmp_path / "dev.h5", mask=mask)
    assert dev_loss(model, store, micro_rows=4).stop_probability is None
    tokens = torch.from_numpy(store.rows(range(11)).tokens).long()
    probability = model(tokens[:, :10])[:, 4:8].softmax(-1)[..., STOP]
    expected = probability[tokens[:, 5:9] == STOP].mean()
    found = dev_loss(model, store, micro_rows=4, stop_ids=[STOP, VOCABULARY + 5])
    assert found.stop_probability == pytest.approx(float(expected), rel=1e-5)


def test_a_file_that_trains_nothing(model, tmp_path) -> None:
    store = write(tmp_path / "dev.h5", mask=np.zeros((11, LENGTH), np.float32))
    with pytest.raises(UserError, match=r"dev\.h5: no token in it is trained"):
        dev_loss(model, store, micro_rows=4)


def test_the_model_is_left_as_it_was(model, tmp_path) -> None:
    model.train()
    dev_loss(model, write(tmp_path / "dev.h5"), micro_rows=4)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
