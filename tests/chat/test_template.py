"""Rendering: as transformers renders, and within bounds."""

import pickle
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.chat import suite
from whet.chat.dialect import Form
from whet.chat.template import ChatTemplate, TemplateError
from whet.errors import UserError

TALK = [suite.user("Hi"), suite.said("Hello")]


def compare(file: Path, conversations: list[Any]) -> None:
    """Text for text, refusal for refusal, with and without generation prompt."""
    source = file.read_text(encoding="utf-8")
    template = ChatTemplate(source, file.name)
    for name, messages, tools in conversations:
        read = [{k: v for k, v in m.items() if v is not None} for m in messages]
        for prompt in (False, True):
            named = {"add_generation_prompt": prompt, "bos_token": "<s>", "eos_token": "</s>"}
            theirs = their_text(read, tools, source, named)
            assert my_text(template, read, tools, named) == theirs, (file.name, name)


def their_text(read: list, tools: Any, source: str, named: dict[str, Any]) -> str | None:
    try:
        return render_jinja_template([read], tools, chat_template=source, **named)[0][0]
    except Exception:
        return None


def my_text(template: ChatTemplate, read: list, tools: Any, named: dict[str, Any]) -> str | None:
    try:
        return template.render(Form().shape(read), tools=tools, **named)
    except TemplateError:
        return None


def test_real_templates_render_as_in_transformers(shared_data: Path) -> None:
    """A fifth of them: the other tests render all of them through transformers, too."""
    for file in sorted((shared_data / "chat_templates").glob("*.jinja"))[::5]:
        compare(file, list(suite.everything()))


@pytest.mark.slow
def test_every_real_template_and_every_conversation(shared_data: Path) -> None:
    for file in sorted((shared_data / "chat_templates").glob("*.jinja")):
        compare(file, list(suite.everything()))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loops"),
        ("{% for a in x(1) %}{% endfor %}", "undefined"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(60) }}",
            "loops",
        ),
        (
            "{% set n = namespace(s='ab') %}{% for i in range(60) %}"
            "{% set n.s = n.s + n.s %}{% endfor %}",
            "builds",
        ),
        (
            "{% set n = namespace(s='ab') %}{% for i in range(60) %}"
            "{% set n.s = n.s ~ n.s %}{% endfor %}",
            "builds",
        ),
        (
            "{% set n = namespace(s=[1]) %}{% for i in range(60) %}"
            "{% set n.s = n.s + n.s %}{% endfor %}",
            "builds",
        ),
        ("{{ 'a' * 10000000000 }}", "builds"),
        ("{{ 10000000000 * 'a' }}", "builds"),
        ("{{ 9 ** 9 ** 9 }}", "computes"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}", "without end"),
        ("{{ raise_exception('No system role, please') }}", "No system role, please"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[9].content.x }}", "no element"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_bad_templates_end_in_an_error(source: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        ChatTemplate(source).render(TALK)


def test_syntax_error_names_the_line() -> None:
    with pytest.raises(UserError, match=r"my\.jinja: line 2"):
        ChatTemplate("a\n{% if %}", "my.jinja")


def test_helpers() -> None:
    source = (
        "{{ strftime_now('%Y-%m-%d') }} {{ {'a': '<é>'} | tojson }} "
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ dict(a=1).a }}{{ extra }}"
    )
    rendered = ChatTemplate(source).render(TALK, today=date(2024, 2, 29), extra="!")
    assert rendered == '2024-02-29 {"a": "<é>"} Hello1!'


def test_variables_and_constants_are_read_from_the_source() -> None:
    template = ChatTemplate(
        "{% if mode == 'chat' or think in ['a', 'b'] %}{{ messages }}{% endif %}"
    )
    assert template.variables == {"mode", "think", "messages"}
    assert template.compared["mode"] == {"chat"}


def test_template_pickles() -> None:
    template = pickle.loads(pickle.dumps(ChatTemplate("{{ messages[0].content }}")))
    assert template.render(TALK) == "Hi"
