"""Renderings of one conversation's beginnings, asked for ahead and many at a time.

Each reply is found from two renderings, of the messages before it and of those up to it. What the
conversations of a block will need travels to the renderer in one message.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

from whet.chat.conversation import Message
from whet.chat.dialect import Dialect, Tools
from whet.chat.template import Ask, TemplateError

FEW = 8  # messages, of which each beginning is as quickly rendered as looked for


class Key(NamedTuple):
    """`render` or `marks` of the first `length` messages, with a generation prompt or without."""

    what: str
    length: int
    prompt: bool


class Beginnings:
    """`messages` with tools and documents, in the form that the template of `dialect` wants."""

    def __init__(
        self, dialect: Dialect, messages: list[Message], tools: Tools, documents: Tools
    ) -> None:
        self.dialect = dialect
        self.template = dialect.template(tools)
        self.messages, self.tools, self.documents = messages, tools, documents
        self.known: dict[Key, str | TemplateError] = {}

    def render(self, count: int, prompt: bool = False) -> str:
        """The text of the first `count` messages. Raises TemplateError."""
        whole = len(self.messages)
        if self._marks and 1 < count < whole:
            text = self._answer(Key("render", whole, prompt))
            return text[: self._marks[count]] + text[self._marks[-1] :]
        key = Key("render", count, prompt)
        if key not in self.known and not self._marks:
            self._ask_each()
        return self._answer(key)

    def expected(self) -> list[Key]:
        """What `render` will need in any case: of a short conversation the beginnings, of a long
        one whether the rendering of all messages shows them."""
        if len(self.messages) <= FEW:
            return self._each
        if not self._may_be_marked:
            return []  # long texts, as many as there are messages: one conversation at a time
        whole = [Key(w, len(self.messages), p) for w in ("marks", "render") for p in (False, True)]
        return [*whole, *(key for key in self._each if key.length <= 1)]

    def ask(self, key: Key) -> Ask:
        return key.what, self.messages[: key.length], self.tools, self.documents, key.prompt

    @property
    def _may_be_marked(self) -> bool:
        return len(self.messages) > FEW and not self.template.looks

    @cached_property
    def _each(self) -> list[Key]:
        """All messages, those before each reply and those up to it; none twice."""
        keys = [Key("render", len(self.messages), False)]
        for i, message in enumerate(self.messages):
            if message["role"] == "assistant":
                keys += Key("render", i, True), Key("render", i + 1, False)
        return list(dict.fromkeys(keys))

    def _ask_each(self) -> None:
        """Once: what breaks the bounds among others is asked for alone later."""
        keys, self._each = self._each, []
        _ask([(self, key) for key in keys if key not in self.known])

    @cached_property
    def _marks(self) -> list[int]:
        """Where each beginning of the messages ends in the rendering of all, or empty if each is to
        be rendered for itself: the template might render it in another way, or they are few."""
        if not self._may_be_marked:
            return []
        whole = len(self.messages)
        with suppress(TemplateError):
            keys = [Key("marks", whole, prompt) for prompt in (False, True)]
            marks, others = (json.loads(self._answer(key)) for key in keys)
            if marks and marks == others:
                texts = [self._answer(Key("render", whole, prompt)) for prompt in (False, True)]
                one, other = (text[: marks[-1]] for text in texts)
                return list(marks) if one == other else []
        return []

    def _answer(self, key: Key) -> str:
        """Raises TemplateError, BoundsError if it breaks the bounds alone."""
        known = self.known.get(key)
        if known is None:
            constant = self.dialect.today, self.dialect.constant
            return self.template.answer(self.ask(key), *constant)
        if isinstance(known, TemplateError):
            raise TemplateError(str(known))
        return known


def ask_ahead(many: Sequence[Beginnings]) -> None:
    """Ask for what each of `many`, all of one dialect, expects to need: a message a template."""
    for template in {id(one.template): one.template for one in many}.values():
        same = [one for one in many if one.template is template]
        _ask([(one, key) for one in same for key in one.expected()])


def _ask(wanted: list[tuple[Beginnings, Key]]) -> None:
    """Ask for what is `wanted` of one template, in one message."""
    if wanted:
        first = wanted[0][0]
        asks = [one.ask(key) for one, key in wanted]
        answers = first.template.answers(asks, first.dialect.today, first.dialect.constant)
        for (one, key), answer in zip(wanted, answers, strict=False):
            one.known[key] = answer
