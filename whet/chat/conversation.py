"""What one datum is: a conversation, a raw text, or ids that somebody else has tokenised.

`read_conversation` turns outside data into a `Conversation` and refuses what it cannot read, with
file, line and turn. Below it everything may trust that a conversation is well formed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from whet.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # three names of one thing
WEIGHT_KEYS = ("weight", "loss_weight")
TRAIN_KEYS = ("train", "trainable", "training", "train_on_turn", "loss", "loss_mask")
"""Other tools' names for a message's weight: true or false, or a number."""
UNREADABLE = {
    **dict.fromkeys(
        ("train_detail", "training_detail", "mask", "masked", "loss_scale"),
        "give the message a weight of 0 or 1",
    ),
    **dict.fromkeys(
        ("images", "image", "image_url", "videos", "video", "audios", "audio", "refusal"),
        "Whet trains on text alone",
    ),
}
"""Keys of a message that say something which would be lost, and what to do."""
EMPTY_IS_ABSENT = frozenset((*REASONING_KEYS, *UNREADABLE, "tool_calls", "function_call"))
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
"""Keys of a message that are read."""
LARGEST_WEIGHT = 1e30  # float32 holds it; JSON can hold any number
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking")

Message = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """Where a datum was read: `line` counts from 1, and is 0 if there is none."""

    source: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        """`file:line`, or what of it is known, to begin an error message with."""
        if not self.source:
            return f"line {self.line}" if self.line else "conversation"
        return f"{self.source}:{self.line}" if self.line else self.source

    def error(self, message: str) -> UserError:
        """`message` with the place before it."""
        return UserError(f"{self.where}: {message}")


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template sees them: role, content, reasoning_content, tool_calls, ...

    `weights[i]` is the loss weight of message i, None where the data say nothing: then it is 1 for
    the assistant and 0 for everybody else. `extra` holds the record's other fields; templates do
    not see them.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    weights: list[float | None] = field(default_factory=list)
    at: Origin = Origin()
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights:
            object.__setattr__(self, "weights", [None] * len(self.messages))


@dataclass(frozen=True)
class RawText:
    """Plain text, trained from its first to its last token."""

    text: str
    at: Origin = Origin()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokenised:
    """Token ids and their loss weights (same length), made by somebody else, taken as they are."""

    ids: list[int]
    mask: list[float]
    at: Origin = Origin()
    extra: dict[str, Any] = field(default_factory=dict)


def read_conversation(
    messages: Any,
    *,
    tools: Any = None,
    documents: Any = None,
    at: Origin = Origin(),
    extra: dict[str, Any] | None = None,
    asks: bool = False,
) -> Conversation:
    """A checked `Conversation` out of outside data in OpenAI's shape.

    Text parts are joined (without a separator, as templates that read parts do), reasoning gets its
    one name, JSON strings of tool-call arguments become objects, `weight` moves to `weights`, and
    a key whose value is null is left out (so does transformers). The input is not changed.
    Messages that ask for a reply (`asks`) need none of the assistant's. Raises UserError with
    `file:line: message N: ...`.
    """
    where = at.where
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: expected a non-empty list of messages, got {shown(messages)}; "
            'each message looks like {"role": "user", "content": "…"}'
        )
    pairs = [_read_message(m, f"{where}: message {n}") for n, m in enumerate(messages, 1)]
    read, weights = map(list, zip(*pairs, strict=True))
    if not asks and all(message["role"] != "assistant" for message in read):
        raise UserError(
            f"{where}: no message has the role assistant, so there is nothing to learn from; "
            "add the reply or remove the line"
        )
    return Conversation(
        messages=read,
        tools=_read_list_of_objects(tools, "tools", where),
        documents=_read_list_of_objects(documents, "documents", where),
        weights=weights,
        at=at,
        extra=extra or {},
    )


def _read_message(message: Any, at: str) -> tuple[Message, float | None]:
    if not isinstance(message, Mapping):
        raise UserError(f"{at}: expected an object with role and content, got {shown(message)}")
    role = message.get("role")
    if len(message) == 2 and type(message.get("content")) is str and role in ROLES:
        return dict(message), None  # most messages: nothing is left to judge
    if role == "function":  # OpenAI's older name
        role = "tool"
    if role not in ROLES:
        keys = shown(list(message))
        what = f"has no role, but {keys}" if role is None else f"has the unknown role {shown(role)}"
        raise UserError(f"{at}: {what}; roles are {', '.join(ROLES)}")
    read = {
        key: value
        for key, value in message.items()
        if value is not None and not (key in EMPTY_IS_ABSENT and value in ("", []))
    }
    read["role"] = role
    weight = _read_weight(read, role, at)
    for key in UNREADABLE:
        if key in read:
            raise UserError(f"{at} ({role}): {key} is not read; {UNREADABLE[key]}")
    if "function_call" in read:  # OpenAI's older name of a single call
        if "tool_calls" in read:
            raise UserError(f"{at} ({role}): has function_call and tool_calls; keep one of them")
        read["tool_calls"] = [from_json(read.pop("function_call"), "function_call", at)]
    _read_content(read, message.get("content"), at)
    _read_reasoning(read, at)
    if role == "assistant":
        if "tool_calls" in read:
            calls = from_json(read["tool_calls"], "tool_calls", at)
            if not isinstance(calls, list):
                raise UserError(f"{at}: tool_calls must be a list, got {shown(calls)}")
            read["tool_calls"] = [
                _read_tool_call(call, f"{at}: tool call {n}") for n, call in enumerate(calls, 1)
            ]
        if not read.get("tool_calls"):
            read.pop("tool_calls", None)
            if "content" not in read and "reasoning_content" not in read:
                raise UserError(f"{at} (assistant): has neither content nor tool_calls")
    elif "tool_calls" in read:
        raise UserError(f"{at} ({role}): only an assistant message can hold tool_calls")
    elif "content" not in read:
        raise UserError(f'{at} ({role}): has no content; an empty text is written as ""')
    for key in ("name", "tool_call_id"):
        if key in read and not isinstance(read[key], str):
            raise UserError(f"{at} ({role}): {key} must be a text, got {shown(read[key])}")
    return read, weight


def _read_weight(read: Message, role: str, at: str) -> float | None:
    """The weight that one of the keys in use for it gives, taken out of `read`."""
    found = {key: read.pop(key) for key in (*WEIGHT_KEYS, *TRAIN_KEYS) if key in read}
    for key, value in found.items():
        if isinstance(value, bool) and key in TRAIN_KEYS:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            kind = "true, false or a number" if key in TRAIN_KEYS else "a number"
            raise UserError(f"{at} ({role}): {key} must be {kind}, got {shown(value)}")
        if not 0 <= value <= LARGEST_WEIGHT:
            raise UserError(f"{at} ({role}): {key} must be finite, 0 or more, got {shown(value)}")
    if len(set(map(float, found.values()))) > 1:
        raise UserError(f"{at} ({role}): {' and '.join(found)} differ; keep one of them")
    if not found:
        return None
    weight = float(next(iter(found.values())))
    if role != "assistant" and weight != 0:
        raise UserError(
            f"{at} ({role}): weight {weight:g} would train words that are not the model's; "
            "only assistant messages can have a weight other than 0"
        )
    return weight


def _read_content(read: Message, content: Any, at: str) -> None:
    """Put the content's text into `read`, and its reasoning parts beside it."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise UserError(f"{at}: content must be a text or a list of parts, got {shown(content)}")
    texts: list[str] = []
    reasoning: list[str] = []
    for number, part in enumerate(content, 1):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in TEXT_PARTS:
            texts.append(_part_text(part, "text", at, number))
        elif kind in REASONING_PARTS:
            reasoning.append(_part_text(part, kind, at, number))
        else:
            raise UserError(
                f"{at}: content part {number} is {shown(kind or part)}; Whet trains on text alone "
                "and reads the parts text, reasoning and thinking"
            )
    read["content"] = "".join(texts)
    if reasoning:
        read["reasoning_content"] = "".join(reasoning)


