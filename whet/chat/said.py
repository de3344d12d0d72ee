"""Whether a template writes all that a message says.

That a text stands in the reply proves little: a call's name may stand in the content, a short
thought in the answer. So each thing that is said is given a mark of its own, and a rendering of the
marked message must show every mark. It may show them in any form and order.
"""

import json
import re
from typing import Any

from whet.chat.conversation import Message

SIGNS = re.compile(r"\w+|[^\s\x00-\x7f]")  # words and emoji; marks such as quotes may be rewritten


def marked(message: Message, only: str = "") -> tuple[Message, dict[str, str]]:
    """`message` with a mark in each thing that it says, and what each mark marks.

    With `only`, a mark, nothing else is marked.
    """
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        new = f"91730{len(marks):05}37190"  # digits, which no filter rewrites
        marks[new] = what
        return new if only in ("", new) else ""

    def with_marks(value: Any, what: str) -> Any:
        """What is said, with a mark after its last word; null and what is empty says nothing."""
        if isinstance(value, dict):
            return {key: with_marks(inner, what) for key, inner in value.items()}
        if isinstance(value, list):
            return [with_marks(inner, what) for inner in value]
        if value is None or (isinstance(value, str) and not value.strip()):
            return value
        if not isinstance(value, str):  # a number or a truth value
            new = mark(what)
            return int(new) if new else value
        end = len(value.rstrip())
        return value[:end] + mark(what) + value[end:]

    def called(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name, arguments = function["name"], function["arguments"]
        what = f"the call of {name}"
        new_name = with_marks(name, what)
        as_json = isinstance(arguments, str)
        given = json.loads(arguments) if as_json else arguments
        given = {key: with_marks(value, f"{key} in {what}") for key, value in given.items()}
        given = json.dumps(given, ensure_ascii=False) if as_json else given
        if isinstance(call.get("id"), str):  # some templates write `functions.name:0` for the name
            call = {**call, "id": call["id"].replace(name, new_name)}
        return {**call, "function": {**function, "name": new_name, "arguments": given}}

    shaped = dict(message)
    for key in ("content", "reasoning_content"):
        if text := written(shaped.get(key)):
            text = with_marks(text, f"this message's {key}")
            parts = isinstance(shaped[key], list)
            shaped[key] = [{"type": "text", "text": text}] if parts else text
    if "reasoning_content" in shaped:
        shaped["thinking"] = shaped["reasoning_content"]
    if "tool_calls" in shaped:
        shaped["tool_calls"] = [called(call) for call in shaped["tool_calls"]]
    return shaped, marks


def written(content: Any) -> str:
    """A content or reasoning as one text, also if it is a list of parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def stands_in(words: str, text: str) -> bool:
    """Whether `text` is written in `words`, perhaps with other whitespace and marks between."""
    if text.strip() in words:
        return True
    at = 0
    for sign in SIGNS.findall(text) or text.split():
        at = words.find(sign, at)
        if at < 0:
            return False
        at += len(sign)
    return True
