"""encode_chat: a conversation -> token ids and the loss mask on the model's own words.

    conversation --Rendered--> drafts (text, marked characters) --Aligner--> ids, marked tokens

The rules that every result keeps, or is refused, stand in docs/chat_templates.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from whet.chat.align import Aligner, Located, Unclear
from whet.chat.backend import TokenizerError, failures_named
from whet.chat.beginnings import ask_ahead
from whet.chat.certificate import Certificate, Refusal, Refused, refusal_of
from whet.chat.chat import Chat
from whet.chat.conversation import (
    Conversation,
    RawText,
    Tokenised,
    half_character,
    read_conversation,
)
from whet.chat.examples import Draft, drafts, prompt_draft
from whet.chat.turns import Rendered

BATCH = 256  # conversations that are tokenised at once: enough to keep the tokenizer's threads busy

NESTED = "is nested too deeply to be a conversation"
Datum = Conversation | RawText | Tokenised
Made = TypeVar("Made")


@dataclass(frozen=True)
class EncodeOptions:
    """How conversations are rendered and which of their turns are trained."""

    train_on: Literal["all", "last"] = "all"
    """Train every assistant turn, or the last one of a conversation only."""
    rewritten_turns: Literal["split", "last", "error"] = "split"
    """Where the template rewrites earlier turns: an example for each, the last only, or stop."""
    special_in_content: Literal["escape", "error", "allow"] = "escape"
    """Control tokens in somebody's text: plain text, a refusal, or control tokens."""


