"""Preference records -> pairs of conversations with one prompt, or labelled replies.

TRL's explicit and implicit prompts, texts or messages, Anthropic's HH transcripts, UltraFeedback,
and the prompt under the names that other sets give it. What is trained is the reply: the messages
after the common prompt.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from whet.chat.conversation import Conversation, Message, Origin, from_json, shown
from whet.data.record import (
    UNUSED,
    Record,
    conversation_of,
    first_of,
    nested,
    one_of,
    rest,
    text_of,
    turn_of,
)

PROMPT_KEYS = ("prompt", "messages", "conversations", "question", "instruction")
LABEL_KEYS = ("label", "kto_tag")
LABELS = {1: 1.0, 0: 0.0, "true": 1.0, "false": 0.0, "True": 1.0, "False": 0.0}
"""Good and bad; True and 1 are one key. Tables without truth values hold numbers or texts."""
SCORES = (("chosen_score", "score_chosen", "chosen_rating"),
          ("rejected_score", "score_rejected", "rejected_rating"))  # fmt: skip
SPEAKERS = re.compile(r"\n\n(Human|Assistant):[ ]?")


@dataclass(frozen=True)
class Preference:
    """A chosen and a rejected reply to one prompt, or a single reply that is good or bad."""

    sides: tuple[Conversation, ...]
    scores: tuple[float, ...]  # of each side, NaN if not known; a single reply's: 1 good, 0 bad
    margin: float = math.nan  # by how much the chosen one is better, NaN if not known

    @property
    def at(self) -> Origin:
        return self.sides[0].at

    @property
    def extra(self) -> dict[str, Any]:
        return self.sides[0].extra


Messages = list[Message]


def read_pair(record: Record, at: Origin) -> Preference:
    """A chosen and a rejected reply to one prompt."""
    key = first_of(record, PROMPT_KEYS)
    asked = record[key] if key else None
    if key == "instruction" and (context := text_of(record, "input", at)).strip():
        asked = f"{text_of(record, key, at, empty=False)}\n\n{context}"
    prompt = _messages(asked, key, "user", at) if key else []
    chosen = _messages(record["chosen"], "chosen", "assistant", at)
    rejected = _messages(record["rejected"], "rejected", "assistant", at)
    if not all(side[0].get("role") == "assistant" for side in (chosen, rejected)):
        prompt, chosen, rejected = _without_common(key, prompt, chosen, rejected, at)
    elif not prompt:
        raise at.error("has no prompt; name the field of the question with --fields prompt=NAME")
    given = [{**m, "weight": 0} if m.get("role") == "assistant" else m for m in prompt]
    used = ["chosen", "rejected", "input", "margin", *SCORES[0], *SCORES[1], key or "prompt"]
    used += ["messages"] if key == "prompt" else []  # UltraFeedback repeats the chosen side there
    sides = tuple(conversation_of(given + reply, record, at, *used) for reply in (chosen, rejected))
    scores = tuple(_number(record, names, at) for names in SCORES)
    margin = _number(record, ("margin",), at)
    return Preference(sides, scores, scores[0] - scores[1] if math.isnan(margin) else margin)


def _without_common(
    key: str | None, prompt: Messages, chosen: Messages, rejected: Messages, at: Origin
) -> tuple[Messages, Messages, Messages]:
    """Prompt and replies of two whole conversations, which must be the same up to a reply."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == len(chosen) == len(rejected):
        same -= 1  # equal sides: the last message is the reply
    replies = chosen[same:], rejected[same:]
    if not all(reply and reply[0].get("role") == "assistant" for reply in replies):
        raise at.error(
            f"chosen and rejected differ in message {same + 1}, which is no reply; both must "
            "answer the same prompt"
        )
    if prompt and prompt[-1] not in chosen[:same]:
        raise at.error(f"chosen and rejected do not begin with the field {key}")
    return chosen[:same], *replies


def _messages(value: Any, key: str, role: str, at: Origin) -> Messages:
    """A text, one message or several -> messages; a text without a speaker is `role`'s."""
    if isinstance(value, str) and SPEAKERS.match(value):
        return _transcript(value, is_prompt=role == "user")
    is_list = key in ("messages", "conversations")
    value = from_json(value, key, at.where) if is_list else nested(value, key, at)
    if isinstance(value, str) and not is_list:
        if role == "user" and not value.strip():
            raise at.error(f"{key} is empty")
        return [{"role": role, "content": value}]
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not value:
        raise at.error(f"{key} must be a text or a list of messages, got {shown(value)}")
    return [turn_of(message, f"{key} {n}", at) for n, message in enumerate(value, 1)]


def _transcript(text: str, is_prompt: bool) -> Messages:
    """Anthropic's HH: `\\n\\nHuman: …\\n\\nAssistant: …`, the prompt with an open end."""
    parts = SPEAKERS.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    is_open = turns[-1] == {"role": "assistant", "content": ""}
    return turns[:-1] if is_prompt and is_open else turns


def read_labelled(record: Record, at: Origin, read: Callable[[Record, Origin], Any]) -> Preference:
    """A conversation of another format and whether its last reply is good; only that is trained."""
    key = first_of(record, LABEL_KEYS) or "label"
    said = one_of(record, LABEL_KEYS, at)
    good = LABELS.get(said) if isinstance(said, str | int | float) else None
    if good is None:
        expected = "expected true or false, or 1 or 0, for a good or a bad reply"
        raise at.error(f"{key} is {shown(record[key])}; {expected}{UNUSED % key}")
    datum = read(rest(record, *LABEL_KEYS), at)
    if not isinstance(datum, Conversation):
        raise at.error(f"{key} needs a conversation whose last reply it judges{UNUSED % key}")
    last = max(i for i, m in enumerate(datum.messages) if m["role"] == "assistant")
    weights: list[float | None] = [
        0.0 if m["role"] == "assistant" and i != last else None
        for i, m in enumerate(datum.messages)
    ]
    reply = Conversation(datum.messages, datum.tools, datum.documents, weights, at, datum.extra)
    return Preference((reply,), (good,))


def _number(record: Record, names: tuple[str, ...], at: Origin) -> float:
    key = first_of(record, names)
    if key is None:
        return float("nan")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise at.error(f"{key} must be a finite number, got {shown(value)}")
    return float(value)
