"""A record of a data file: its fields under Whet's names, and the messages that they hold."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from whet.chat.conversation import (
    Conversation,
    Message,
    Origin,
    from_json,
    read_conversation,
    shown,
)
from whet.errors import UserError

Record = Mapping[str, Any]

IN_MESSAGES = ("role", "content", "from", "value")
"""Names for `--fields` that are those of messages, not of records."""
LISTS_OF_MESSAGES = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
SYSTEM_KEYS = ("system", "system_prompt")
TOOLS_KEYS = ("tools", "functions", "tool_defs", "available_tools")
CALLING = ("function_call", "tool_call")
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", *CALLING), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response", "tool"), "tool"),
}
IN_JSON = re.compile(r'\[\s*\{\s*"(role|content|from|value)"\s*:')
"""How messages begin that a table without nested types holds as a text."""
SPOKEN = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
"""What such messages have, and records that somebody has written as JSON have not."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
WEIGHTS = ("weight", "loss_weight", "sample_weight", "train", "trainable", "training")


def first_of(record: Record, names: Iterable[str]) -> str | None:
    """The first of the fields that the record has; null counts as absent."""
    for name in names:  # a loop, as a generator would take twice as long for every line
        if record.get(name) is not None:
            return name
    return None


def rest(record: Record, *used: str | None) -> dict[str, Any]:
    """The fields that are not `used`."""
    return {name: value for name, value in record.items() if name not in used}


def text_of(record: Record, name: str, at: Origin, *, empty: bool = True) -> str:
    """The text in `record[name]`; missing counts as empty, which only `empty` allows."""
    value = record.get(name)
    value = "" if value is None else value
    if not isinstance(value, str):
        raise at.error(f"{name} must be a text, got {shown(value)}")
    if not empty and not value.strip():
        raise at.error(f"{name} is empty")
    return value


def one_of(record: Record, names: Sequence[str], at: Origin) -> Any:
    """The value of the one field of `names` that is not empty, None if all are.

    Raises UserError if several are and they differ.
    """
    found = {name: record[name] for name in names if record.get(name) not in (None, "", [])}
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise at.error(f"{' and '.join(found)} differ; keep one of them")
    return values[0] if values else None


def conversation_of(
    messages: Any, record: Record, at: Origin, *used: str | None, asks: bool = False
) -> Conversation:
    """Messages with the record's tools, documents and system prompt; `asks`: they end with what a
    reply is asked to."""
    said = one_of(record, SYSTEM_KEYS, at)
    if said is not None:
        if not isinstance(said, str):
            raise at.error(f"system must be a text, got {shown(said)}")
        if isinstance(messages, list) and messages and isinstance(messages[0], Mapping):
            first = messages[0]
            if first.get("role") != "system":
                messages = [{"role": "system", "content": said}, *messages]
            elif first.get("content") != said:
                raise at.error("has a field system and a system turn; keep one of them")
    tools = one_of(record, TOOLS_KEYS, at)
    if tools is not None and record.get("functions"):
        functions = from_json(tools, "functions", at.where)
        if isinstance(functions, list):  # OpenAI's older name: the functions without their shell
            tools = [{"type": "function", "function": f} if _is_bare(f) else f for f in functions]
    return read_conversation(
        messages,
        tools=tools,
        documents=record.get("documents"),
        at=at,
        extra=rest(record, *used, *TOOLS_KEYS, *SYSTEM_KEYS, "documents"),
        asks=asks,
    )


def _is_bare(function: Any) -> bool:
    return isinstance(function, Mapping) and "name" in function and "function" not in function


def turn_of(turn: Any, where: str, at: Origin) -> Message:
    """A message in either spelling: role and content, or ShareGPT's from and value."""
    if not isinstance(turn, Mapping) or not turn.keys() & {"role", "from"}:
        expected = "expected an object with role and content, or with from and value"
        raise at.error(f"{where}: {expected}, got {shown(turn)}")
    if "role" in turn and "from" not in turn:
        return dict(turn)
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise at.error(f"{where}: `from` is {shown(speaker)}; speakers are {known}")
    if not isinstance(value, str):
        raise at.error(f"{where} ({speaker}): value must be a text, got {shown(value)}")
    message = {**rest(turn, "from", "value"), "role": SHAREGPT_ROLES[speaker], "content": value}
    if speaker in CALLING:
        message["content"] = ""
        message["tool_calls"] = calls_in_text(value, f"{where} ({speaker})", at)
    return message


