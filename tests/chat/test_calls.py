"""Tool calls are read back from the words that a model is trained to write for them."""

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.chat import suite
from tests.chat.suite import said, user
from tests.chat.test_templates import templates
from whet.chat.certificate import Refused
from whet.chat.chat import Chat, find_template
from whet.chat.conversation import read_conversation
from whet.chat.encode import encode_chat

HARD = {"city": 'a "b" {c}\n</tool_call> [TOOL_CALLS] <|im_x|> é\U0001f44d', "n": [1, {"x": None}]}


def call(number: int, arguments: Any = None) -> dict[str, Any]:
    return suite.call(number, arguments or {"city": "Paris", "n": number})


def trained_words(chat: Chat, reply: dict[str, Any]) -> str:
    """The text that a model trained on this reply writes, without its stop token."""
    talk = read_conversation([user("Weather?"), reply], tools=suite.TOOLS)
    example = encode_chat(talk, chat).examples[0]
    ids = example.ids[example.loss_mask != 0].tolist()
    ids = ids[:-1] if ids[-1] in chat.stop_ids else ids
    return chat.tokenizer.decode(ids, skip_special=False)


REPLIES = {
    "one": said("", tool_calls=[call(1)]),
    "hard": said("", tool_calls=[call(1, HARD)]),
    "three": said("", tool_calls=[call(1), call(2), call(3)]),
    "words": said("I look it up.", tool_calls=[call(1)]),
}


def expected(reply: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    functions = [one["function"] for one in reply["tool_calls"]]
    return [(function["name"], function["arguments"]) for function in functions]


@pytest.mark.parametrize("template", ["plain", "chatml"])
@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_whets_own_templates(template, reply) -> None:
    chat = Chat(tiny.tokenizer(), find_template("plain"))
    if template == "chatml":
        from whet.chat.chat import add_chat_tokens

        chat, _ = add_chat_tokens(chat, "chatml")
    words = trained_words(chat, reply)
    assert chat.call_form.read(words, ["get_weather"]) == (reply["content"], expected(reply))


def test_what_is_no_call_stays_text() -> None:
    form = Chat(tiny.tokenizer()).call_form
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert form.read(good, ["f"]) == ("", [("f", {})])
    assert form.read(good, ["g"]) is None, "a tool that was not given"
    assert form.read(f"Look: <tool_call> {good}", ["f"]) == ("Look: <tool_call>", [("f", {})])
    for bad in (
        f"{good} and more",
        good[:-1],
        good.replace("{}", "3"),
        good.replace("{}", "{"),
        good.replace("{}", '{"x": NaN}'),
        "",
    ):
        assert form.read(bad, ["f"]) is None
    assert form.read(good.replace('": ', '":\n'), ["f"]), "other whitespace"


@pytest.mark.parametrize(("every", "least"), [(8, 4), pytest.param(1, 41, marks=pytest.mark.slow)])
def test_every_template_whose_calls_are_json(shared_data: Path, every: int, least: int) -> None:
    """All that the template writes of a call and Whet trains is read back, or nothing ever is."""
    forms = 0
    for path in templates(shared_data)[::every]:
        chat = suite.fitted(shared_data / "tokenizers/minimind", path)
        if chat.call_form is None:
            continue
        forms += 1
        for reply in REPLIES.values():
            try:
                words = trained_words(chat, reply)
            except Refused:
                continue
            found = chat.call_form.read(words, ["get_weather"])
            assert found, (path.stem, words)
            assert found[1] == expected(reply), path.stem
    assert forms >= least