def _part_text(part: Mapping[str, Any], key: str, at: str, number: int) -> str:
    for name in (key, "text", "value"):
        if isinstance(part.get(name), str):
            return str(part[name])
    raise UserError(f"{at}: content part {number} holds no text under {key!r}: {shown(part)}")


def _read_reasoning(read: Message, at: str) -> None:
    found = {key: read.pop(key) for key in REASONING_KEYS if key in read}
    for key, value in found.items():
        if not isinstance(value, str):
            raise UserError(f"{at}: {key} must be a text, got {shown(value)}")
    if len(set(found.values())) > 1:
        raise UserError(f"{at}: {' and '.join(found)} differ; keep one of them")
    if not found:
        return
    if read["role"] != "assistant":
        raise UserError(f"{at} ({read['role']}): only an assistant message can hold reasoning")
    read["reasoning_content"] = next(iter(found.values()))


def _read_tool_call(call: Any, at: str) -> dict[str, Any]:
    """OpenAI's shape, `{"type": "function", "function": {"name", "arguments"}}`; the inner one
    alone is read, too. Arguments become an object: most templates print them with `tojson`."""
    if not isinstance(call, Mapping):
        raise UserError(f"{at}: expected an object, got {shown(call)}")
    function = call.get("function") if "function" in call else call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{at}: has no function name: {shown(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            flaw = json_flaw(error) if isinstance(error, ValueError) else error
            raise UserError(f"{at}: arguments are not JSON ({flaw}): {shown(arguments)}") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"{at}: arguments must be an object, got {shown(arguments)}")
    rest = {
        key: value for key, value in call.items() if key in ("id", "index") and value is not None
    }
    inner = {"name": function["name"], "arguments": dict(arguments)}
    return {"type": "function", **rest, "function": inner}


def from_json(value: Any, name: str, where: str) -> Any:
    """`value`, parsed if it is a text: tables without nested types hold objects as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        flaw = json_flaw(error) if isinstance(error, ValueError) else error
        reason = f"{name} is a text that is not JSON ({flaw}): {shown(value)}"
        raise UserError(f"{where}: {reason}") from None


JSON_FLAWS = (
    # how the text goes on where it is no JSON, after a + where a value has ended: what is wrong
    (r",\s*[}\]]", "a comma after the last value"),
    (r"\+,", "a comma after the object; lines of JSON have none between them"),
    (r",", "a comma too many"),
    (r"\+[{\[]", "a second value on the line; each record has a line of its own"),
    (r"\+[}\]]", "a bracket too many"),
    (r"'", "single quotes, as a Python dict is printed; json.dumps writes JSON"),
    (r"(True|False|None)\b", "Python's True, False or None; JSON has true, false and null"),
    (r"\+?(//|/\*|#)", "a comment; JSON has none"),
    (r"[\n\r\t]", "a line break or tab within a text; write \\n or \\t"),
    (r"$", "the text ends here, and the value does not; is the file whole?"),
)


def json_flaw(error: ValueError) -> str:
    """What is wrong with a text that is not JSON, in words, and where: Python's own words for it
    are of its parser ("Extra data")."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos :]
    if error.msg.startswith("Unterminated string"):
        rest = ""
    elif error.msg == "Extra data":
        rest = f"+{rest}"
    elif before.endswith(",") and rest[:1] in ("}", "]", ","):
        rest = f",{rest}"
    place = f"character {error.colno:,}"
    for pattern, what in JSON_FLAWS:
        if re.match(pattern, rest):
            return f"{place}: {what}"
    return f"{place}: {error.msg}, got {shown(rest.removeprefix('+'), 30)}"


def _read_list_of_objects(value: Any, name: str, where: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        value = from_json(value, name, where) if value.strip() else None
    if value in (None, [], {}):
        return None
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise UserError(f"{where}: {name} must be a list of objects, got {shown(value)}")
    return [dict(item) for item in value]


def half_character(text: str) -> str:
    """What is wrong with a text that has no UTF-8: JSON can spell a lone half of a pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"a text holds {text[error.start]!a}, one half of a surrogate pair, which is no "
            "character; remove it or write the whole pair"
        )
    return ""


def shown(value: Any, limit: int = 60) -> str:
    """`value` as a short JSON text for an error message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
