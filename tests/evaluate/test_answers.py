import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.evaluate.answers import extract_answer, same_number, wilson

REPLIES = [
    # the answer tag comes first, wherever it stands
    ("<think>3 + 4 = 7</think><answer>7</answer>", "7"),
    ("<answer>7</answer> She has 9 left. #### 12", "7"),
    ("#### 12\n<answer>7</answer>", "7"),
    ("<answer>5</answer> no, wait: <answer>6</answer>", "6"),
    ("<ANSWER> 7 </ANSWER>", "7"),
    ("<answer>\n7\n</answer>", "7"),
    ("<answer>7", "7"),
    ("<answer>18 dollars per 2 days</answer>", "18"),
    ("<answer>She has 8</answer>", "8"),
    ("<answer>5 + 3 = 8</answer>", "8"),
    ("<answer></answer> 7", None),
    ("<answer>none</answer> #### 7", None),
    # then GSM8K's mark
    ("She makes 9 * 2 = 18 dollars.\n#### 18", "18"),
    ("#### 18\nQ: 3 birds", "18"),
    ("#### 18 #### 20", "20"),
    ("#### $1,234.50 in 3 weeks", "1234.50"),
    ("####18", "18"),
    ("#### \n 18", "18"),
    ("#### unknown", None),
    # then the last number
    ("It is 16 - 3 - 4 = 9, times 2: 18.", "18"),
    ("The answer is **18**.", "18"),
    ("so \\boxed{1{,}234}", "1234"),
    ("3, 4", "4"),
    ("1,23", "23"),
    ("10-5", "5"),
    ("x2 - 5", "5"),
    ("(3)-5", "5"),
    ("7 = x2", "7"),
    ("18 grams of CO2", "18"),
    ("Wait...5", "5"),
    ("no number here", None),
    ("", None),
    # thinking is no answer
    ("<think>3 + 4 = 7", None),
    ("<think>3 + 4 = 7</think>", None),
    ("so 3 + 4 = 7</think>It is 8 after 1 more: 8", "8"),
    ("<think>maybe <answer>5</answer>?</think><answer>6</answer>", "6"),
    ("<think>#### 5</think>It is 6", "6"),
]

NUMBERS = [  # one number each, in the ways that people and models write it
    ("1,234", "1234"),
    ("1,234,567.89", "1234567.89"),
    ("1\u202f234", "1234"),
    ("1\\,234", "1234"),
    ("18.", "18"),
    ("18.00", "18.00"),
    (".5", ".5"),
    ("-5", "-5"),
    ("+5", "5"),
    ("\u22125", "-5"),
    ("= -5", "-5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("\\$18", "18"),
    ("$18", "18"),
    ("€1,000", "1000"),
    ("£3.50", "3.50"),
    ("Rs.500", "500"),
    ("18$", "18"),
    ("25%", "25"),
    ("25 %", "25"),
    ("5kg", "5"),
    ("10th", "10"),
    ("5 apples", "5"),
    ("60 km/h", "60"),
    ("1/2", "1/2"),
    ("1 1/2", "1 1/2"),
    ("-1 1/2", "-1 1/2"),
    ("1½", "1 1/2"),
    ("\\frac{3}{4}", "3/4"),
    ("2\\dfrac{3}{4}", "2 3/4"),
    ("1e3", "1e3"),
    ("5 million", "5"),
    ("007", "007"),
]


@pytest.mark.parametrize(("reply", "answer"), REPLIES)
def test_extract_answer(reply: str, answer: str | None) -> None:
    assert extract_answer(reply) == answer


@pytest.mark.parametrize("frame", ["{}", "<answer>{}</answer>", "#### {}", "The answer is {}"])
@pytest.mark.parametrize(("text", "answer"), NUMBERS)
def test_a_number_reads_alike_wherever_it_stands(frame: str, text: str, answer: str) -> None:
    assert extract_answer(frame.format(text)) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("18", "18.00", True),
        ("18", "18.01", False),
        ("18", "-18", False),
        ("-0", "0", True),
        ("1/2", "0.5", True),
        ("1/2", ".5", True),
        ("36/2", "18", True),
        ("1 1/2", "1.5", True),
        ("-1 1/2", "-1.5", True),
        ("1/3", "0.33", False),
        ("1/3", "0.3333333333333333", False),
        ("0.1", "0.10000000000000001", False),
        ("1e3", "1000", True),
        ("9007199254740993", "9007199254740992", False),
        ("007", "7", True),
        ("1/0", "1/0", False),
        (None, "5", False),
        ("5", None, False),
        (None, None, False),
        ("", "", False),
    ],
)
def test_same_number(a: str | None, b: str | None, same: bool) -> None:
    assert same_number(a, b) is same
    assert same_number(b, a) is same


@settings(max_examples=100, deadline=None)
@given(
    cents=st.integers(-(10**12), 10**12),
    before=st.sampled_from(["", "It costs $", "Total: ", "x = ", "**"]),
    after=st.sampled_from(["", ".", " dollars", "**", "\n", "%"]),
)
def test_any_amount_survives_being_written(cents: int, before: str, after: str) -> None:
    """Written with commas, currency and units, every number is read back exactly."""
    written = f"{abs(cents) // 100:,}.{abs(cents) % 100:02d}"
    reply = f"There were 3. {before}{'-' if cents < 0 else ''}{written}{after}"
    assert same_number(extract_answer(reply), f"{cents}/100")
    assert not same_number(extract_answer(reply), f"{cents + 1}/100")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789,./-+$ e<>#answertk\n", max_size=80))
def test_any_text_is_read_without_failing(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or same_number(answer, answer) or "/0" in answer


def test_a_reply_of_thousands_of_digits_is_no_number() -> None:
    answer = extract_answer("#### " + "9" * 20_000)
    assert not same_number(answer, answer)


def test_every_gold_answer_of_gsm8k_is_read(shared_data) -> None:
    for name in ("train", "test"):
        for line in (shared_data / f"gsm8k/{name}.jsonl").read_text().splitlines():
            written = json.loads(line)["answer"].rpartition("####")[2]
            plain = written.strip().replace(",", "")
            assert extract_answer(f"#### {written}") == plain
            assert same_number(extract_answer(f"<answer>${written.strip()}.00</answer>"), plain)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),  # the mirror of 0 of 29, which is (0, 0.1170)
    ],
)
def test_wilson(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_knows_its_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0


@given(st.integers(1, 5000), st.data())
@settings(max_examples=100, deadline=None)
def test_wilson_solves_its_equation(n: int, data) -> None:
    """The ends are where |p - q| = z sqrt(q (1 - q) / n): the definition, not the closed form."""
    correct = data.draw(st.integers(1, n))
    for end in wilson(correct, n):
        distance = abs(correct / n - end)
        assert distance == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5, abs=1e-6)
