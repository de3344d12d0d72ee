"""Records of the shapes that data sets come in -> `Conversation`, `RawText` or `Tokenised`.

A format is recognised by a record's fields (`SIGNATURES`) or said by the user (`--format`). What
fits none is refused with the fields it has: nothing is guessed.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from whet.chat.conversation import Conversation, Origin, RawText, Tokenised, from_json, shown
from whet.data.preferences import LABEL_KEYS, Preference, read_labelled, read_pair
from whet.data.record import (
    LISTS_OF_MESSAGES,
    SYSTEM_KEYS,
    TOOLS_KEYS,
    Record,
    calls_in_text,
    check_meaning,
    conversation_of,
    first_of,
    nested,
    rest,
    text_of,
    turn_of,
)
from whet.data.tokenised import IDS_KEYS, MASK_KEYS, read_tokenised
from whet.errors import UserError

Datum = Conversation | RawText | Tokenised | Preference

SIGNATURES: dict[str, tuple[tuple[str, ...], ...]] = {
    # format: its fields; one of each group must be there. The first format that fits is taken.
    "preferences": (("chosen",), ("rejected",)),
    "labels": (LABEL_KEYS,),  # if `_is_labelled`
    "messages": (("messages",),),
    "sharegpt": (("conversations", "conversation"),),
    "tokenised": (IDS_KEYS, MASK_KEYS),
    "alpaca": (("instruction",), ("output",)),
    "dolly": (("instruction",), ("response",)),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "gsm8k": (("question",), ("answer",)),
    "text": (("text",),),
}
FORMATS = tuple(SIGNATURES)
FIELDS = tuple(
    dict.fromkeys([
        *(field for groups in SIGNATURES.values() for group in groups for field in group),
        *LISTS_OF_MESSAGES, *TOOLS_KEYS, *SYSTEM_KEYS, "documents", "input", "context", "history",
        "margin", "attention_mask", "position_ids", "role", "content", "from", "value",
    ])
)  # fmt: skip
"""The names that `--fields` can give to a file's own."""

ASKED = ("prompt", "question", "query", "instruction", "input", "problem")
REPLIED = ("completion", "response", "output", "answer", "solution", "reply", "target")
"""What questions and answers are called elsewhere."""
HINTS = (
    # what a record of another kind has: what to do with it
    ({"chosen"}, "a pair needs `rejected`, too; for SFT rename it: --fields completion=chosen"),
    ({"rejected"}, "a pair needs `chosen`, too: --fields chosen=NAME"),
    ({"rejected_response"}, "a pair is read from the fields `chosen` and `rejected`: see --fields"),
    ({"instances"}, "write each of `instances` as a line with instruction, input and output"),
    ({"input_ids"}, "ids alone do not say what is trained; add `loss_mask` or `labels`"),
    ({"ids"}, "ids alone do not say what is trained; add `mask`"),
    ({"instruction"}, "the answer is missing: `output` (Alpaca) or `response` (Dolly)"),
    ({"prompt"}, "the answer is missing: `completion`"),
    ({"role", "content"}, "this is one message; a line holds a whole conversation in `messages`"),
)


def to_example(record: Any, format: str | None = None, source: str = "", line: int = 0) -> Datum:
    """What `record`, a parsed JSON object, holds; `format` is one of FORMATS or None to detect it.

    Raises UserError with `source:line: …` if the record is not of that format.
    """
    at = Origin(source, line)
    if not isinstance(record, Mapping):
        raise at.error(f"expected a JSON object with a conversation's fields, got {shown(record)}")
    if format is None:
        format = detect_format(record, source, line)
    elif format not in READERS:
        raise UserError(f"--format {format}: not a format; formats are {', '.join(FORMATS)}")
    else:
        _require(record, format, at)
    check_meaning(record, at)
    return READERS[format](record, at)


def detect_format(record: Record, source: str = "", line: int = 0) -> str:
    """The name of the format whose fields `record` has; UserError if it fits none."""
    for name, groups in SIGNATURES.items():
        if name == "labels":
            fits = _is_labelled(record)
        else:
            fits = all(first_of(record, group) for group in groups)
        if fits:
            return name
    at = Origin(source, line)
    if not record:
        raise at.error("the record is empty ({}); expected a conversation's fields")
    there = {name: value for name, value in record.items() if value is not None}
    hint = next((text for fields, text in HINTS if fields <= there.keys()), "")
    hint = hint or _fields_hint(there)
    raise at.error(f"fields {shown(list(there), 100)} fit no known format; {hint}")


def _fields_hint(record: Record) -> str:
    """What to do with fields that fit no format."""
    asked, replied = (
        next((name for name in record if str(name).lower() in names), None)
        for names in (ASKED, REPLIED)
    )
    if asked and replied:
        return f"for a question and its answer: --fields prompt={asked},completion={replied}"
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            is_message = value[0].keys() & {"role", "from", "content", "value", "speaker", "text"}
            if is_message:
                return f"if {name} are the messages: --fields messages={name}"
            return f"if {name} are the records, the file must hold that list alone: jq .{name}"
    return "name the format with --format or the fields with --fields; see docs/data.md"


def _is_labelled(record: Record) -> bool:
    """Whether it is what KTO learns from, not a record with some label: one with `kto_tag` or with
    true or false, or with any label beside a prompt and a completion, be it null."""
    if record.get("kto_tag") is not None or isinstance(record.get("label"), bool):
        return True
    pair = SIGNATURES["prompt_completion"]
    return "label" in record and all(first_of(record, group) for group in pair)


