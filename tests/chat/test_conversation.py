"""What outside data may look like, and how refusals read."""

from typing import Any

import pytest

from whet.chat.conversation import Origin, read_conversation
from whet.errors import UserError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


def call(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", **more}}]}


def test_parts_reasoning_weights_and_nulls() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, "b"], "name": None},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "value": "c"}],
            "weight": 0.5,
        },
        {"role": "assistant", "content": None, "reasoning": "ha", "weight": 0, "refusal": None},
    ]
    read = read_conversation(messages, at=Origin("f", 3), extra={"id": 1})
    assert read.messages == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c", "reasoning_content": "hm"},
        {"role": "assistant", "reasoning_content": "ha"},
    ]
    assert read.weights == [None, 0.5, 0.0]
    assert read.at.where == "f:3"
    assert "weight" in messages[1], "the input is not changed"


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_tool_calls(arguments: Any) -> None:
    read = read_conversation([USER, call(arguments=arguments)], tools='[{"name": "f"}]')
    made = read.messages[1]["tool_calls"]
    assert made == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert read.tools == [{"name": "f"}]
    assert read_conversation([USER, call(arguments="")]).messages[1]["tool_calls"][0][
        "function"
    ] == {
        "name": "f",
        "arguments": {},
    }


BROKEN: list[tuple[Any, str]] = [
    (None, "non-empty list of messages, got null"),
    ([], "non-empty list"),
    ("text", "non-empty list"),
    ({"role": "user"}, "non-empty list"),
    ([1], "message 1: expected an object"),
    ([["user", "a"]], "message 1: expected an object"),
    ([{"content": "a"}], r'message 1: has no role, but \["content"\]; roles are system'),
    ([{"role": "boss", "content": "a"}], 'unknown role "boss"; roles are system'),
    ([{"role": ["user"], "content": "a"}], "unknown role"),
    ([USER], "no message has the role assistant"),
    ([{"role": "user"}, REPLY], r"message 1 \(user\): has no content"),
    ([{"role": "user", "content": 3}, REPLY], "content must be a text or a list"),
    ([{"role": "user", "content": {"a": 1}}, REPLY], "content must be a text or a list"),
    ([{"role": "user", "content": [{"type": "image_url"}]}, REPLY], 'part 1 is "image_url"'),
    ([{"role": "user", "content": [{"type": "text"}]}, REPLY], "part 1 holds no text"),
    ([{"role": "user", "content": [3]}, REPLY], "part 1 is 3"),
    ([USER, {"role": "assistant"}], "neither content nor tool_calls"),
    ([USER, {"role": "assistant", "content": None}], "neither content nor tool_calls"),
    ([USER, {"role": "assistant", "tool_calls": []}], "neither content nor tool_calls"),
    ([USER, {"role": "assistant", "tool_calls": {}}], "tool_calls must be a list"),
    ([USER, {"role": "assistant", "tool_calls": ["f"]}], "tool call 1: expected an object"),
    ([USER, {"role": "assistant", "tool_calls": [{}]}], "has no function name"),
    ([USER, call(name=3)], "has no function name"),
    ([USER, call(arguments="{")], "arguments are not JSON"),
    ([USER, call(arguments="[1]")], "arguments must be an object"),
    ([USER, call(arguments=7)], "arguments must be an object"),
    ([{**USER, "tool_calls": [{}]}, REPLY], "only an assistant message can hold tool_calls"),
    ([{**USER, "reasoning": "a"}, REPLY], "only an assistant message can hold reasoning"),
    ([USER, {**REPLY, "reasoning": 3}], "reasoning must be a text"),
    ([USER, {**REPLY, "reasoning": "a", "thinking": "b"}], "reasoning and thinking differ"),
    ([USER, {**REPLY, "weight": "1"}], "weight must be a number"),
    ([USER, {**REPLY, "weight": True}], "weight must be a number"),
    ([USER, {**REPLY, "weight": float("nan")}], "weight must be finite"),
    ([USER, {**REPLY, "weight": -0.5}], "weight must be finite, 0 or more, got -0.5"),
    ([{**USER, "weight": 1}, REPLY], "not the model's"),
    ([{**USER, "name": 3}, REPLY], "name must be a text"),
    ([{"role": "tool", "content": "a", "tool_call_id": 3}, REPLY], "tool_call_id must be a text"),
]


@pytest.mark.parametrize(("messages", "reason"), BROKEN)
def test_broken_messages(messages: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"^data.jsonl:12: .*{reason}") as caught:
        read_conversation(messages, at=Origin("data.jsonl", 12))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("{", "not JSON"),
        (3, "list of objects"),
        (["f"], "list of objects"),
        ("3", "list of objects"),
    ],
)
def test_broken_tools(tools: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_conversation([USER, REPLY], tools=tools)
