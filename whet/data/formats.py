"""Records of the shapes that data sets come in -> `Conversation`, `RawText` or `Tokenised`.

A format is recognised by a record's fields (`SIGNATURES`) or said by the user (`--format`). What
fits none is refused with the fields it has: nothing is guessed.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from whet.chat.conversation import (
    LARGEST_WEIGHT,
    Conversation,
    RawText,
    Tokenised,
    place,
    read_conversation,
    shown,
)
from whet.errors import UserError

Record = Mapping[str, Any]
Datum = Conversation | RawText | Tokenised

IDS_KEYS = ("ids", "input_ids", "tokens")
MASK_KEYS = ("mask", "loss_mask", "assistant_masks", "completion_mask", "labels")
IGNORED_LABEL = -100

SIGNATURES: dict[str, tuple[tuple[str, ...], ...]] = {
    # format: its fields; one of each group must be there. The first format that fits is taken.
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

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool": "tool",
}

HINTS = (
    # what a record of another kind has: what to do with it
    (
        {"chosen", "rejected"},
        "this is preference data; SFT needs one answer, such as `chosen`",
    ),
    ({"instances"}, "write each of `instances` as a line with instruction, input and output"),
    ({"input_ids"}, "ids alone do not say what is trained; add `loss_mask` or `labels`"),
    ({"ids"}, "ids alone do not say what is trained; add `mask`"),
    ({"instruction"}, "the answer is missing: `output` (Alpaca) or `response` (Dolly)"),
    ({"prompt"}, "the answer is missing: `completion`"),
    ({"role", "content"}, "this is one message; a line holds a whole conversation in `messages`"),
)


@dataclass(frozen=True)
class Origin:
    """Where a record was read: begins every error message."""

    source: str
    line: int

    def error(self, message: str) -> UserError:
        return UserError(f"{place(self.source, self.line)}: {message}")


def to_example(record: Any, format: str | None = None, source: str = "", line: int = 0) -> Datum:
    """What `record`, a parsed JSON object, holds; `format` is one of FORMATS or None to detect it.

    Raises UserError with `source:line: …` if the record is not of that format.
    """
    at = Origin(source, line)
    if not isinstance(record, Mapping):
        raise at.error(f"expected a JSON object with a conversation's fields, got {shown(record)}")
    if format is None:
        return READERS[detect_format(record, source, line)](record, at)
    if format not in READERS:
        raise UserError(f"--format {format}: not a format; formats are {', '.join(FORMATS)}")
    _require(record, format, at)
    return READERS[format](record, at)


def detect_format(record: Record, source: str = "", line: int = 0) -> str:
    """The name of the format whose fields `record` has; UserError if it fits none."""
    for name, groups in SIGNATURES.items():
        for group in groups:
            if not _first(record, group):
                break
        else:
            return name
    at = Origin(source, line)
    if not record:
        raise at.error("the record is empty ({}); expected a conversation's fields")
    hint = next((text for fields, text in HINTS if fields <= record.keys()), "")
    hint = hint or "name the format with --format or rename the fields; see docs/data.md"
    raise at.error(f"fields {shown(list(record), 100)} fit no known format; {hint}")


def _first(record: Record, keys: tuple[str, ...]) -> str | None:
    for key in keys:  # a loop, as a generator would take twice as long for every line
        if record.get(key) is not None:
            return key
    return None


def _require(record: Record, name: str, at: Origin) -> None:
    missing = [group for group in SIGNATURES[name] if not _first(record, group)]
    if missing:
        wanted = " or ".join(missing[0])
        raise at.error(f"format {name} needs the field {wanted}; got {shown(list(record), 100)}")


def _rest(record: Record, *used: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in used}


def _text(record: Record, key: str, at: Origin, *, empty: bool = True) -> str:
    """The text in `record[key]`; missing counts as empty. Where `empty` is False, it may not be."""
    value = record.get(key)
    value = "" if value is None else value
    if not isinstance(value, str):
        raise at.error(f"{key} must be a text, got {shown(value)}")
    if not empty and not value.strip():
        raise at.error(f"{key} is empty")
    return value


def _messages(record: Record, at: Origin) -> Conversation:
    messages = record["messages"]
    if isinstance(messages, list):
        messages = [_lift_calls(message, n, at) for n, message in enumerate(messages, 1)]
    return read_conversation(
        messages,
        tools=record.get("tools"),
        documents=record.get("documents"),
        source=at.source,
        line=at.line,
        extra=_rest(record, "messages", "tools", "documents"),
    )


def _lift_calls(message: Any, number: int, at: Origin) -> Any:
    """Content parts of type tool_call, which some data sets have, moved to `tool_calls`."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    is_call = [isinstance(part, Mapping) and part.get("type") == "tool_call" for part in content]
    if not any(is_call):
        return message
    calls = list(message.get("tool_calls") or [])
    for part, lifted in zip(content, is_call, strict=True):
        value = part.get("value", part.get("tool_call")) if lifted else None
        if isinstance(value, str):
            calls += _calls_in_text(value, f"message {number}: part tool_call", at)
        elif lifted:
            calls.append(value)
    parts = [part for part, lifted in zip(content, is_call, strict=True) if not lifted]
    return {**message, "content": parts or None, "tool_calls": calls}