def _require(record: Record, name: str, at: Origin) -> None:
    missing = [group for group in SIGNATURES[name] if not first_of(record, group)]
    if missing:
        wanted = " or ".join(missing[0])
        raise at.error(f"format {name} needs the field {wanted}; got {shown(list(record), 100)}")


def _messages(record: Record, at: Origin) -> Conversation:
    messages = from_json(record["messages"], "messages", at.where)
    if isinstance(messages, list):
        messages = [_lift_calls(message, n, at) for n, message in enumerate(messages, 1)]
        for number, message in enumerate(messages, 1):
            if isinstance(message, Mapping) and message.get("role") is None:
                raise at.error(
                    f"message {number}: has no role, but {shown(list(message))}; --fields "
                    "role=NAME,content=NAME takes other names"
                )
    return conversation_of(messages, record, at, "messages")


def _lift_calls(message: Any, number: int, at: Origin) -> Any:
    """Content parts of type tool_call, which some data sets have, moved to `tool_calls`."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    is_call = [isinstance(part, Mapping) and part.get("type") == "tool_call" for part in content]
    if not any(is_call):
        return message
    own = f"message {number}: tool_calls"
    calls = from_json(message.get("tool_calls") or [], own, at.where)
    if not isinstance(calls, list):
        raise at.error(f"{own} must be a list, got {shown(calls)}")
    calls = [*calls]
    for part, lifted in zip(content, is_call, strict=True):
        value = part.get("value", part.get("tool_call")) if lifted else None
        if isinstance(value, str):
            calls += calls_in_text(value, f"message {number}: part tool_call", at)
        elif lifted:
            calls.append(value)
    parts = [part for part, lifted in zip(content, is_call, strict=True) if not lifted]
    return {**message, "content": parts or None, "tool_calls": calls}


def _sharegpt(record: Record, at: Origin) -> Conversation:
    key = first_of(record, SIGNATURES["sharegpt"][0]) or ""
    turns = from_json(record[key], key, at.where)
    if not isinstance(turns, list) or not turns:
        raise at.error(f"{key} must be a non-empty list of turns, got {shown(turns)}")
    messages = [turn_of(turn, f"turn {n}", at) for n, turn in enumerate(turns, 1)]
    return conversation_of(messages, record, at, key)


def _instruction(record: Record, at: Origin, context_key: str, answer_key: str) -> Conversation:
    """Instruction, an empty line, and the context, if there is one, are the question."""
    question = text_of(record, "instruction", at, empty=False)
    context = text_of(record, context_key, at)
    if context.strip():
        question = f"{question}\n\n{context}"
    messages = _history(record, at)
    messages += _exchange(question, text_of(record, answer_key, at, empty=False))
    return conversation_of(messages, record, at, "instruction", context_key, answer_key, "history")


def _history(record: Record, at: Origin) -> list[dict[str, Any]]:
    """Alpaca's `history`: earlier exchanges as [question, answer] pairs."""
    history = record.get("history")
    if history is None:
        return []
    pairs = history if isinstance(history, list) else [history]
    messages = []
    for number, pair in enumerate(pairs, 1):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise at.error(f"history {number} must be [question, answer], got {shown(pair)}")
        messages += _exchange(*pair)
    return messages


def _exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompt_completion(record: Record, at: Origin) -> Conversation:
    """Texts or lists of messages. Only the completion is trained, as the fields' names say."""
    key = first_of(record, ("completion", "response")) or ""
    prompt = _history(record, at) + _side(record["prompt"], "prompt", "user", at)
    completion = _side(record[key], key, "assistant", at)
    for message in prompt:
        if message.get("role") == "assistant" and message.get("weight") is None:
            message["weight"] = 0  # null, too: tables with one schema for all rows write it
    if completion[0].get("role") != "assistant":
        raise at.error(f"{key} must begin with a message of the assistant")
    return conversation_of(prompt + completion, record, at, "prompt", key, "history")


def _side(value: Any, key: str, role: str, at: Origin) -> list[dict[str, Any]]:
    value = nested(value, key, at)
    if isinstance(value, str):
        if not value.strip():
            raise at.error(f"{key} is empty")
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) for m in value):
        raise at.error(f"{key} must be a text or a list of messages, got {shown(value)}")
    return [dict(message) for message in value]


CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def _gsm8k(record: Record, at: Origin) -> Conversation:
    """The worked answer becomes thinking, the number after `####` the answer."""
    question = text_of(record, "question", at, empty=False)
    reasoning, mark, number = text_of(record, "answer", at).rpartition("####")
    number = number.strip().replace(",", "")
    if not mark or not number:
        raise at.error(
            "answer does not end in `#### N` as GSM8K's do; for other questions and answers: "
            "--fields prompt=question,completion=answer"
        )
    reasoning = CALCULATOR_MARK.sub("", reasoning).strip()
    answer = f"<think>{reasoning}</think><answer>{number}</answer>"
    return conversation_of(_exchange(question, answer), record, at, "question", "answer")


def _labelled(record: Record, at: Origin) -> Preference:
    def read(other: Record, at: Origin) -> Datum:
        return READERS[detect_format(other, at.source, at.line)](other, at)

    return read_labelled(record, at, read)


READERS: dict[str, Callable[[Record, Origin], Datum]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "tokenised": read_tokenised,
    "preferences": read_pair,
    "labels": _labelled,
    "alpaca": partial(_instruction, context_key="input", answer_key="output"),
    "dolly": partial(_instruction, context_key="context", answer_key="response"),
    "prompt_completion": _prompt_completion,
    "gsm8k": _gsm8k,
    "text": lambda record, at: RawText(
        text_of(record, "text", at, empty=False), at, rest(record, "text")
    ),
}
