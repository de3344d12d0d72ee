"""pass@k against enumeration of all subsets, McNemar's test against the binomial distribution."""

import itertools
import math

import pytest

from whet.evaluate.answers import gained_and_lost, mcnemar, pass_at_k


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_reply(n):
    for right in range(n + 1):
        replies = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(replies, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, right, k) == pytest.approx(expected)


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="needs"):
        pass_at_k(3, 1, 4)


def test_the_same_model_twice_does_not_differ():
    right = [True, False, True]
    assert gained_and_lost(right, right) == (0, 0)
    assert mcnemar(0, 0) == 1.0


def test_mcnemar_is_the_two_sided_binomial_test():
    assert gained_and_lost([True, False, False], [False, True, True]) == (2, 1)
    assert mcnemar(6, 0) == mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(3, 3) == 1.0
    tail = sum(math.comb(10, i) for i in range(3)) / 2**10
    assert mcnemar(8, 2) == pytest.approx(2 * tail)
