"""What a template does with conversations, found by trying it, never by its name.

A few made-up conversations with marker words in them are rendered, and the renderings show in which
shape the template wants its messages, with which token a reply ends, what it writes after that
token, and which of its switches change the generation prompt.
"""

import itertools
import re
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from whet.chat.conversation import Message
from whet.chat.form import (
    ASKED,
    CALL_ID,
    FUNCTION,
    MISSING,
    NEXT,
    SAID,
    THOUGHT,
    TOOLS,
    VALUE,
    Form,
    call,
    say,
)
from whet.chat.template import BoundsError, ChatTemplate, TemplateError
from whet.chat.tokenizer import Tokenizer

UNDEFINED = re.compile(r"'(\w+)' is undefined")  # as jinja says it
SYSTEM = ("system", "developer")
HEADER_WORDS = 3  # a header is short; longer texts may name tokens in prose

Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Ending:
    """How a reply ends: the stop token's text and what the template writes after it.

    `close` is not empty for a template that leaves the last reply open and closes it only when more
    follows: the text up to and with the stop token that is missing at the end, put in the place of
    `after`. `calls` says whether this was seen after tool calls.
    """

    stop: str
    after: str
    close: str = ""
    calls: bool = False

    @cached_property
    def tail(self) -> str:
        """What stands after the last word."""
        return self.stop + self.after


@dataclass(frozen=True)
class Seen:
    """What a template writes after the last marker word of a made-up reply, or of its question.

    None where it refuses, or writes no such word.
    """

    calls: bool  # the reply calls a tool
    tail: str  # after the reply, where it is the last message
    middle: str | None  # where more follow it
    asking: str | None  # where a further reply is asked for
    asked: str | None  # after the question, where nothing follows it
    prompt: str | None  # where its reply is asked for