def nested(value: Any, name: str, at: Origin) -> Any:
    """`value`, parsed if it is the JSON text of messages; another text is what somebody says."""
    if isinstance(value, str) and IN_JSON.match(value):
        names = set(re.findall(r'"(\w+)"\s*:', value))
        if any(keys <= names for keys in SPOKEN):
            return from_json(value, name, at.where)
    return value


def calls_in_text(value: str, where: str, at: Origin) -> list[Any]:
    """The tool calls of a text that is JSON: one or a list of them."""
    calls = from_json(value, f"{where}: the call", at.where)
    return calls if isinstance(calls, list) else [calls]


def read_fields(argument: str | None, known: Iterable[str]) -> dict[str, str]:
    """`--fields`: {Whet's name: the file's name, or "" for a field that is not to be used}."""
    found: dict[str, str] = {}
    for part in (argument or "").split(","):
        name, equals, of_file = (word.strip() for word in part.partition("="))
        if argument and (not name or not equals or name in found):
            raise UserError(
                f"--fields {argument}: expected NAME=NAME_IN_THE_FILE,… such as "
                "messages=conversation,role=speaker; NAME= leaves a field out"
            )
        if of_file and name not in known:
            raise UserError(f"--fields {part}: no field {name}; there are {', '.join(known)}")
        if argument:
            found[name] = of_file
    return found


def renamed(
    record: dict[str, Any], fields: Mapping[str, str], seen: Counter[str]
) -> dict[str, Any]:
    """The record under Whet's names; a field whose name another one takes goes.

    `seen` counts the file's names that the record has.
    """
    found = dict(record)
    for name, of_file in fields.items():
        if name in IN_MESSAGES:
            continue
        seen[of_file or name] += (of_file or name) in record
        if not of_file:
            found.pop(name, None)
        elif of_file in record:
            found.pop(of_file, None)
            found[name] = record[of_file]
    within = {name: fields[name] for name in IN_MESSAGES if fields.get(name)}
    for name in LISTS_OF_MESSAGES if within else ():
        if isinstance(found.get(name), list):
            found[name] = [
                renamed_message(message, within, seen) if isinstance(message, dict) else message
                for message in found[name]
            ]
    return found


def renamed_message(
    message: dict[str, Any], within: Mapping[str, str], seen: Counter[str]
) -> dict[str, Any]:
    """The message with its keys `within` under Whet's names."""
    seen.update(key for key in within.values() if key in message)
    found = {key: value for key, value in message.items() if key not in within.values()}
    return {**found, **{name: message[key] for name, key in within.items() if key in message}}


def check_meaning(record: Record, at: Origin) -> None:
    """Refuse fields that say something of the training which Whet does not do."""
    check_asked(record, at, UNUSED)
    for name in WEIGHTS:
        value = record.get(name)
        if value is not None and not (isinstance(value, int | float) and value == 1):
            raise at.error(
                f"{name} {shown(value)} of a whole record is not read; give each message a weight"
                + UNUSED % name
            )


def check_asked(record: Record, at: Origin, way_out: str = "%.0s") -> None:
    """Refuse fields that change what the model reads in a way that Whet does not know; `way_out`
    says, given a field's name, how it is left out."""
    for name in MEDIA:
        if record.get(name) not in (None, "", [], {}):
            raise at.error(f"has {name}, and Whet trains on text alone" + way_out % name)
    name = "chat_template_kwargs"
    if record.get(name) not in (None, "", {}, "{}"):
        raise at.error(
            f"has {name}, and template variables are the same for all records: give them to "
            "whet prepare as --template_kwargs" + way_out % name
        )


UNUSED = "; --fields %s= leaves this field out"
