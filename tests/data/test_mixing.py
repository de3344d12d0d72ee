import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.encoding import RUN
from whet.data.mixing import draw_copies, duplicates, hold_out, whole_turns
from whet.errors import UserError


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_duplicates_are_all_but_the_first(pairs):
    expected = [i for i, pair in enumerate(pairs) if pair in pairs[:i]]
    digests = np.array(pairs, np.uint64).reshape(-1, 2)
    assert duplicates(digests).tolist() == expected


@pytest.mark.parametrize(
    ("weight", "total"), [(1, 100), (3, 300), (0.5, 50), (2.25, 225), (0.004, 0)]
)
def test_copies_are_exact(weight, total):
    copies = draw_copies(100, weight, np.random.default_rng(0))
    assert copies.sum() == total
    assert copies.max() - copies.min() <= 1
    assert (copies == draw_copies(100, weight, np.random.default_rng(0))).all()
    if weight % 1 > 0.1:
        assert (copies != draw_copies(100, weight, np.random.default_rng(1))).any()


@settings(max_examples=80, deadline=None)
@given(
    openings=st.lists(st.integers(0, 12), min_size=20, max_size=60),
    fraction=st.floats(0.05, 0.5),
    seed=st.integers(0, 3),
)
def test_an_opening_is_on_one_side(openings, fraction, seed):
    usable = np.arange(len(openings)) % 5 > 0
    try:
        dev = hold_out(np.array(openings, np.uint64), usable, fraction, seed)
    except UserError:
        return
    assert not (dev & ~usable).any()
    assert 0 < dev.sum() <= max(1, round(fraction * usable.sum()))
    sides = {(o, bool(d)) for o, d, u in zip(openings, dev, usable, strict=True) if u}
    assert len(sides) == len({opening for opening, _ in sides})


def test_the_dev_part_has_the_wanted_size_and_the_seed_decides():
    openings, usable = np.arange(1000, dtype=np.uint64), np.ones(1000, bool)
    first, other = (hold_out(openings, usable, 0.02, seed) for seed in (0, 1))
    assert first.sum() == other.sum() == 20
    assert (first != other).any()
    assert hold_out(openings, usable, 0.0, 0).sum() == 0


def test_no_dev_part_without_two_openings():
    with pytest.raises(UserError, match=r"--dev_fraction 0\.1 of 9 conversations"):
        hold_out(np.zeros(9, np.uint64), np.ones(9, bool), 0.1, 0)


def test_whole_turns():
    runs = np.array([(5, 10, 1), (20, 32, 1), (40, 50, 0.5)], RUN)
    assert [whole_turns(runs, n) for n in (9, 10, 31, 32, 49, 50)] == [0, 10, 10, 32, 32, 50]
    assert whole_turns(runs[:0], 100) == 0
