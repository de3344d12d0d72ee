"""From the text of a reply to the number it states, and what counts of right and wrong replies say.

Where a reply states its answer, in this order:

1. inside the last `<answer>...</answer>` (an unclosed tag runs to the end of the reply);
2. after the last `####`, to the end of that line (GSM8K's own mark);
3. else the last number of the reply.

What stands in `<think>...</think>` is never an answer. A tag without a number is no answer: the
reply has committed itself, and a number elsewhere would be a guess on its behalf.

Numbers are compared as exact fractions: 18, 18.00, $18, 36/2 are one number; 0.33 and 1/3 are not.
Units are dropped, scale words are not multiplied out ("5 million" is 5), and a percentage is its
figure ("25 %" is 25), as in GSM8K's own answers.
"""

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

_CURRENCY = r"\\?[$€£¥₹]"
_NUMBER = re.compile(
    rf"""
    (?: (?<![A-Za-z0-9_)\]}}%]) (?P<sign>[-+]) (?:{_CURRENCY})? )?   # 10-5 has no sign, -$5 has one
    (?<![A-Za-z0-9_])                                                # not the 2 of CO2 or x2
    (?: (?P<whole>[0-9]+) [ ] (?=[0-9]+/[0-9]) )?                    # the 1 of 1 1/2
    (?P<number>
        (?: [0-9]{{1,3}} (?: ,[0-9]{{3}} )+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
        | (?<![A-Za-z0-9_.]) \.[0-9]+
    )
    (?: [eE] (?P<exponent>[-+]?[0-9]{{1,2}}) (?![A-Za-z0-9]) )?
    (?: / (?P<denominator>[0-9]+) (?![0-9/]) )?
    """,
    re.VERBOSE,
)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)|\A.*?</think>", re.DOTALL | re.IGNORECASE)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_PLAINER = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\ufe63\uff0d", "-")  # ways to write minus
    | {"¼": " 1/4", "½": " 1/2", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "\u2044": "/"}
    | dict.fromkeys("\u00a0\u202f\u2009", " ")
)
_SPACED_THOUSANDS = re.compile(r"(?<=[0-9])[\u00a0\u202f\u2009](?=[0-9]{3}(?![0-9]))")


def extract_answer(reply: str) -> str | None:
    """The number that `reply` states, without commas, currency and units; None if it states none.

    It is not computed on: `#### $1,250.50` gives `1250.50`, `1/2 cup` gives `1/2`.
    """
    text = _THINKING.sub(" ", reply)
    tagged = _ANSWER.findall(text)
    if tagged:
        return _stated_number(tagged[-1])
    if "####" in text:
        return _stated_number(text.rpartition("####")[2].strip().partition("\n")[0])
    numbers = _numbers(text)
    return numbers[-1][1] if numbers else None


def gold_of(value: Any) -> str | None:
    """The right number that a field of a data file holds, a text or a number; None if none."""
    if isinstance(value, str):
        return extract_answer(value)
    if type(value) not in (int, float) or not math.isfinite(value):
        return None
    return format(Decimal(repr(value)), "f")  # 1e-07 and 1e+300 in plain form


def same_number(a: str | None, b: str | None) -> bool:
    """Whether `a` and `b`, as `extract_answer` returns them, are the same number exactly."""
    x, y = _value(a), _value(b)
    return x is not None and x == y


def wilson(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion; `z` is the normal quantile, by default for 95 %.

    Unlike the normal approximation it stays within 0..1 and is honest near both ends
    (E. B. Wilson, 1927). Nothing measured (n = 0) leaves everything possible: (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    p, zz = correct / n, z * z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low = 0.0 if correct == 0 else max(0.0, middle - half)  # exact ends, free of rounding
    high = 1.0 if correct == n else min(1.0, middle + half)
    return low, high


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


def _stated_number(text: str) -> str | None:
    """The number of a short answer: `18 dollars a day`, `5 + 3 = 8`, `she has 8`."""
    text = text.rpartition("=")[2]
    numbers = _numbers(text)
    if not numbers:
        return None
    before, first = numbers[0]
    begins_with_it = not any(char.isalnum() for char in before)
    return first if begins_with_it else numbers[-1][1]


def _numbers(text: str) -> list[tuple[str, str]]:
    """(the text before it, the number in plain form) for each number of `text`."""
    text = _SPACED_THOUSANDS.sub(",", text.replace("{,}", ",").replace("\\,", ""))
    text = _LATEX_FRACTION.sub(r" \1/\2", text.translate(_PLAINER))
    return [(text[: match.start()], _plain(match)) for match in _NUMBER.finditer(text)]


def _plain(match: re.Match[str]) -> str:
    """The matched number without commas, currency and plus sign."""
    sign = "-" if match["sign"] == "-" else ""
    whole = f"{match['whole']} " if match["whole"] else ""
    exponent = f"e{match['exponent']}" if match["exponent"] else ""
    below = f"/{match['denominator']}" if match["denominator"] else ""
    return sign + whole + match["number"].replace(",", "") + exponent + below


def _value(text: str | None) -> Fraction | None:
    """The exact value of a number in plain form; None for 1/0 and for thousands of digits."""
    match = _NUMBER.fullmatch((text or "").strip())
    if match is None:
        return None
    exponent = f"e{match['exponent']}" if match["exponent"] else ""
    try:
        size = Fraction(match["number"].replace(",", "") + exponent)
        size = size / int(match["denominator"] or 1) + int(match["whole"] or 0)
    except (ValueError, ZeroDivisionError):  # Python refuses to read integers of over 4,300 digits
        return None
    return -size if match["sign"] == "-" else size
