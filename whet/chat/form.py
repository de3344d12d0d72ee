"""The shape in which a template wants messages, and the made-up ones with which it is tried."""

import json
from dataclasses import dataclass
from typing import Any

from whet.chat.conversation import Message

MISSING = ("absent", "none", "empty")
"""How the missing content of a call may be written: the key absent, None or an empty text."""

# Words that stand nowhere else, for the made-up messages with which a template is tried out.
ASKED, SAID, THOUGHT, NEXT = "Qaskedq", "Qsaidq", "Qthoughtq", "Qnextq"
FUNCTION, VALUE = "qcallq", "Qvalueq"
CALL_ID = "call12345"  # nine letters and digits: some templates insist
PROPERTIES = {"value": {"type": "string", "description": "a value"}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["value"]}
FUNCTION_SCHEMA = {"name": FUNCTION, "description": "a tool", "parameters": PARAMETERS}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": FUNCTION_SCHEMA}]


@dataclass(frozen=True)
class Form:
    """The shape in which a template wants messages."""

    parts: bool = False  # content as [{"type": "text", "text": ...}]
    json_arguments: bool = False  # tool-call arguments as a JSON text
    missing: str = "absent"  # one of MISSING

    def shape(self, messages: list[Message]) -> list[Message]:
        """`messages` in this form; reasoning has a second name, `thinking`, as in transformers."""
        return [self._shape(message) for message in messages]

    def _shape(self, message: Message) -> Message:
        plain = "reasoning_content" not in message and "tool_calls" not in message
        if plain and not self.parts and "content" in message:
            return message
        shaped = dict(message)
        if "reasoning_content" in shaped:
            shaped["thinking"] = shaped["reasoning_content"]
        if "content" not in shaped and self.missing != "absent":
            shaped["content"] = None if self.missing == "none" else ""
        if self.parts and isinstance(shaped.get("content"), str):
            shaped["content"] = [{"type": "text", "text": shaped["content"]}]
        if self.json_arguments and "tool_calls" in shaped:
            shaped["tool_calls"] = [_with_json_arguments(call) for call in shaped["tool_calls"]]
        return shaped


def say(content: str, thought: str = "") -> Message:
    """A reply, with thinking before it if there is any."""
    reasoning = {"reasoning_content": thought} if thought else {}
    return {"role": "assistant", "content": content, **reasoning}


def call(content: str = "", thought: str = "", calls: int = 1) -> Message:
    """A reply that calls the made-up tool, perhaps several times."""
    one = {
        "type": "function",
        "id": CALL_ID,
        "function": {"name": FUNCTION, "arguments": {"value": VALUE}},
    }
    message = {**say(content, thought), "tool_calls": [one] * calls}
    if not content:
        del message["content"]
    return message


def _with_json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
