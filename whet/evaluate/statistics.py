"""What counts of right and wrong replies say: pass@k, and whether two models differ."""

import math
from collections.abc import Sequence


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that at least one of k replies is right, from n samples of which `correct`
    are: 1 - C(n - correct, k) / C(n, k), without bias (arXiv:2107.03374 eq. 1)."""
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} needs from 1 to n = {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def gained_and_lost(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """How many problems only `after` has right, and how many only `before`."""
    pairs = list(zip(before, after, strict=True))
    return sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test (1947): how often chance alone would divide the
    problems on which two models differ at least as unevenly. 1 if they differ on none."""
    n, least = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)
