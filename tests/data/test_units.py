"""Pairs and labels of a row: what a batch of preferences holds beside its tokens."""

import numpy as np
import pytest
import torch

from whet.data.batches import micro_batches, per_document, read_batch
from whet.data.layout import segment_documents
from whet.data.store import PackedStore, new_store
from whet.errors import UserError

SEGMENTS = np.array([[1, 1, 2, 2, 3, 3, 4, 4], [1, 1, 1, 2, 2, 2, 0, 0], [0] * 8])


def write(path, kind, segments=SEGMENTS, **numbers):
    tokens, mask = np.full(segments.shape, 5), np.where(segments > 0, 1.0, 0.0)
    with new_store(path, *segments.shape, attrs={"kind": kind}) as writer:
        writer.write_rows(tokens, mask, segments)
        writer.write_documents(segment_documents(segments, mask))
        for name, values in numbers.items():
            writer.write_numbers(name, np.array(values))
    return PackedStore(path, [kind])


def test_a_batch_says_which_documents_are_pairs(tmp_path):
    store = write(tmp_path / "a.h5", "preferences", margins=[2.5, np.nan, -1])
    batch = read_batch(store, np.array([1, 0, 2, 0]), total=1.0)
    assert batch.extra["pairs"].tolist() == [[1, 0], [1, 1], [0, 0], [1, 1]]
    assert batch.extra["margins"].tolist() == [[-1, 0], [2.5, 0], [0, 0], [2.5, 0]]
    sums = per_document(batch.weight, batch.segments)  # chosen stand in odd columns
    assert sums[:, 1::2].tolist() == [[2, 0], [1, 1], [0, 0], [1, 1]]
    assert sums[:, 2::2].tolist() == [[2, 0], [1, 1], [0, 0], [1, 1]]
    first, second = micro_batches(batch, 3, 2)
    assert torch.equal(first.extra["pairs"], batch.extra["pairs"][:3])
    assert second.extra["pairs"].tolist() == [[1, 1], [0, 0], [0, 0]]


def test_labels_stand_where_per_document_puts_a_document(tmp_path):
    store = write(tmp_path / "a.h5", "labels", labels=[1, 0, 0, 1, 1, 0])
    batch = read_batch(store, np.array([1, 0, 2]), total=1.0)
    assert batch.extra["labels"].tolist() == [[0, 1, -1, 0, 0], [0, 1, -1, -1, 1], [0] * 5]


def test_text_has_nothing_beside(tmp_path):
    assert read_batch(write(tmp_path / "a.h5", "text"), np.array([0]), total=1.0).extra == {}


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    odd = np.array([[1, 1, 2, 2, 3, 3, 0, 0]])
    with pytest.raises(UserError, match="margins needs 2 documents each, 1 is over"):
        read_batch(write(tmp_path / "a.h5", "preferences", odd), np.array([0]), total=1.0)
    store = write(tmp_path / "b.h5", "labels", odd, labels=[1.0])
    with pytest.raises(UserError, match=r"labels has .1,. numbers, expected 3"):
        read_batch(store, np.array([0]), total=1.0)
