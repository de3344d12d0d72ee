import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bench_packing import fill
from whet.data.packing import pack


def check(lengths, capacity, packing):
    """Every document whole, inside its row, overlapping no other; rows without gaps."""
    order = np.lexsort((packing.start, packing.row))
    row, start = packing.row[order], packing.start[order]
    end = start + np.asarray(lengths)[order]
    same = row[1:] == row[:-1]
    assert (start[1:][same] == end[:-1][same]).all()
    assert (start[1:][~same] == 0).all()
    assert len(start) == 0 or start[0] == 0
    assert (end <= capacity).all()
    assert sorted(set(row.tolist())) == list(range(packing.n_rows))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 60).flatmap(
        lambda capacity: st.tuples(
            st.just(capacity), st.lists(st.integers(1, capacity), max_size=120)
        )
    ),
    st.integers(0, 5),
)
def test_documents_are_whole_and_apart(case, seed):
    capacity, lengths = case
    packing = pack(np.array(lengths, np.int64), capacity, seed)
    check(lengths, capacity, packing)
    # No two rows could be one: best fit's promise, which bounds the waste at one half.
    loads = np.bincount(packing.row, lengths, minlength=packing.n_rows) if lengths else []
    assert sum(2 * load <= capacity for load in loads) <= 1


def best_fit_decreasing(lengths, capacity):
    """The number of rows: each document, longest first, into the fullest row that has room."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits)[1]] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@pytest.mark.parametrize(("low", "high", "capacity"), [(30, 46, 128), (5, 9, 16), (20, 61, 128)])
def test_never_more_rows_than_best_fit_decreasing(low, high, capacity):
    lengths = np.random.default_rng(0).integers(low, high, 600)
    packing = pack(lengths, capacity)
    check(lengths, capacity, packing)
    assert packing.n_rows <= best_fit_decreasing(lengths.tolist(), capacity)


def test_the_seed_decides():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    first, again, other = pack(lengths, 128, 1), pack(lengths, 128, 1), pack(lengths, 128, 2)
    assert (first.row == again.row).all()
    assert (first.start == again.start).all()
    assert (first.row != other.row).any()


def test_rows_are_in_random_order():
    """Rows are filled longest document first; a reader in file order must not see it."""
    lengths = np.random.default_rng(0).integers(10, 100, 5000)
    packing = pack(lengths, 256)
    longest = np.zeros(packing.n_rows)
    np.maximum.at(longest, packing.row, lengths)
    assert abs(np.corrcoef(longest, np.arange(packing.n_rows))[0, 1]) < 0.1


@pytest.mark.parametrize("lengths", [[0], [5, 11]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match=r"must be 1\.\.10"):
        pack(np.array(lengths), 10)


def test_problem_lengths_like_gsm8k_fill_more_than_995_of_1000():
    """The distribution of GSM8K's lengths, about: best-fit decreasing fills 98.4 % of it."""
    lengths = np.random.default_rng(3).gamma(9.0, 20.0, 7473).astype(int).clip(74, 546)
    packing = pack(lengths, 1024)
    check(lengths, 1024, packing)
    assert fill(lengths, packing, 1024) > 0.995


def test_a_million_documents_in_seconds():
    lengths = np.random.default_rng(1).lognormal(5.5, 0.9, 1_000_000).astype(int).clip(5, 4096)
    started = time.process_time()
    packing = pack(lengths, 4096)
    assert time.process_time() - started < 5
    check(lengths, 4096, packing)
    assert fill(lengths, packing, 4096) > 0.999