@dataclass
class Dialect:
    """A template with the special tokens, variables and date that it is rendered with."""

    tokenizer: Tokenizer
    plain_template: ChatTemplate
    tool_template: ChatTemplate | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    today: date | None = None
    _forms: dict[tuple[bool, bool], Form] = field(default_factory=dict, init=False)

    def render(
        self,
        messages: list[Message],
        tools: Tools = None,
        documents: Tools = None,
        prompt: bool = False,
    ) -> str:
        """The text of messages that are in their form already; `prompt` asks for a reply."""
        ask = ("render", messages, tools, documents, prompt)
        return self.template(tools).answer(ask, self.today, self.constant)

    @cached_property
    def constant(self) -> dict[str, Any]:
        """The variables that are the same for all conversations."""
        return {**self.tokenizer.named, **self.variables}

    def template(self, tools: Tools) -> ChatTemplate:
        """The template for a conversation with these tools."""
        return (tools and self.tool_template) or self.plain_template

    def form(self, messages: list[Message]) -> Form:
        """The form for conversations like this one."""
        system = calls = False
        for message in messages:  # a loop, as this is asked for every conversation
            system = system or message["role"] == "system"
            calls = calls or "tool_calls" in message
        key = (system, calls)
        if key not in self._forms:
            self._forms[key] = self._find_form(*key)
        return self._forms[key]

    def _find_form(self, system: bool, calls: bool) -> Form:
        """The first form in which the marker words of a conversation are all written."""
        before = self._openings[1 if system else 0]
        reply, tools = (call(), TOOLS) if calls else (say(SAID), None)
        both = (False, True)
        options: Any = itertools.product(both, both, MISSING) if calls else [(False,), (True,)]
        for form in itertools.starmap(Form, options):
            text = self._tried(form.shape([*before, reply]), tools)
            at = text.rfind(ASKED)
            # As one JSON object, not as JSON within JSON.
            printed_once = VALUE in text[at:] and f'\\"{VALUE}' not in text[at:]
            if calls and FUNCTION in text[at:] and printed_once:
                return form
            if not calls and at >= 0 and SAID in text:
                return form
        if system:
            return self._find_form(False, calls)
        # A template without calls should show that by leaving them out, not by missing a content.
        return Form(missing="empty" if calls else "absent")

    @cached_property
    def endings(self) -> tuple[Ending, ...]:
        """The endings of plain replies, of calls, and of both with thinking before them."""
        user: list[Message] = [{"role": "user", "content": NEXT}]
        result = [{"role": "tool", "content": NEXT, "tool_call_id": CALL_ID, "name": FUNCTION}]
        calls = [call(), call(content=SAID), call(thought=THOUGHT), call(calls=2)]
        plain = self._seen([say(SAID), say(SAID, THOUGHT)], user)
        found = [self._ending(seen) for seen in plain]
        known = {ending.stop for ending in found if ending}
        found += [self._ending(seen, known) for seen in self._seen(calls, result)]
        if not any(found):
            found = [self._unwritten(seen) for seen in plain]
            if any(found):
                found += [self._unwritten(seen) for seen in self._seen(calls[:1], result)]
        return tuple(
            sorted(dict.fromkeys(filter(None, found)), key=lambda e: -len(e.stop + e.after))
        )

    @cached_property
    def headers(self) -> frozenset[str]:
        """Control tokens that begin a turn.

        They stand before the first message's text, or right before the user's. What ends a turn may
        stand there, too, if the template writes a system text of its own first; but that stands
        after messages as well.
        """
        before, text = self._asking
        if not before:
            return frozenset()
        first = before[0]["content"]
        found = set(self._tokens(text.partition(first)[0]))
        for word in (first, ASKED):
            found.difference_update(self._tokens(text.partition(word)[2])[:1])
        asking = text.partition(ASKED)[0].rstrip()
        found.update(t for t in self._tokens(asking)[-1:] if asking.endswith(t))
        return frozenset(token for token in found if not self._is_eos(token))

    @cached_property
    def borders(self) -> frozenset[str]:
        """The tokens with which the template begins and ends turns, flagged as special or not.

        Nobody's text may hold them as tokens. Those that it writes within replies are the model's:
        data may well hold `<think>`.
        """
        stops = {ending.stop for ending in self.endings}
        found = set(stops)
        before, text = self._asking
        *headers, rest = re.split("|".join(m["content"] for m in before), text)
        for header in headers:
            for stop in stops:
                header = header.rpartition(stop)[2]
            if len(header.split()) <= HEADER_WORDS:
                found.update(self._added(header))
        more = bool(before)
        while more:  # what ends the question, and what begins the reply
            rest = rest.lstrip()
            token = next((t for t in self._added(rest)[:1] if rest.startswith(t)), "")
            found |= {token} - {""}
            rest = rest.removeprefix(token)
            more = token in stops
        return frozenset(found)

    @cached_property
    def _asking(self) -> tuple[list[Message], str]:
        """The prompt after an opening whose first text it writes, one with a system text if there
        is any; both are empty if there is none."""
        for before in self._openings[::-1]:
            text = self._tried(self.form(before).shape(before), prompt=True)
            if before[0]["content"] in text:
                return before, text
        return [], ""

    def sample(self) -> list[str]:
        """A prompt, a reply, one with thinking and a call, each "" if the template refuses it."""
        before = next((b for b in self._openings if self._tried(b, prompt=True)), self._openings[0])
        replies = [say(SAID), say(SAID, THOUGHT), call()]
        talks = [self.form([*before, reply]).shape([*before, reply]) for reply in replies]
        return [self._tried(before, prompt=True), *map(self._tried, talks)]

    def ending_of(self, whole: str, start: int, calls: bool) -> tuple[int, Ending] | None:
        """Where the words end that begin at `start` of the rendering `whole`, and how.

        `calls` says whether they are tool calls.
        """
        for ending in self.endings:
            if not ending.close and whole.endswith(ending.tail):
                end = len(whole) - len(ending.after)
                return (end, ending) if end - len(ending.stop) >= start else None
        for ending in self.endings:  # a shape of reply that was not tried, with a known stop
            end = len(whole.rstrip())
            if whole.endswith(ending.stop, start, end) and not ending.close:
                return end, Ending(ending.stop, whole[end:])
        for ending in self.endings:
            end = len(whole) - len(ending.after)
            fits = ending.calls == calls and whole.endswith(ending.after) and end >= start
            if ending.close and fits:
                return end + len(ending.close), ending
        return None

    def advice(
        self, error: TemplateError, messages: list[Message], index: int, tools: Tools
    ) -> str:
        """What is missing if the template fails with `error` on the turn `messages[index]`: a
        variable, a turn of the user's, or tools."""
        if isinstance(error, BoundsError):
            return ""
        missing = UNDEFINED.search(str(error))
        if missing and missing[1] in self.template(tools).variables:
            return f"; set it with --template_kwargs '{{\"{missing[1]}\": ...}}'"
        first = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM), 0)
        asked: Message = {"role": "user", "content": ASKED}
        if messages[first]["role"] == "assistant" and self._renders(
            [*messages[:first], asked, *messages[first:]], index + 1, tools
        ):
            return "; the conversation begins with the assistant: put a user turn before it"
        if not tools and self._renders(messages, index, TOOLS):
            return "; it needs tools, and this conversation has none"
        return ""

    def _renders(self, messages: list[Message], index: int, tools: Tools) -> bool:
        try:
            self.render(messages[: index + 1], tools)
            self.render(messages[:index], tools, prompt=True)
        except TemplateError:
            return False
        return True

    @property
    def _openings(self) -> tuple[list[Message], ...]:
        user: Message = {"role": "user", "content": ASKED}
        return [user], [{"role": "system", "content": "Qsystemq"}, user]

    def _tried(self, messages: list[Message], tools: Tools = None, prompt: bool = False) -> str:
        """The rendering, with made-up tools if the template cannot do without, or ""."""
        for attempt in (tools, TOOLS):
            try:
                return self.render(messages, attempt, prompt=prompt)
            except TemplateError as error:
                if isinstance(error, BoundsError):  # with so little: it would be so for all
                    raise
        return ""

    def _seen(self, replies: list[Message], follow: list[Message]) -> list[Seen]:
        """What is seen of each of `replies` after each opening, `follow` after it."""
        found = []
        for before, reply in itertools.product(self._openings, replies):
            tools, word = (TOOLS, VALUE) if "tool_calls" in reply else (None, SAID)
            whole = self.form([*before, reply]).shape([*before, reply])
            more = self.form([*before, reply]).shape([*before, reply, *follow])
            if (tail := _after(self._tried(whole, tools), word)) is None:
                continue
            seen = Seen(
                calls="tool_calls" in reply,
                tail=tail,
                middle=_after(self._tried(more, tools), word),
                asking=_after(self._tried(whole, tools, prompt=True), word),
                asked=_after(self._tried(whole[:-1], tools), ASKED),
                prompt=_after(self._tried(whole[:-1], tools, prompt=True), ASKED),
            )
            found.append(seen)
        return found

    def _ending(self, seen: Seen, known: set[str] | None = None) -> Ending | None:
        """How the template ends the reply that is `seen`.

        What it writes there both at the end of a conversation and before further messages belongs
        to the reply; the stop token is the last control token of that, or the first eos. Where
        stops are `known` already, another one counts only if a new turn begins right after it.
        """
        tail, middle = seen.tail, seen.middle
        common = beginning_of(tail, middle) if middle is not None else ""
        for text in (common, tail):
            stop, end = self._stop_in(text, known or set())
            if not stop:
                continue
            if not self._is_eos(stop):
                if known is not None and stop not in known:  # another stop than plain replies have
                    if middle is None or not self._begins_turn(middle[end:]):
                        break
                elif text != common and seen.asked and seen.asked.endswith(tail[:end]):
                    break  # written after whatever stands last: the next reply's header
            return Ending(stop, tail[end:], calls=seen.calls)
        return self._open_ending(seen)

    def _open_ending(self, seen: Seen) -> Ending | None:
        """The ending of a reply that is left open while it is the last."""
        tail, middle = seen.tail, seen.middle
        if middle is None or seen.asking is None or not middle.startswith(tail):
            return None
        # The next turn's header may itself be an eos: GLM stops where it writes <|user|>.
        for text in (middle[: middle.find(NEXT)], beginning_of(middle, seen.asking)):
            stop, end = self._stop_in(text, set())
            if len(tail) < end and (self._is_eos(stop) or text in seen.asking):
                return Ending(stop, "", middle[len(tail) : end], seen.calls)
        stop = next(iter(self._tokens(middle[len(tail) :])), "")
        end = middle.find(stop, len(tail)) + len(stop)
        first = stop and middle[len(tail) : end].strip() == stop and stop not in self.headers
        # Or it could be the next turn's own header: one ends a turn of the user's, too.
        header = (seen.prompt or "").lstrip()
        if first and (self._begins_turn(middle[end:]) or header.startswith(stop)):
            return Ending(stop, "", middle[len(tail) : end], seen.calls)
        return None

    def _unwritten(self, seen: Seen) -> Ending | None:
        """The ending of a reply in a template that ends none: the eos, at which each engine stops.

        Only whitespace and the header of the next turn may stand after a last reply, since a text
        there could be an end marker that this tokenizer does not have as a token. A call goes on to
        where the next message begins.
        """
        eos = self.tokenizer.named.get("eos_token", "")
        if eos not in self.tokenizer.added:
            return None
        tail, written, more = seen.tail, seen.tail.rstrip(), seen.middle or ""
        if seen.calls and not more.startswith(written):
            return None
        if written and not seen.calls:
            always = (seen.asked or "").endswith(tail) and more and not more.startswith(written)
            if not self._begins_turn(tail) and not always:
                return None
            written = ""
        return Ending(eos, tail[len(written) :], eos, seen.calls)

    def _stop_in(self, text: str, known: set[str]) -> tuple[str, int]:
        """The stop token in `text` and where it ends; ("", 0) if there is none."""
        # Some templates write a generation prompt whether asked to or not; it begins with a header.
        tokens = [token for token in self._tokens(text) if token not in self.headers]
        for token in tokens:
            if self._is_eos(token) or token in known:
                return token, text.find(token) + len(token)
        return (tokens[-1], text.rfind(tokens[-1]) + len(tokens[-1])) if tokens else ("", 0)

    def _begins_turn(self, text: str) -> bool:
        return text.lstrip().startswith(tuple(self.headers)) if self.headers else False

    def _is_eos(self, token: str) -> bool:
        return self.tokenizer.added.get(token) in self.tokenizer.eos_ids

    def _tokens(self, text: str) -> list[str]:
        """The control tokens in `text`, in order; if there are none, its other added tokens."""
        added = self._added(text)
        return [token for token in added if token in self.tokenizer.flagged] or added

    def _added(self, text: str) -> list[str]:
        names = {i: name for name, i in self.tokenizer.added.items()}
        return [names[i] for i in self.tokenizer.encode(text) if i in names]


def beginning_of(one: str, other: str) -> str:
    """The longest beginning that both have."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:at]
    return min(one, other, key=len)


def _after(text: str, word: str) -> str | None:
    return text.rpartition(word)[2] if word in text else None
