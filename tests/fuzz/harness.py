"""Broken input by the thousand: each is read, or refused in a line; anything else is a bug."""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whet.errors import UserError


def counts(quick: int, long: int) -> Any:
    """Run a test with few inputs in `make test` and with many in `make soak`."""
    return pytest.mark.parametrize("count", [quick, pytest.param(long, marks=pytest.mark.slow)])


def fuzz(
    name: str, strategy: st.SearchStrategy, read: Callable[[Any], Any], count: int
) -> Counter[str]:
    """Give `read` `count` inputs; how many were read and how many refused.

    The few of `make test` are the same each time, the many of `make soak` are not.
    """
    tally: Counter[str] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 2000,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def attempt(value: Any) -> None:
        try:
            read(value)
        except UserError as error:
            tally["without words"] += not str(error).strip()
            tally["refused"] += 1
        else:
            tally["read"] += 1

    attempt()
    assert not tally.pop("without words", 0), "a refusal must say what is wrong"
    print(f"\nfuzz {name}: {tally['read'] + tally['refused']} inputs, {dict(tally)}")
    return tally


def damage(whole: bytes, rng: Random) -> bytes:
    """`whole` with up to four places changed, cut off, doubled or put in."""
    data = bytearray(whole)
    for _ in range(rng.randint(0, 4)):
        place, length = rng.randrange(len(data) + 1), rng.randint(1, 40)
        how = rng.choice(["flip", "flip", "set", "cut", "drop", "double", "insert"])
        if how == "flip" and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif how == "set":
            data[place : place + length] = rng.randbytes(length)
        elif how == "cut":
            del data[place:]
        elif how == "drop":
            del data[place : place + length]
        elif how == "double":
            data[place:place] = data[place : place + length]
        elif how == "insert":
            data[place:place] = rng.randbytes(length)
    return bytes(data)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Damaged copies of `whole`; drawn by seed, since long bytes are slow to draw one by one."""
    return st.integers(0, 2**32).map(lambda seed: damage(whole, Random(seed)))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([10**400, -(10**30), 2**31, 2**63, 1e308, -0.0, float("nan"), float("inf")]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["user", "assistant", "system", "tool", "{", "[1", "../x", "\ud800", "<|x|>"]),
)


def json_like(keys: list[str]) -> st.SearchStrategy:
    """Nested lists and objects whose keys are mostly those that a reader knows."""
    key = st.one_of(st.sampled_from(keys), st.text(max_size=4))
    return st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(key, inner, max_size=5)
        ),
        max_leaves=14,
    )
