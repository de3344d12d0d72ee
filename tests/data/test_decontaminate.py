import json

import pytest

from whet.chat.conversation import Conversation, RawText
from whet.data.decontaminate import Evaluations, read_evaluations, words_of
from whet.errors import UserError

LONG = "Ann has 3 apples and buys 4 more apples from Bob on a sunny Monday. How many are there?"


def asks(text, reply="Well."):
    return Conversation(
        [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    )


@pytest.fixture
def evaluations():
    found = Evaluations()
    found.add("What is 2 + 3?", "short.jsonl:1")
    found.add(LONG, "long.jsonl:7")
    return found


def test_words_without_case_punctuation_and_width():
    assert words_of("Ｗｈａｔ  is—2, STRASSE?") == ["what", "is", "2", "strasse"]


@pytest.mark.parametrize(
    ("datum", "number"),
    [
        (asks("what IS 2 3"), 0),
        (asks("What is 2 + 3? Tell me."), -1),  # short: the same question only
        (asks(LONG.upper()), 1),
        (asks("Listen: " + LONG[:65] + " Who?"), 1),  # 13 words in a row
        (asks("Ann has 3 apples. Bob buys 4. How many are there?"), -1),
        (asks("Give me a problem", f"Gladly: {LONG}"), 1),  # in an answer, too
        (asks("Say: what?", "What is 2 + 3?"), -1),  # equality is for questions
        (RawText("x " + LONG), 1),
    ],
)
def test_matches(evaluations, datum, number):
    assert evaluations.match(datum) == number


@pytest.mark.parametrize(
    "record",
    [
        {"question": LONG, "answer": "#### 7"},
        {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "7"}]},
        {"Body": LONG[:67], "Question": LONG[67:], "Answer": 7.0},
        {"problem": LONG},
        {"text": LONG},
    ],
)
def test_evaluation_files_of_many_shapes(tmp_path, record):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(record))
    found = read_evaluations([str(path)])
    assert found.names == [f"{path}:1"]
    assert found.match(asks(LONG)) == 0


def test_an_evaluation_file_without_questions(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"foo": 1}')
    with pytest.raises(
        UserError, match=r"test\.jsonl:1: holds no question; .* \(--decontaminate\)"
    ):
        read_evaluations([str(path)])
