"""A conversation -> texts in which the model's own words are marked, character by character.

Turns share one text as long as each one's rendering is the beginning of that text; where the
template rewrites the past they do not, and get texts of their own (rule 3).
"""

from typing import NamedTuple

from whet.chat.certificate import Certificate
from whet.chat.template import TemplateError
from whet.chat.turns import Mark, Rendered, Turn


class Draft(NamedTuple):
    """One example before it is tokenised. Marks are in order and do not overlap.

    `hidden` maps the private-use characters in `text` to the control strings they stand for.
    """

    text: str
    marks: tuple[Mark, ...]
    hidden: dict[str, str]


def drafts(
    rendered: Rendered, train_on: str, rewritten_turns: str
) -> tuple[list[Draft], Certificate]:
    """The examples that a conversation becomes, in the order of their last turns.

    Raises Refused if a trained turn has no faithful rendering.
    """
    conversation = rendered.conversation
    messages = enumerate(zip(conversation.messages, conversation.weights, strict=True))
    weights = {i: 1.0 if w is None else w for i, (m, w) in messages if m["role"] == "assistant"}
    trained = [index for index, weight in weights.items() if weight]
    if train_on == "last":
        trained = [index for index in trained if index == max(weights)]
    if not trained:
        raise rendered.refused(
            "nothing_trained",
            f"{'the last' if train_on == 'last' else 'every'} assistant message has weight 0; "
            "nothing is to be learnt",
        )
    tried = {  # of turns that are not trained those that can be shown
        index: rendered.turn(index) if index in trained else rendered.prompt_of(index)
        for index in weights
        if index <= trained[-1]
    }
    turns = {index: turn for index, turn in tried.items() if turn}
    remaining = list(trained)
    made: list[Draft] = []
    while remaining:
        last = turns[remaining[-1]]
        text = _text(rendered, last)
        rendered.check_characters(text)
        marks = []
        for index in sorted(turns):
            if index <= last.index and text.startswith(turns[index].said):
                weight = weights[index] if index in remaining else 0.0
                marks.append(turns[index].mark(weight))
        done = [mark.message for mark in marks]
        remaining = [index for index in remaining if index not in done]
        made.append(Draft(text, tuple(marks), rendered.hidden))
        if remaining and rewritten_turns != "split":
            break
    certificate = Certificate(
        escaped=rendered.escapes.count if rendered.escapes else 0,
        closed=any(turns[index].ending.close for index in trained),
        composed=any(turns[index].composed for index in trained),
        rewritten=len(made) > 1 or bool(remaining),
        untrained_turns=tuple([index + 1 for index in remaining]),
        today=str(rendered.dialect.today or ""),
    )
    if remaining and rewritten_turns == "error":
        raise rendered.refused(
            "rewritten",
            "the template changes this turn once more follows, and --rewritten_turns is error; "
            "split makes an example of its own for it",
            remaining[-1],
        )
    return made[::-1], certificate


def prompt_draft(rendered: Rendered, go_on: bool) -> Draft:
    """The text that asks for the next reply, with the earlier replies' borders marked.

    If the last message is the assistant's and the model is to go on with it, nothing closes it.
    """
    messages = rendered.messages
    begun = go_on and messages[-1]["role"] == "assistant"
    count = len(messages) - begun
    try:
        text = rendered.render(count, prompt=True)
    except TemplateError as error:
        raise rendered.refused("template", str(error)) from None
    rendered.check_characters(text)
    rendered.check_escapes(text, count, True)
    marks = []
    for index in range(count):
        if messages[index]["role"] == "assistant":
            turn = rendered.prompt_of(index)
            if turn and text.startswith(turn.said):
                marks.append(turn.mark(0.0))
    if begun:
        start = len(text)
        text = _begun(rendered, count, text)
        rendered.check_characters(text)
        marks.append(Mark(count, start, len(text), "", 0.0))
    return Draft(text, tuple(marks), rendered.hidden)


def _text(rendered: Rendered, last: Turn) -> str:
    """The longest rendering in which `last` stands as the model says it."""
    count = len(rendered.messages)
    if last.composed:
        rendered.check_escapes(last.prompt, last.index, True)
        whole = rendered.render(last.index + 1)
        rendered.check_escapes(whole, last.index + 1, False)
        return last.text
    if last.index + 1 < count:
        try:
            text = rendered.render(count)
        except TemplateError as error:
            raise rendered.refused("template", str(error)) from None
        if text.startswith(last.said):
            rendered.check_escapes(text, count, False)
            return text
    rendered.check_escapes(last.whole, last.index + 1, False)
    return last.text


def _begun(rendered: Rendered, count: int, prompt: str) -> str:
    """The rendering of a last assistant message that is to be continued, cut at its end."""
    message = rendered.messages[count]
    key = "content" if message.get("content") else "reasoning_content"
    begun = message.get(key)
    if not isinstance(begun, str) or "tool_calls" in message:
        raise rendered.refused("template", "only a text can be continued", count)
    mark = "QcontinueQ"
    messages = [*rendered.messages[:count], {**message, key: begun + mark}]
    text = rendered.dialect.render(messages, rendered.tools, rendered.documents, False)
    before, found, _ = text.rpartition(mark)
    if not found or not before.startswith(prompt):
        raise rendered.refused(
            "not_a_prefix", "the template does not write this reply after its prompt", count
        )
    return before
