"""What was checked of an encoded conversation, and why one was refused."""

from dataclasses import dataclass
from typing import Any

from whet.errors import UserError

REASONS = {
    "template": "the template does not render the conversation",
    "no_stop": "the template ends the reply with no single token",
    "not_a_prefix": "the generation prompt is no prefix of the rendered reply",
    "stops_inside": "the reply is rendered as several turns",
    "dropped": "the template drops something that the model said",
    "rewritten": "the template rewrites earlier turns, and --rewritten_turns is error",
    "special": "control tokens in the text",
    "tokens": "the tokens do not show where the words begin or end",
    "nothing_trained": "no turn is to be trained",
    "datum": "the datum itself is not usable",
}


@dataclass(frozen=True)
class Refusal:
    """Why a conversation is not trained on. `kind` is a key of REASONS, to count by.

    `turn` is the message's number, from 1; None if it is not about one message.
    """

    kind: str
    message: str
    source: str = ""
    line: int = 0
    turn: int | None = None

    def __str__(self) -> str:
        return self.message


def refusal_of(datum: Any, kind: str, reason: str) -> Refusal:
    """The refusal of a whole datum: a conversation, a text, ids or a preference."""
    return Refusal(kind, f"{datum.at.where}: {reason}", datum.at.source, datum.at.line)


class Refused(UserError):  # noqa: N818 -- an answer, not an accident
    """A conversation that has no faithful encoding. Carries its `refusal`."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal

    def __reduce__(self) -> tuple[Any, ...]:
        return Refused, (self.refusal,)


@dataclass
class Certificate:
    """The proof that an encoded conversation keeps the rules, and what was done for it.

    Every count is 0 and every list empty in the usual case: the ids are the tokenizer's and the
    template's own. The rules are those of docs/chat_templates.md.
    """

    split_tokens: int = 0
    """Tokens that straddled the beginning of a reply and were split there (rule 4)."""
    escaped: int = 0
    """Control tokens in somebody's text, encoded as plain text (rule 5)."""
    closed: bool = False
    """The template writes no stop token after the last reply; it was put there (rule 2)."""
    composed: bool = False
    """The template renders a reply after something other than its prompt, or without the beginning
    that the prompt opens; the reply was put after its prompt (rule 3)."""
    rewritten: bool = False
    """The template rewrites earlier turns, so the conversation became several examples (rule 3)."""
    untrained_turns: tuple[int, ...] = ()
    """Turns left out by `rewritten_turns="last"`: message numbers from 1."""
    today: str = ""
    """The date that the template got."""

    @property
    def same_ids(self) -> bool:
        """Whether the ids are those of the tokenizer and template, untouched (rule 1)."""
        return not (self.split_tokens or self.escaped or self.closed or self.composed)
