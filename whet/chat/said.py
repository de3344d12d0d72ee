"""Whether a template writes all that a message says.

That a text stands in the reply proves little: a call's name may stand in the content, a short
thought in the answer. So each thing that is said is given a mark of its own, and a rendering of the
marked message must show every mark. It may show them in any form and order.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from whet.chat.conversation import Message

SIGNS = re.compile(r"\w+|[^\s\x00-\x7f]")  # words and emoji; marks such as quotes may be rewritten


@dataclass
class Marked:
    """`message` with a mark in each thing that it says; `marks` tells of each mark what it marks.

    With `only`, a mark, nothing else is marked.
    """

    message: Message
    only: str = ""
    marks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shaped = dict(self.message)
        for key in ("content", "reasoning_content"):
            if written(shaped.get(key)).strip():
                shaped[key] = self._text(shaped[key], f"this message's {key}")
        if "reasoning_content" in shaped:
            shaped["thinking"] = shaped["reasoning_content"]
        if "tool_calls" in shaped:
            shaped["tool_calls"] = [self._call(call) for call in shaped["tool_calls"]]
        self.message = shaped

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name, arguments = function["name"], function["arguments"]
        what = f"the call of {name}"
        as_json = isinstance(arguments, str)
        called = self._text(name, what)
        arguments = {
            key: self._value(value, f"{key} in {what}")
            for key, value in (json.loads(arguments) if as_json else arguments).items()
        }
        changed = {
            **function,
            "name": called,
            "arguments": json.dumps(arguments, ensure_ascii=False) if as_json else arguments,
        }
        if isinstance(call.get("id"), str):  # some templates write `functions.name:0` for the name
            call = {**call, "id": call["id"].replace(name, called)}
        return {**call, "function": changed}

    def _value(self, value: Any, what: str) -> Any:
        """An argument with each value in it marked. Nothing is asked for what says nothing: null
        and what is empty."""
        if isinstance(value, dict):
            return {key: self._value(inner, what) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._value(inner, what) for inner in value]
        if value is None or (isinstance(value, str) and not value.strip()):
            return value
        if isinstance(value, str):
            return self._text(value, what)
        mark = self._mark(what)  # for a number or a truth value
        return int(mark) if mark else value

    def _text(self, value: Any, what: str) -> Any:
        """A text, or a list of parts, with a mark after its last word."""
        if isinstance(value, list):
            return [*value[:-1], {**value[-1], "text": self._text(value[-1]["text"], what)}]
        end = len(value.rstrip())
        return value[:end] + self._mark(what) + value[end:]

    def _mark(self, what: str) -> str:
        mark = f"91730{len(self.marks):05}37190"  # digits, which no filter rewrites
        self.marks[mark] = what
        return mark if self.only in ("", mark) else ""


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
