"""The made-up messages with which a template is tried out: words that stand nowhere else."""

from typing import Any

from whet.chat.conversation import Message

ASKED, SAID, THOUGHT, NEXT = "Qaskedq", "Qsaidq", "Qthoughtq", "Qnextq"
FUNCTION, VALUE = "qcallq", "Qvalueq"
CALL_ID = "call12345"  # nine letters and digits: some templates insist
PARAMETERS = {
    "type": "object",
    "properties": {"value": {"type": "string", "description": "a value"}},
    "required": ["value"],
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": FUNCTION, "description": "a tool", "parameters": PARAMETERS},
    }
]


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
