"""One conversation as one template renders it: for each reply its prompt and its words.

For each assistant turn i two renderings are compared: the prompt that asks for it,
`messages[:i]` with the generation prompt, and the conversation up to it, `messages[:i + 1]`. The
first must be the beginning of the second; the words are what the second adds, up to the end of the
stop token.

Some templates render the context of a reply in another way once the reply follows it (a system
text that is written before the last user message only). Then the words are those after the same
end of the context, and stand after the prompt as it is at inference.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from whet.chat.beginnings import Beginnings
from whet.chat.certificate import Refusal, Refused
from whet.chat.chat import Chat
from whet.chat.conversation import Conversation, Message, half_character
from whet.chat.dialect import Ending, beginning_of
from whet.chat.form import THOUGHT
from whet.chat.hidden import BORDER, Content, Escapes, Exposed, any_text_holds, check_joints
from whet.chat.said import marked, stands_in, written
from whet.chat.template import TemplateError

STAND_IN = f"Q{BORDER}q"  # a reply in a trial rendering
ANOTHER = "take another template with --chat_template"
FIRST_TAG = re.compile(r"<[^<>]+>|\[[^\[\]]+\]|\S+")  # `<think>`, `[THINK]` or a word
# `</think>`, `[/THINK]`, `<think|>`
LAST_TAG = re.compile(r"(</[^<>]+>|\[/[^\[\]]+\]|<[^<>|]+\|>)\Z")


class Mark(NamedTuple):
    """The words of message `message` are characters start..end of a text; `stop` ends them.

    A mark with weight 0 trains nothing: it only says where a prompt ended, since a token that
    straddles this border would not stand there at inference.
    """

    message: int
    start: int
    end: int
    stop: str
    weight: float


@dataclass(slots=True)
class Turn:
    """What was found out about one assistant turn."""

    index: int
    prompt: str
    whole: str  # the rendering with this turn as the last; begins with `prompt`
    said: str  # the rendering up to the end of the stop token, which may have been put there
    ending: Ending
    composed: bool = False  # `whole` is the prompt and the words after it, not one rendering

    @property
    def text(self) -> str:
        """The whole rendering; ends with the stop token if the template leaves the turn open."""
        return self.said if self.ending.close else self.whole

    def mark(self, weight: float) -> Mark:
        return Mark(self.index, len(self.prompt), len(self.said), self.ending.stop, weight)


class Rendered:
    """One conversation as one chat renders it. `special` is as in EncodeOptions."""

    def __init__(self, conversation: Conversation, chat: Chat, special: str) -> None:
        self.conversation = conversation
        self.chat = chat
        self.dialect = chat.dialect
        self.form = self.dialect.form(conversation.messages)
        content = self.form.shape(conversation.messages), conversation.tools, conversation.documents
        self.escapes: Escapes | None = None
        self._pattern = chat.control_pattern if special != "allow" else None
        self.special = special
        if self._pattern and any_text_holds(content, self._pattern.search):
            if special == "error":
                reason = "a text holds a control token, and --special_in_content is error"
                raise self.refused("special", reason)
            try:
                self.escapes = Escapes(content, self._pattern)
            except Exposed as error:
                raise self.refused("special", str(error)) from None
            content = self.escapes.hidden
        self.messages, self.tools, self.documents = content
        self.beginnings = Beginnings(self.dialect, *content)

    @property
    def hidden(self) -> dict[str, str]:
        return self.escapes.strings if self.escapes else {}

    def render(self, count: int, prompt: bool = False) -> str:
        """The first `count` messages."""
        return self.beginnings.render(count, prompt)

    def _render(self, messages: list[Message], prompt: bool = False) -> str:
        return self.dialect.render(messages, self.tools, self.documents, prompt)

    def check_escapes(self, text: str, count: int, prompt: bool) -> None:
        """Show that the template treats the private-use characters as it treats what they hide,
        and that it makes no control string out of texts that hold none."""

        def render(content: Content) -> str:
            messages, tools, documents = content
            return self.dialect.render(messages[:count], tools, documents, prompt)

        try:
            if self._pattern and self._could_join:
                content = (self.messages[:count], self.tools, self.documents)
                check_joints(content, self._pattern, text, render)
            if self.escapes:
                self.escapes.check(text, render)
        except Exposed as error:
            raise self.refused("special", str(error)) from None

    @cached_property
    def _could_join(self) -> bool:
        content = (self.messages, self.tools, self.documents)
        return any_text_holds(content, self.chat.joints.possible)

    def check_characters(self, text: str) -> None:
        """Refuse a text that no tokenizer can read."""
        if half := half_character(text):
            raise self.refused("datum", half)

    def turn(self, index: int) -> Turn:
        """The assistant turn `index`. Raises Refused, with the ways out that were found to work."""
        try:
            return self._turn(index)
        except Refused as error:
            refusal = error.refusal
        for setting, chat in self.chat.alternatives:
            with suppress(Refused):
                Rendered(self.conversation, chat, self.special)._turn(index)
                way = f"; --template_kwargs '{json.dumps(setting)}' encodes it"
                refusal = replace(refusal, message=refusal.message + way)
                break
        raise Refused(refusal)

    def _turn(self, index: int) -> Turn:
        try:
            whole = self.render(index + 1)
            prompt = self.render(index, prompt=True)
        except TemplateError as error:
            advice = self.dialect.advice(error, self.messages[: index + 1], index, self.tools)
            raise self.refused("template", f"{error}{advice}", index) from None
        if whole.startswith(prompt):
            return self._with_ending(index, prompt, whole)
        for words_after in (self._words_after_border, self._words_in_place, self._words_closed):
            with suppress(TemplateError):
                words = words_after(index, prompt, whole)
                if words is not None:
                    return self._with_ending(index, prompt, prompt + words, composed=True)
        raise self._no_prefix(index, prompt, whole)

    def _words_after_border(self, index: int, prompt: str, whole: str) -> str | None:
        """What stands in `whole` after the end of the context and the generation prompt.

        A border put at the end of the last message before the reply shows where that is. None if
        the generation prompt does not stand there, too, or the border changes anything else.
        """
        content = self.messages[index - 1].get("content") if index else None
        if not isinstance(content, str) or not content.strip() or BORDER in whole:
            return None
        end = len(content.rstrip())
        marked = {**self.messages[index - 1], "content": content[:end] + BORDER + content[end:]}
        before = [*self.messages[: index - 1], marked]
        asking = self._render(before, prompt=True)
        answered = self._render([*before, self.messages[index]])
        if asking.replace(BORDER, "", 1) != prompt or answered.replace(BORDER, "", 1) != whole:
            return None
        _, found, expected = asking.partition(BORDER)
        tail = answered.partition(BORDER)[2]
        return tail[len(expected) :] if found and tail.startswith(expected) else None

    def _words_in_place(self, index: int, prompt: str, whole: str) -> str | None:
        """The words where the template writes the reply's content, if the prompt leads there.

        The prompt may end with other whitespace than stands before the written reply. Or it opens
        something (`<think>`) with which the content begins, and which the template does not write.
        """
        if "tool_calls" in self.messages[index] or not written(self.messages[index].get("content")):
            return None
        head, tail = self._around(index, self.messages[index])
        if "".join(prompt.split()) == "".join(head.split()):
            if not whole.startswith(head):
                return None
            ends = prompt[len(prompt.rstrip()) :], head[len(head.rstrip()) :]
            left = ends[1].removeprefix(ends[0]) if ends[1].startswith(ends[0]) else ""
            return left + whole[len(head) :]
        content, opened = written(self.messages[index].get("content")), prompt[len(head) :]
        if prompt.startswith(head) and opened.strip() and content.startswith(opened):
            return content[len(opened) :] + tail
        return None

    def _words_closed(self, index: int, prompt: str, whole: str) -> str | None:
        """The words after a prompt that opens and closes an empty thought, which the template
        does not write before the reply: at inference the model begins after it. None if they begin
        with a thought of their own."""
        head, _ = self._around(index, {"role": "assistant"})
        opened = prompt[len(head) :].strip()
        if not head or not prompt.startswith(head) or not whole.startswith(head):
            return None
        opening, closing = self._thought_signs(index, head, opened)
        words = whole[len(head) :]
        if not closing or not opened.endswith(closing):
            return None
        return None if opening and words.lstrip().startswith(opening) else words

    def _thought_signs(self, index: int, head: str, opened: str) -> tuple[str, str]:
        """What the template writes before and after a thought that follows `head`; where it writes
        none, the tags at both ends of `opened`. "" for both where `opened` ends no thought."""
        if any(opened.endswith(ending.stop) for ending in self.dialect.endings):
            return "", ""
        reply = {"role": "assistant", "reasoning_content": THOUGHT, "thinking": THOUGHT}
        before, _ = self._around(index, reply)
        opening, found, closing = before.rpartition(THOUGHT)
        if found and closing.strip():
            return opening.removeprefix(head).strip(), closing.strip()
        first, last = FIRST_TAG.match(opened), LAST_TAG.search(opened)
        if not first or not last:
            return "", ""
        alone = first.group() == last.group()
        return first.group().replace("/", "", 1) if alone else first.group(), last.group()

    def _around(self, index: int, message: Message) -> tuple[str, str]:
        """What the template writes before and after the content of `message`, in the place of
        message `index`; "" for both if it does not write the content exactly once."""
        [content] = self.form.shape([{"role": "assistant", "content": STAND_IN}])
        trial = self._render([*self.messages[:index], {**message, "content": content["content"]}])
        if trial.count(STAND_IN) != 1:
            return "", ""
        head, _, tail = trial.partition(STAND_IN)
        return head, tail

    def _with_ending(self, index: int, prompt: str, whole: str, composed: bool = False) -> Turn:
        found = self.dialect.ending_of(whole, len(prompt), "tool_calls" in self.messages[index])
        if not found:
            self._check_said(index, whole[len(prompt) :])
            raise self._no_stop(index, whole[len(prompt) :])
        end, ending = found
        said = whole[: end - len(ending.close)] + ending.close
        words = said[len(prompt) :]
        if words.find(ending.stop) + len(ending.stop) != len(words):
            raise self.refused(
                "stops_inside",
                f"the template writes {ending.stop} within this reply, where the model would stop; "
                "make one message of each part",
                index,
            )
        self._check_said(index, words)
        return Turn(index, prompt, whole, said, ending, composed)

    def _check_said(self, index: int, words: str) -> None:
        """Refuse if the template leaves out what the model said: it would be lost silently."""
        message = self.messages[index]
        for key in ("content", "reasoning_content"):
            text = written(message.get(key))
            # What the generation prompt opens for the model (`<think>`) may stand in the data, too.
            if not stands_in(words, text) and not stands_in(
                self._generation_prompt(index) + words, text
            ):
                raise self._dropped(f"this message's {key} as it stands", index)
        if "reasoning_content" not in message and "tool_calls" not in message:
            return  # there is nothing else that its words could belong to
        trial, marks = self._marked(index)
        missing = [mark for mark in marks if mark not in trial]
        # A template may know some names, say, and write no other: then all the rest changes.
        lost = [m for m in missing if self._is_lost(index, m)]
        if lost:
            calls = [mark for mark, what in marks.items() if "the call of" in what]
            none = ", as it writes no tool calls" if lost == calls else ""
            raise self._dropped(marks[lost[0]] + none, index)

    def _is_lost(self, index: int, mark: str) -> bool:
        single, _ = self._marked(index, mark)
        return mark not in single and single == self.render(index + 1)

    def _marked(self, index: int, only: str = "") -> tuple[str, dict[str, str]]:
        """The rendering up to message `index`, marked, or "" if it is refused; and its marks."""
        message, marks = marked(self.messages[index], only)
        with suppress(TemplateError):
            return self._render([*self.messages[:index], message]), marks
        return "", marks

    def _dropped(self, what: str, index: int) -> Refused:
        reason = f"the template does not write {what}"
        return self.refused("dropped", reason, index, ["remove it from the data", ANOTHER])

    def _generation_prompt(self, index: int) -> str:
        """What the prompt of message `index` adds to the messages before it."""
        prompt = self.render(index, prompt=True)
        try:
            before = self.render(index)
        except TemplateError:
            return ""
        return prompt[len(beginning_of(prompt, before)) :]

    def prompt_of(self, index: int) -> Turn | None:
        """The turn `index` if it has a faithful rendering, else None."""
        try:
            return self._turn(index)
        except Refused:
            return None

    def refused(
        self, kind: str, reason: str, index: int | None = None, ways: Sequence[str] = ()
    ) -> Refused:
        """The refusal of this conversation, or of message `index` of it; `ways` lead out of it."""
        conversation = self.conversation
        at = conversation.at.where
        if index is not None:
            at += f": message {index + 1} ({conversation.messages[index]['role']})"
        number = None if index is None else index + 1
        reason = "; ".join([reason, ", or ".join(ways)] if ways else [reason])
        for character, string in self.hidden.items():  # in quoted texts, too
            reason = reason.replace(character, string).replace(ascii(character)[1:-1], string)
        return Refused(
            Refusal(kind, f"{at}: {reason}", conversation.at.source, conversation.at.line, number)
        )

    def _no_stop(self, index: int, tail: str) -> Refused:
        return self.refused(
            "no_stop",
            f"the reply is rendered as {_end_of(tail)}, where no token that ends a reply stands: "
            "the model could never learn to stop",
            index,
            [
                "add the id of the token that ends it to eos_token_id in generation_config.json",
                "take a tokenizer that has the template's end token",
                "take --chat_template plain",
            ],
        )

    def _no_prefix(self, index: int, prompt: str, whole: str) -> Refused:
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
            min(len(prompt), len(whole)),
        )
        return self.refused(
            "not_a_prefix",
            f"the prompt at inference ends with {_end_of(prompt)}, but the reply is rendered with "
            f"{whole[max(0, at - 20) : at + 20]!r} there: the model would never see what it is "
            "trained on",
            index,
            [*self._fitting_data(index, prompt), ANOTHER],
        )

    def _fitting_data(self, index: int, prompt: str) -> list[str]:
        """What the data could hold to fit a prompt that opens something, tried out."""
        message = self.messages[index]
        try:
            thoughtful = {**message, "reasoning_content": STAND_IN, "thinking": STAND_IN}
            if self._render([*self.messages[:index], thoughtful]).startswith(prompt):
                return ["give the reply a reasoning_content"]
            if "tool_calls" in message:
                return []
            head, _ = self._around(index, message)
        except TemplateError:
            return []
        opened = prompt.removeprefix(head)
        held = any(token in opened for token in self.chat.control)
        if not head or opened == prompt or not opened.strip() or held:
            return []
        if opened.strip().endswith(self._thought_signs(index, head, opened.strip())[1] or "\n"):
            return []  # a thought that is ended already
        return [f"give it a content that begins with {opened!r}, as the model's own words do"]


def _end_of(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else "…" + text[-limit:])