@dataclass(frozen=True)
class Span:
    """ids[start:end] are the words of message `message` (from 0), trained with `weight`."""

    message: int
    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class Example:
    """One row's document: ids (n,) int32 and loss_mask (n,) float32.

    `loss_mask[t]` is the weight of token t as something to be produced; it is not shifted.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    spans: tuple[Span, ...] = ()

    @property
    def turns(self) -> tuple[int, ...]:
        """The trained messages, from 0."""
        return tuple(span.message for span in self.spans)


@dataclass(frozen=True)
class Encoded:
    """The examples of one datum, in order, and the certificate that they keep the rules."""

    examples: list[Example]
    certificate: Certificate

    @property
    def ids(self) -> np.ndarray:
        """The ids of the only example."""
        return self._only().ids

    @property
    def loss_mask(self) -> np.ndarray:
        """The loss mask of the only example."""
        return self._only().loss_mask

    def _only(self) -> Example:
        if len(self.examples) != 1:
            raise ValueError(
                f"the template rewrites earlier turns: {len(self.examples)} examples, see .examples"
            )
        return self.examples[0]


def encode_chat(
    conversation: Datum | list[dict[str, Any]],
    chat: Chat,
    options: EncodeOptions | None = None,
) -> Encoded:
    """Encode one conversation (or plain list of messages). Raises Refused, a UserError.

    Raises it where the mask cannot be shown to be right; `Refused.refusal` says why and where.
    """
    if isinstance(conversation, list):
        conversation = read_conversation(conversation)
    result = encoder_for(chat, options or EncodeOptions()).encode([conversation])[0]
    if isinstance(result, Refusal):
        raise Refused(result)
    return result


def encode_many(
    conversations: Sequence[Datum],
    chat: Chat,
    options: EncodeOptions | None = None,
) -> list[Encoded | Refusal]:
    """`encode_chat` for many, faster; a refused one gives its Refusal in its place."""
    encoder = encoder_for(chat, options or EncodeOptions())
    results: list[Encoded | Refusal] = []
    for begin in range(0, len(conversations), BATCH):
        results += encoder.encode(conversations[begin : begin + BATCH])
    return results


def encode_prompt(
    messages: Conversation | list[dict[str, Any]],
    chat: Chat,
    options: EncodeOptions | None = None,
    *,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, Any]] | None = None,
    go_on: bool = True,
) -> list[int]:
    """The ids that ask for the next reply: what stands before its trained span in training.

    A last assistant message is continued, unless `go_on` is False: then a further one is asked
    for. Raises Refused if the template does not render the messages.
    """
    if isinstance(messages, list):
        messages = read_conversation(messages, tools=tools, documents=documents, asks=True)
    encoder = encoder_for(chat, options or EncodeOptions())
    try:
        draft = prompt_draft(encoder.rendered(messages), go_on)
        with failures_named("the text"):
            return [int(i) for i in encoder.aligner.locate(draft).ids]
    except (Unclear, TokenizerError) as error:
        raise Refused(refusal_of(messages, "tokens", str(error))) from None
    except RecursionError:
        raise Refused(refusal_of(messages, "datum", NESTED)) from None


def encoder_for(chat: Chat, options: EncodeOptions) -> "Encoder":
    """The encoder of this chat and these options, made once."""
    key = repr(options)
    if key not in chat.memo:
        chat.memo[key] = Encoder(chat, options)
    found: Encoder = chat.memo[key]
    return found


class Encoder:
    """Encodes conversations as a chat and the options say."""

    def __init__(self, chat: Chat, options: EncodeOptions) -> None:
        self.chat = chat
        self.options = options
        self.aligner = Aligner(chat)

    def rendered(self, conversation: Conversation) -> Rendered:
        """`conversation` as the template renders it."""
        return Rendered(conversation, self.chat, self.options.special_in_content)

    def encode(self, data: Sequence[Datum]) -> list[Encoded | Refusal]:
        """The results for `data`, in order, tokenised together."""
        try:
            with failures_named("the text"):
                return self._encoded(data)
        except (TokenizerError, RecursionError) as error:
            if len(data) == 1:
                nested = isinstance(error, RecursionError)
                how = ("datum", NESTED) if nested else ("tokens", str(error))
                return [refusal_of(data[0], *how)]
            return [result for datum in data for result in self.encode([datum])]

    def _encoded(self, data: Sequence[Datum]) -> list[Encoded | Refusal]:
        made = [_or_refusal(self._made, datum) for datum in data]
        ask_ahead([one.beginnings for one in made if isinstance(one, Rendered)])
        how = self.options.train_on, self.options.rewritten_turns
        planned = [
            _or_refusal(drafts, one, *how) if isinstance(one, Rendered) else one for one in made
        ]
        waiting = [draft for plan in planned if isinstance(plan, tuple) for draft in plan[0]]
        located = iter(self.aligner.locate_many(waiting))
        results: list[Encoded | Refusal] = []
        for datum, plan in zip(data, planned, strict=True):
            if isinstance(plan, tuple):
                own = [next(located) for _ in plan[0]]
                results.append(_encoded(datum, plan[0], own, plan[1]))
            else:
                results.append(plan)
        return results

    def _made(self, datum: Datum) -> Rendered | Encoded:
        if isinstance(datum, Conversation):
            return self.rendered(datum)
        return self._raw(datum) if isinstance(datum, RawText) else self._tokenised(datum)

    def _raw(self, datum: RawText) -> Encoded:
        """Text, trained whole, with the eos after it; control tokens in it as `special` says."""
        if half := half_character(datum.text):
            raise Refused(refusal_of(datum, "datum", half))
        pattern = self.chat.control_pattern
        found = len(pattern.findall(datum.text)) if pattern else 0
        special = self.options.special_in_content
        if found and special == "error":
            raise Refused(refusal_of(datum, "special", "the text holds a control token"))
        backend = self.chat.tokenizer.backend
        if found and special == "escape":
            backend = self.chat.plain_backend
        ids = list(backend.encode(datum.text, add_special_tokens=False).ids)
        if not ids:
            raise Refused(refusal_of(datum, "datum", "the text is empty"))
        if self.chat.tokenizer.eos_id is not None:
            ids.append(self.chat.tokenizer.eos_id)
        array = np.array(ids, np.int32)
        mask = np.ones(len(ids), np.float32)
        escaped = found if special == "escape" else 0
        return Encoded([Example(array, mask)], Certificate(escaped=escaped))

    def _tokenised(self, datum: Tokenised) -> Encoded:
        """Somebody else's ids and mask, checked for what can be checked."""
        if not datum.ids or len(datum.ids) != len(datum.mask):
            reason = (
                f"{len(datum.ids)} ids and {len(datum.mask)} mask values; expected as many, > 0"
            )
            raise Refused(refusal_of(datum, "datum", reason))
        ids = np.array(datum.ids, np.int64)
        size = self.chat.tokenizer.vocab_size
        if ids.min() < 0 or ids.max() >= size:
            wrong = int(ids[(ids < 0) | (ids >= size)][0])
            reason = f"id {wrong} is not in the tokenizer's vocabulary of {size}"
            raise Refused(refusal_of(datum, "datum", reason))
        mask = np.array(datum.mask, np.float32)
        if not mask.any():
            reason = "the weight of every token is 0; nothing is to be learnt"
            raise Refused(refusal_of(datum, "nothing_trained", reason))
        return Encoded([Example(ids.astype(np.int32), mask)], Certificate())


def _encoded(
    datum: Datum, made: list[Draft], located: list[Located | Unclear], certificate: Certificate
) -> Encoded | Refusal:
    """Put the weights on the located spans."""
    examples = []
    for draft, found in zip(made, located, strict=True):
        if isinstance(found, Unclear):
            return refusal_of(datum, "tokens", str(found))
        loss_mask = np.zeros(len(found.ids), np.float32)
        spans = []
        for mark, (start, end) in zip(draft.marks, found.spans, strict=True):
            if mark.weight:
                loss_mask[start:end] = mark.weight
                spans.append(Span(mark.message, start, end, mark.weight))
        certificate.split_tokens += found.split
        examples.append(Example(found.ids, loss_mask, tuple(spans)))
    return Encoded(examples, certificate)


def _or_refusal(make: Callable[..., Made], *given: Any) -> Made | Refusal:
    """What `make` gives, or why it refuses."""
    try:
        return make(*given)
    except Refused as error:
        return error.refusal
