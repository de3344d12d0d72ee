"""What a template does with conversations, found by trying it, never by its name.

A few made-up conversations with marker words in them are rendered, and the renderings tell in which
shape the template wants its messages, with which token a reply ends, what it writes behind that
token, and which of its switches change the generation prompt.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from whet.chat.messages import Message
from whet.chat.template import ChatTemplate, TemplateError

if TYPE_CHECKING:
    from whet.chat.tokenizer import Tokenizer

ASKED, SAID, THOUGHT, NEXT = "Qaskedq", "Qsaidq", "Qthoughtq", "Qnextq"
FUNCTION, VALUE = "qcallq", "Qvalueq"
KNOWN = {"messages", "tools", "documents", "add_generation_prompt"}

Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Form:
    """The shape in which a template wants messages."""

    parts: bool = False  # content as [{"type": "text", "text": ...}]
    json_arguments: bool = False  # tool-call arguments as a JSON text
    missing: str = "absent"  # a call's missing content: key absent, None or ""

    def shape(self, messages: list[Message]) -> list[Message]:
        """`messages` in this form; reasoning has a second name, `thinking`, as in transformers."""
        return [self._shape(message) for message in messages]

    def _shape(self, message: Message) -> Message:
        plain = "reasoning_content" not in message and "tool_calls" not in message
        if plain and not self.parts and "content" in message:
            return message
        shaped = dict(message)
        if "reasoning_content" in shaped:
            shaped["thinking"] = shaped["reasoning_content"]
        if "content" not in shaped and self.missing != "absent":
            shaped["content"] = None if self.missing == "none" else ""
        if self.parts and isinstance(shaped.get("content"), str):
            shaped["content"] = [{"type": "text", "text": shaped["content"]}]
        if self.json_arguments and "tool_calls" in shaped:
            shaped["tool_calls"] = [_with_json_arguments(call) for call in shaped["tool_calls"]]
        return shaped


@dataclass(frozen=True)
class Ending:
    """How a reply ends: the stop token's text and what the template writes behind it.

    `close` is not empty for a template that leaves the last reply open and closes it only when more
    follows: the text up to and with the stop token that is missing at the end.
    """

    stop: str
    after: str
    close: str = ""


@dataclass
class Dialect:
    """A template with the special tokens, variables and date that it is rendered with."""

    tokenizer: "Tokenizer"
    variables: dict[str, Any] = field(default_factory=dict)
    today: date | None = None

    def render(
        self,
        messages: list[Message],
        tools: Tools = None,
        documents: Tools = None,
        prompt: bool = False,
        switch: dict[str, Any] | None = None,
    ) -> str:
        """The text of messages that are in their form already; `prompt` asks for a reply."""
        variables = {**self.tokenizer.named, **self.variables, **(switch or {})}
        return self.template(tools).render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=prompt,
            today=self.today,
            **variables,
        )

    def template(self, tools: Tools) -> ChatTemplate:
        """The template for a conversation with these tools."""
        return (tools and self.tokenizer.tool_template) or self.tokenizer.template

    def form(self, with_calls: bool) -> Form:
        """The form for conversations with or without tool calls."""
        return self.call_form if with_calls else self.text_form

    @cached_property
    def text_form(self) -> Form:
        for form in (Form(), Form(parts=True)):
            for before in self._openings:
                text = self._tried(form.shape([*before, _say(SAID)]))
                if ASKED in text and SAID in text:
                    return form
        return Form()

    @cached_property
    def call_form(self) -> Form:
        parts = self.text_form.parts
        for json_arguments in (False, True):
            for missing in ("absent", "none", "empty"):
                form = Form(parts, json_arguments, missing)
                for before in self._openings:
                    text = self._tried(form.shape([*before, _call()]), TOOLS)
                    inner = text[text.rfind(ASKED) :]
                    if FUNCTION in inner and _printed_once(inner):
                        return form
        return Form(parts)

    @cached_property
    def endings(self) -> tuple[Ending, ...]:
        """The endings of plain replies, of calls, and of both with thinking before them."""
        found: list[Ending | None] = []
        for before in self._openings:
            user: list[Message] = [{"role": "user", "content": NEXT}]
            result: list[Message] = [
                {"role": "tool", "content": NEXT, "tool_call_id": CALL_ID, "name": FUNCTION}
            ]
            found.append(self._ending(before, _say(SAID), user, None, SAID))
            found.append(self._ending(before, _say(SAID, THOUGHT), user, None, SAID))
            for reply in (_call(), _call(content=SAID), _call(thought=THOUGHT), _call(calls=2)):
                found.append(self._ending(before, reply, result, TOOLS, VALUE))
        unique = dict.fromkeys(ending for ending in found if ending)
        return tuple(sorted(unique, key=lambda e: -len(e.stop + e.after)))

    @cached_property
    def switches(self) -> tuple[dict[str, Any], ...]:
        """Settings of single variables that change the generation prompt, best first.

        Best are those that change nothing else. The variables are those that the template reads and
        that nobody sets, their values True, False and what the template compares them with.
        """
        before = next((b for b in self._openings if self._tried(b, prompt=True)), None)
        if before is None:
            return ()
        reply = [*before, self.text_form.shape([_say(SAID)])[0]]
        prompt, whole = self._tried(before, prompt=True), self._tried(reply)
        seen = {(prompt, whole)}
        same: list[dict[str, Any]] = []
        other: list[dict[str, Any]] = []
        for switch in self._settings():
            pair = (
                self._tried(before, prompt=True, switch=switch),
                self._tried(reply, switch=switch),
            )
            if ASKED in pair[0] and pair[0] != prompt and pair not in seen:
                seen.add(pair)
                (same if pair[1] == whole else other).append(switch)
        return (*same, *other)

    def ending_of(self, whole: str, start: int) -> tuple[int, Ending] | None:
        """Where the words end that begin at `start` of the rendering `whole`, and how."""
        for ending in self.endings:
            end = len(whole) - len(ending.after)
            if not ending.close and whole.endswith(ending.stop + ending.after):
                return (end, ending) if end - len(ending.stop) >= start else None
        for ending in self.endings:  # a shape of reply that was not tried, with a known stop
            end = len(whole.rstrip())
            if whole.endswith(ending.stop, start, end) and not ending.close:
                return end, Ending(ending.stop, whole[end:])
        for ending in self.endings:
            if ending.close:
                return len(whole) + len(ending.close), ending
        return None

    def _settings(self) -> Iterator[dict[str, Any]]:
        template = self.tokenizer.template
        taken = KNOWN | set(self.tokenizer.named) | set(self.variables)
        for name in sorted(template.variables - taken):
            constants = template.compared.get(name, frozenset())
            for value in (False, True, *sorted(constants - {False, True}, key=str)):
                yield {name: value}

    @property
    def _openings(self) -> tuple[list[Message], ...]:
        user: Message = {"role": "user", "content": ASKED}
        return [user], [{"role": "system", "content": "Qsystemq"}, user]

    def _tried(self, messages: list[Message], tools: Tools = None, **how: Any) -> str:
        try:
            return self.render(messages, tools, **how)
        except TemplateError:
            return ""

    def _ending(
        self,
        before: list[Message],
        reply: Message,
        follow: list[Message],
        tools: Tools,
        last_word: str,
    ) -> Ending | None:
        """How the template ends `reply`, seen from the last marker word in it.

        What it writes there both at the end of a conversation and before further messages belongs
        to the reply; the stop token is the last control token of that, or the first eos.
        """
        form = self.form("tool_calls" in reply)
        before, reply, follow = form.shape(before), form.shape([reply])[0], form.shape(follow)
        tail = _behind(self._tried([*before, reply], tools), last_word)
        middle = _behind(self._tried([*before, reply, *follow], tools), last_word)
        if tail is None:
            return None
        common = _common(tail, middle) if middle is not None else ""
        stop = self._last_stop(common) or self._last_stop(tail)
        if stop:
            end = self._end_of(stop, common if stop in common else tail)
            return Ending(stop, tail[end:])
        return self._open_ending(before, reply, tail, middle, last_word)

    def _open_ending(
        self,
        before: list[Message],
        reply: Message,
        tail: str,
        middle: str | None,
        last_word: str,
    ) -> Ending | None:
        """The ending of a reply that is left open while it is the last."""
        asking = _behind(self._tried([*before, reply], prompt=True), last_word)
        if middle is None or asking is None or not middle.startswith(tail):
            return None
        common = _common(middle, asking)
        tokens = self._tokens(common)
        header = self._tried(before).partition(ASKED)[0]
        eos = [token for token in tokens if self._is_eos(token)]
        for stop in [*eos, *(token for token in tokens if token not in header)]:
            end = common.find(stop) + len(stop)
            if end > len(tail):
                return Ending(stop, "", close=common[len(tail) : end])
        return None

    def _last_stop(self, text: str) -> str | None:
        tokens = self._tokens(text)
        eos = [token for token in tokens if self._is_eos(token)]
        return eos[0] if eos else tokens[-1] if tokens else None

    def _end_of(self, stop: str, text: str) -> int:
        found = text.find(stop) if self._is_eos(stop) else text.rfind(stop)
        return found + len(stop)

    def _is_eos(self, token: str) -> bool:
        number = self.tokenizer.added.get(token)
        return number is not None and number in (
            self.tokenizer.eos_id,
            *self.tokenizer.further_eos_ids,
        )

    def _tokens(self, text: str) -> list[str]:
        """The control tokens in `text`, in order; if there are none, its other added tokens."""
        names = {i: name for name, i in self.tokenizer.added.items()}
        ids = self.tokenizer.encode(text)
        control = [names[i] for i in ids if names.get(i) in self.tokenizer.flagged]
        return control or [names[i] for i in ids if i in names]


def stops(tokenizer: "Tokenizer") -> list[str]:
    """The template's stop tokens."""
    return list(dict.fromkeys(ending.stop for ending in Dialect(tokenizer).endings))


CALL_ID = "call12345"  # nine letters and digits: some templates insist
PARAMETERS = {
    "type": "object",
    "properties": {"value": {"type": "string", "description": "a value"}},
    "required": ["value"],
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": FUNCTION, "description": "a tool", "parameters": PARAMETERS},
    }
]


def _say(content: str, thought: str = "") -> Message:
    reasoning = {"reasoning_content": thought} if thought else {}
    return {"role": "assistant", "content": content, **reasoning}


def _call(content: str = "", thought: str = "", calls: int = 1) -> Message:
    call = {
        "type": "function",
        "id": CALL_ID,
        "function": {"name": FUNCTION, "arguments": {"value": VALUE}},
    }
    message = {**_say(content, thought), "tool_calls": [call] * calls}
    if not content:
        del message["content"]
    return message


def _with_json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _printed_once(text: str) -> bool:
    """Whether the arguments stand in `text` as one JSON object, not as JSON within JSON."""
    return VALUE in text and f'\\"{VALUE}' not in text


def _common(one: str, other: str) -> str:
    """The longest beginning that both have."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:at]
    return min(one, other, key=len)


def _behind(text: str, word: str) -> str | None:
    _, found, behind = text.rpartition(word)
    return behind if found else None