def _sharegpt(record: Record, at: Origin) -> Conversation:
    key = _first(record, SIGNATURES["sharegpt"][0]) or ""
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise at.error(f"{key} must be a non-empty list of turns, got {shown(turns)}")
    messages = [_sharegpt_turn(turn, f"turn {n}", at) for n, turn in enumerate(turns, 1)]
    system = _text(record, "system", at)
    if system:
        if messages[0].get("role") == "system":
            raise at.error("has a field system and a system turn; keep one of them")
        messages.insert(0, {"role": "system", "content": system})
    return read_conversation(
        messages,
        tools=record.get("tools") or None,
        documents=record.get("documents"),
        source=at.source,
        line=at.line,
        extra=_rest(record, key, "system", "tools", "documents"),
    )


def _sharegpt_turn(turn: Any, where: str, at: Origin) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise at.error(f"{where}: expected an object with from and value, got {shown(turn)}")
    if "role" in turn and "content" in turn and "from" not in turn:
        return dict(turn)
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise at.error(f"{where}: `from` is {shown(speaker)}; speakers are {known}")
    if not isinstance(value, str):
        raise at.error(f"{where} ({speaker}): value must be a text, got {shown(value)}")
    message: dict[str, Any] = {"role": SHAREGPT_ROLES[speaker], "content": value}
    if "weight" in turn:
        message["weight"] = turn["weight"]
    if speaker in ("function_call", "tool_call"):
        message["content"] = ""
        message["tool_calls"] = _calls_in_text(value, f"{where} ({speaker})", at)
    return message


def _calls_in_text(value: str, where: str, at: Origin) -> list[Any]:
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise at.error(f"{where}: the call is not JSON ({error}): {shown(value)}") from None
    return calls if isinstance(calls, list) else [calls]


def _alpaca(record: Record, at: Origin) -> Conversation:
    return _instruction(record, "input", "output", at)


def _dolly(record: Record, at: Origin) -> Conversation:
    return _instruction(record, "context", "response", at)


def _instruction(record: Record, context_key: str, answer_key: str, at: Origin) -> Conversation:
    """Instruction, an empty line, and the context, if there is one, are the question."""
    question = _text(record, "instruction", at, empty=False)
    context = _text(record, context_key, at)
    if context.strip():
        question = f"{question}\n\n{context}"
    messages = _history(record, at)
    system = _text(record, "system", at)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    messages += _exchange(question, _text(record, answer_key, at, empty=False))
    extra = _rest(record, "instruction", context_key, answer_key, "system", "history")
    return read_conversation(messages, source=at.source, line=at.line, extra=extra)


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
    key = _first(record, ("completion", "response")) or ""
    prompt = _side(record["prompt"], "prompt", "user", at)
    completion = _side(record[key], key, "assistant", at)
    for message in prompt:
        if message.get("role") == "assistant" and message.get("weight") is None:
            message["weight"] = 0  # null, too: tables with one schema for all rows write it
    if completion[0].get("role") != "assistant":
        raise at.error(f"{key} must begin with a message of the assistant")
    return read_conversation(
        prompt + completion,
        tools=record.get("tools"),
        documents=record.get("documents"),
        source=at.source,
        line=at.line,
        extra=_rest(record, "prompt", key, "tools", "documents"),
    )


