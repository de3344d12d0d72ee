"""Rendering: as transformers renders, and in a process that may be killed."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.chat import suite
from tests.rendering import render
from whet.chat import template as rendering
from whet.chat.chat import find_template
from whet.chat.conversation import read_conversation
from whet.chat.encode import EncodeOptions, encode_chat, encode_many
from whet.chat.form import Form
from whet.chat.template import BoundsError, ChatTemplate, TemplateError, read_variables
from whet.errors import UserError

TALK = [suite.user("Hi"), suite.said("Hello")]
ODD_NAMES = ["today", "tools", "documents", "messages", "add_generation_prompt", "self", "loop"]
ODD_NAMES += ["switch", "prompt", "variables", "template", "source", "caller", "kwargs"]
ODD_NAMES += ["eos_token"]


def compare(file: Path, conversations: list[Any]) -> None:
    """Text for text, refusal for refusal, with and without generation prompt."""
    source = file.read_text(encoding="utf-8")
    template = ChatTemplate(source, file.name)
    for name, messages, tools in conversations:
        read = [{k: v for k, v in m.items() if v is not None} for m in messages]
        for prompt in (False, True):
            named = {"bos_token": "<s>", "eos_token": "</s>"}
            theirs = their_text(read, tools, source, prompt, named)
            assert my_text(template, read, tools, prompt, named) == theirs, (file.name, name)


def their_text(
    read: list, tools: Any, source: str, prompt: bool, named: dict[str, Any]
) -> str | None:
    try:
        named = {"add_generation_prompt": prompt, **named}
        return render_jinja_template([read], tools, chat_template=source, **named)[0][0]
    except Exception:
        return None


def my_text(
    template: ChatTemplate, read: list, tools: Any, prompt: bool, named: dict[str, Any]
) -> str | None:
    try:
        shaped = Form().shape(read)
        return render(template, shaped, tools=tools, add_generation_prompt=prompt, variables=named)
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
        ("{% for a in x(1) %}{% endfor %}", "undefined"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
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
        render(ChatTemplate(source), TALK)


@pytest.mark.parametrize("ask", [lambda t: render(t, TALK), lambda t: t.variables])
def test_syntax_error_names_the_line(ask: Callable[[ChatTemplate], Any]) -> None:
    template = ChatTemplate("a\n{% if %}", "my.jinja")
    for _ in range(2):
        with pytest.raises(UserError, match=r"my\.jinja: line 2") as caught:
            ask(template)
        assert not isinstance(caught.value, TemplateError), "no conversation is at fault"


def test_helpers() -> None:
    source = (
        "{{ strftime_now('%Y-%m-%d') }} {{ {'a': '<é>'} | tojson }} "
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ dict(a=1).a }}{{ extra }}"
    )
    rendered = render(ChatTemplate(source), TALK, today=date(2024, 2, 29), variables={"extra": "!"})
    assert rendered == '2024-02-29 {"a": "<é>"} Hello1!'


def test_variables_and_constants_are_read_from_the_source() -> None:
    template = ChatTemplate(
        "{% if mode == 'chat' or think in ['a', 'b'] %}{{ messages }}{% endif %}"
    )
    assert template.variables == {"mode", "think", "messages"}
    assert template.compared["mode"] == {"chat"}


def test_template_pickles() -> None:
    template = pickle.loads(pickle.dumps(ChatTemplate("{{ messages[0].content }}")))
    assert render(template, TALK) == "Hi"


@pytest.mark.parametrize("name", ["today", "loop", "name", "source", "seconds", "conversation"])
def test_a_variable_may_be_called_anything(name: str) -> None:
    """What the caller's own arguments are called is nobody's concern."""
    template = ChatTemplate(f"{{{{ {name} }}}} {{{{ strftime_now('%Y') }}}}")
    rendered = render(template, TALK, today=date(2024, 2, 29), variables={name: "mine"})
    assert rendered == "mine 2024"


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "self", "strftime_now"]
)
def test_a_variable_that_would_replace_something_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} can't be set"):
        render(ChatTemplate("x"), TALK, variables={name: 1})
    with pytest.raises(UserError, match=f"--template_kwargs: {name} can't be set"):
        read_variables(f'{{"{name}": 1}}')


@pytest.mark.parametrize(
    "name",
    [
        "today",
        "tools",
        "documents",
        "messages",
        "add_generation_prompt",
        "self",
        "loop",
        "switch",
        "prompt",
        "variables",
        "template",
        "source",
        "caller",
        "kwargs",
        "eos_token",
    ],
)
def test_a_template_may_read_a_variable_of_any_name(shared_data: Path, name: str) -> None:
    """Such a conversation is encoded, with the variable as it is and set in the template."""
    chatml = find_template("chatml").source
    base = suite.base(shared_data / "tokenizers" / "minimind")
    for before in (f"{{% if {name} is string %}}?{{% endif %}}", f"{{% set {name} = {name} %}}"):
        chat = suite.with_template(base, before + chatml)
        expected = list(encode_chat(TALK, suite.with_template(base, chatml)).ids)
        if name != "eos_token" or "set" in before:
            assert list(encode_chat(TALK, chat).ids) == expected
        assert encode_many([read_conversation(TALK)], chat, EncodeOptions())


def test_objects_that_json_does_not_know_are_named_by_their_type_as_in_transformers() -> None:
    source = "{{ messages[0].content }}"
    for value in (date(2024, 2, 29), Decimal(1), np.float64(1.5), np.bool_(False), (1, [None])):
        talk = [{"role": "user", "content": value}]
        theirs = their_text(talk, None, source, False, {})
        assert render(ChatTemplate(source), talk) == theirs


@pytest.mark.parametrize(
    "source",
    [
        "{{ namespace(__class__=dict) }}",
        "{% set n = namespace(a=1) %}{% set n._a = 2 %}{{ n.a }}",
        "{% set n = namespace({'a': 1}, b=2, self=3) %}{% set n.a = 4 %}{{ n.a }}{{ n.self }}",
        "{{ strftime_now.__self__ }}{{ raise_exception.__globals__ }}",
        "{{ [1, 'é', none]|tojson(indent=2) }}{{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }}",
        "{{ dict.fromkeys('ab', 1) }}{{ 9 ** 9 ** 9 }}{{ 10 ** 50 // 7 }}",
        "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
        "{% generation %}{% set x = 1 %}{% endgeneration %}{{ x }}",
    ],
)
def test_the_sandbox_is_that_of_transformers(source: str) -> None:
    theirs = their_text(TALK, None, source, False, {})
    assert my_text(ChatTemplate(source), TALK, None, False, {}) == theirs


def renderer_id() -> int:
    process = rendering._renderer(os.getpid())._process
    assert process
    return process.pid


def test_a_killed_renderer_is_replaced() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    before = renderer_id()
    os.kill(before, signal.SIGKILL)
    while ") Z " not in Path(f"/proc/{before}/stat").read_text():  # nobody's rendering is lost
        time.sleep(0.01)
    assert render(template, TALK) == "Hi"
    assert renderer_id() != before


def test_a_rendering_whose_process_is_killed_is_refused_in_a_line() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}")
    threading.Timer(0.2, os.kill, (renderer_id(), signal.SIGKILL)).start()
    with pytest.raises(BoundsError, match="signal 9"):
        render(template, TALK)


def test_ctrl_c_leaves_no_reply_for_the_next() -> None:
    template = ChatTemplate("{% for i in range(300) %}{{ range(9999)|sum }}{% endfor %}")

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(KeyboardInterrupt):
            render(template, TALK)
    finally:
        signal.signal(signal.SIGALRM, earlier)
    assert render(ChatTemplate("{{ messages[0].content }}"), TALK) == "Hi"


def test_threads_and_forked_processes_get_their_own_text() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    texts: list[str] = []

    def ask(number: int) -> None:
        for i in range(50):
            talk = [{"role": "user", "content": f"{number}-{i}"}]
            if render(template, talk) != f"{number}-{i}":
                texts.append("another's")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=lambda n: (ask(n), os._exit(len(texts))), args=(9,))]
    for one in (*children, *threads):
        one.start()
    for one in (*threads, *children):
        one.join()
    assert not texts
    assert children[0].exitcode == 0


def test_the_renderer_ends_with_its_owner(tmp_path: Path) -> None:
    """Be it killed or not."""
    code = (
        "import os, sys; from tests.rendering import render; from whet.chat import template as t;"
        "render(t.ChatTemplate('x'), []);"
        "print(t._renderer(os.getpid())._process.pid, flush=True);"
        "os.kill(os.getpid(), 9) if sys.argv[1] else None"
    )
    for killed in ("", "killed"):
        ended = subprocess.run(
            [sys.executable, "-c", code, killed], capture_output=True, text=True, check=False
        )
        renderer = Path("/proc") / ended.stdout.strip()
        until = time.monotonic() + 20
        while renderer.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not renderer.exists()
        assert not ended.stderr
