"""Long conversations: beginnings are cut out of one rendering, where that is shown to be right."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chat import suite
from tests.chat.suite import said, system, user
from tests.chat.test_templates import templates
from tests.rendering import render
from whet.chat.chat import Chat, load_tokenizer
from whet.chat.encode import encode_chat
from whet.chat.template import Ask, ChatTemplate, TemplateError

TALK = [system("Be brief."), *([user(" a\n"), said("b "), user("c"), said("d")] * 4)]
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
EACH = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ASK = "{% if add_generation_prompt %}assistant: {% endif %}"


def seen(template: ChatTemplate, messages: list[dict[str, Any]]) -> bool:
    """Whether marks are given; each beginning that they show is the true rendering of it."""
    for prompt in (False, True):
        how: dict[str, Any] = {"add_generation_prompt": prompt, "variables": NAMED}
        ask: Ask = ("marks", messages, None, None, prompt)
        marks = json.loads(template.answer(ask, None, NAMED))
        if not marks:
            return False
        assert len(marks) == len(messages) + 1
        text = render(template, messages, **how)
        for k in range(2, len(messages) + 1):
            assert text[: marks[k]] + text[marks[-1] :] == render(template, messages[:k], **how)
    return True


@pytest.mark.parametrize(
    "source",
    [
        EACH + ASK,
        "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ m.content }}{% endfor %}" + ASK,
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
        "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{{ m.content }}{% endfor %}" + ASK,
        "{% for m in messages %}{{ loop.previtem.role if loop.previtem }}{{ m.content }}"
        "{% endfor %}" + ASK,
        "{% macro say(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) }}"
        "{% endfor %}{{ messages[0].role }}" + ASK,
    ],
)
def test_beginnings_of_what_goes_from_message_to_message_are_shown(source: str) -> None:
    assert seen(ChatTemplate(source), TALK)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}, {% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ loop.nextitem.role }}{% endfor %}",
        "{% for m in messages %}{{ loop['la' ~ 'st'] }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% set l = loop %}{{ l|attr('la' ~ 'st') }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ loop.revindex }}{% endfor %}",
        "{{ messages|length }}" + EACH,
        "{{ messages|count }}" + EACH,
        EACH + "{{ messages[-1].role }}",
        EACH + "{{ messages|map(attribute='role')|join }}",
        "{{ messages|tojson }}" + EACH,
        "{{ messages }}" + EACH,
        EACH + EACH,
        "{% set t %}" + EACH + "{% endset %}{{ t|trim }}",
        "{% filter upper %}" + EACH + "{% endfilter %}",
        "{% macro all(x) %}{% for m in x %}{{ m.content }}{% endfor %}{% endmacro %}"
        "{{ all(messages) }}",
        "{% set n = namespace(x='') %}{% for m in messages %}{{ m.content }}{% set n.x = m.role %}"
        "{% endfor %}{{ n.x }}",
        "{% set c = cycler('a', 'b') %}{% for m in messages %}{{ m.content }}{{ c.next() }}"
        "{% endfor %}{{ c.current }}",
        "{% for m in messages %}{% if m.content == 'd' %}{% break %}{% endif %}{{ m.content }}"
        "{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages|reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages[:3] %}{{ m.content }}{% endfor %}",
        "{{ 'x' if add_generation_prompt }}{{ messages is sequence }}" + EACH,
    ],
)
def test_what_may_look_ahead_is_rendered_for_each_beginning(source: str) -> None:
    assert not seen(ChatTemplate(source + ASK), TALK)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_real_templates(shared_data: Path, every: int) -> None:
    shown = 0
    for path in templates(shared_data)[::every]:
        template = ChatTemplate(path.read_text(encoding="utf-8"))
        for messages in (TALK, TALK[1:]):
            try:
                shown += seen(template, messages)
            except TemplateError:
                continue
    assert shown > 30 / every


@pytest.fixture(scope="module")
def chatml(shared_data: Path) -> Chat:
    return load_tokenizer(shared_data / "tokenizers/minimind", "chatml")


def test_the_examples_are_the_same(chatml: Chat) -> None:
    """As with a template that does the same but looks ahead."""
    other = suite.with_template(chatml, chatml.template.source)
    looking = suite.with_template(chatml, chatml.template.source + "{{ '' if messages|length }}")
    for talk in (TALK, [*TALK, user("q")], [said("a"), *TALK[1:]]):
        one, two = (encode_chat(talk, chat).examples for chat in (other, looking))
        assert [e.ids.tolist() for e in one] == [e.ids.tolist() for e in two]
        assert [e.loss_mask.tolist() for e in one] == [e.loss_mask.tolist() for e in two]


def test_time_grows_with_the_turns(chatml: Chat) -> None:
    """Rendering each beginning for itself took 100 times as long for 10 times the turns."""
    seconds = []
    for n in (100, 1000):
        talk = [user("How are you?"), said("Fine, thank you.")] * (n // 2)
        tries = []
        for _ in range(4):
            started = time.monotonic()
            encode_chat(talk, chatml)
            tries.append(time.monotonic() - started)
        seconds.append(min(tries))
    assert seconds[1] < 40 * seconds[0]