def _side(value: Any, key: str, role: str, at: Origin) -> list[dict[str, Any]]:
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
    question = _text(record, "question", at, empty=False)
    reasoning, mark, number = _text(record, "answer", at).rpartition("####")
    number = number.strip().replace(",", "")
    if not mark or not number:
        raise at.error(
            "answer does not end in `#### N` as GSM8K's do; for other questions and answers name "
            "the fields prompt and completion"
        )
    reasoning = CALCULATOR_MARK.sub("", reasoning).strip()
    answer = f"<think>{reasoning}</think><answer>{number}</answer>"
    extra = _rest(record, "question", "answer")
    messages = _exchange(question, answer)
    return read_conversation(messages, source=at.source, line=at.line, extra=extra)


def _raw_text(record: Record, at: Origin) -> RawText:
    text = _text(record, "text", at, empty=False)
    return RawText(text, at.source, at.line, _rest(record, "text"))


def _tokenised(record: Record, at: Origin) -> Tokenised:
    ids_key = _first(record, IDS_KEYS) or ""
    mask_key = _first(record, MASK_KEYS) or ""
    ids = _numbers(record, ids_key, at)
    mask = _numbers(record, mask_key, at)
    if not ids:
        raise at.error(f"{ids_key} is empty")
    if len(ids) != len(mask):
        raise at.error(f"{ids_key} has {len(ids)} entries, {mask_key} {len(mask)}")
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= 2**31:
        wrong = next(i for i in ids if not isinstance(i, int) or not 0 <= i < 2**31)
        raise at.error(f"{ids_key} must hold token ids, got {shown(wrong)}")
    if mask_key == "labels":
        mask = _mask_of_labels(ids, mask, at)
    if not all(0 <= weight <= LARGEST_WEIGHT for weight in mask):
        wrong = next(m for m in mask if not 0 <= m <= LARGEST_WEIGHT)
        raise at.error(f"{mask_key} must hold finite weights of 0 or more, got {shown(wrong)}")
    extra = _rest(record, ids_key, mask_key)
    return Tokenised(ids, list(map(float, mask)), at.source, at.line, extra)


def _numbers(record: Record, key: str, at: Origin) -> list[Any]:
    values = record[key]
    if not isinstance(values, list):
        raise at.error(f"{key} must be a list of numbers, got {shown(values)}")
    if set(map(type, values)) <= {int, float}:  # most lists; one by one takes ten times as long
        return values
    for value in values:
        if not isinstance(value, int | float) or (isinstance(value, bool) and key in IDS_KEYS):
            raise at.error(f"{key} must hold numbers alone, got {shown(value)}")
    return values


def _mask_of_labels(ids: list[int], labels: list[int], at: Origin) -> list[float]:
    """Labels in transformers' sense: the id where it is trained, -100 where not, not shifted."""
    for number, (token, label) in enumerate(zip(ids, labels, strict=True), 1):
        if label not in (token, IGNORED_LABEL):
            raise at.error(
                f"label {number} is {shown(label)}, neither the id {token} of its place nor "
                f"{IGNORED_LABEL}; labels must not be shifted"
            )
    return [float(label != IGNORED_LABEL) for label in labels]


READERS: dict[str, Callable[[Record, Origin], Datum]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "tokenised": _tokenised,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "prompt_completion": _prompt_completion,
    "gsm8k": _gsm8k,
    "text": _raw_text,
}
