"""The template renderer: whatever a stranger's template does, it ends, and within bounds."""

import time
from pathlib import Path

import pytest
from hypothesis import strategies as st

import whet.chat
from tests.fuzz.harness import counts, damaged, fuzz
from tests.rendering import render
from whet.chat import renderer, template
from whet.chat.template import ChatTemplate
from whet.errors import UserError

TALK = [{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": "three"}]
SECONDS = 60  # for one template; a few on a quiet machine

DOUBLED = "{%% set ns = namespace(a='xxxx') %%}{%% for i in range(99) %%}%s{%% endfor %%}"
BACKSLASHES = "{%% set ns = namespace(a='\\\\') %%}{%% for i in range(99) %%}%s{%% endfor %%}"
KEPT = "{%% set x = 'ab ' * 6000000 %%}{%% set ns = namespace(a=1) %%}{%% for i in range(99) %%}"
KEPT += "{%% set ns.a = dict(a=%s, b=ns.a) %%}{%% endfor %%}"
MANY = "(['b' * 20000000] * 1000)"
LONG = "{% set x = 'b' * 20000000 %}"
NESTED = "{%% set ns = namespace(a=[1]) %%}{%% for i in range(99) %%}%s{%% endfor %%}{{ ns.a%s }}"
BOMBS = [
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ 'x'.zfill(1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ (1).to_bytes(1000000000, 'big')|length }}",
    "{{ 'a\n'|indent(1000000000, true) }}",
    "{{ 'a\n'|indent(width=1000000000, first=true) }}",
    "{{ ('a\n' * 9999)|indent('x' * 9999) }}",
    "{{ ('a' * 1000000)|replace('a', 'b' * 10000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 10000) }}",
    "{{ ('a' * 1000000).translate({97: 'x' * 10000}) }}",
    "{{ ('a' * 100000).join(['b'] * 100000) }}",
    "{{ (['b' * 1000000] * 100000)|join }}",
    "{{ range(100000)|join('a' * 100000) }}",
    "{{ range(100000)|map('center', 25000000)|join }}",
    "{{ range(100000)|map('center', 25000000)|list|length }}",
    "{{ ('a' * 10000)|wordwrap(1, true, 'x' * 1000000) }}",
    "{{ [1]|slice(100000000)|list }}",
    "{{ [1]|batch(1000000000, 0)|list }}",
    "{{ [1]|tojson(indent=1000000000) }}",
    "{{ 1.5|round(1000000000, 'ceil') }}",
    "{{ lipsum(n=1000000) }}",
    "{{ 'a' * 10000000000 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set a = 'a' * 25000000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "{% set a = 'a' * 25000000 %}{% set b %}{% for i in range(999) %}{{ a }}{% endfor %}"
    "{% endset %}",
    "{% set n = namespace(a=[]) %}{% for i in range(999) %}"
    "{% set n.a = n.a + ['a' * (25000000 + i)] %}{% endfor %}",
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLED % "{% set ns.a = f(ns.a) %}",
    DOUBLED % "{% set ns.a = ns.a ~ ns.a %}",
    DOUBLED % "{% set ns.a = ns.a + ns.a %}",
    DOUBLED % "{% set ns.a = [ns.a, ns.a]|join %}",
    DOUBLED % "{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}",
    NESTED % ("{% set ns.a = [ns.a, ns.a] %}", ""),
    NESTED % ("{% set ns.a = (ns.a, ns.a) %}", "|tojson"),
    NESTED % ("{% set ns.a = {'a': ns.a, 'b': ns.a} %}", "|string"),
    DOUBLED % "{% set ns.a = '%s%s' % (ns.a, ns.a) %}",
    DOUBLED % "{% set ns.a = '{0}{0}'.format(ns.a) %}",
    BACKSLASHES % "{% set ns.a = [ns.a]|string %}",
    BACKSLASHES % "{% set ns.a = ns.a|pprint %}",
    BACKSLASHES % "{% set ns.a = '%r' % ns.a %}",
    *("{{ " + told + " }}" for told in (MANY, MANY + "|string", MANY + "|upper", MANY + "|pprint")),
    *("{{ " + told + " }}" for told in (MANY + "|tojson", MANY + "|center(3)", MANY + " ~ 1")),
    *("{{ " + told + " }}" for told in ("'%s' % " + MANY, "'{}'.format(" + MANY + ")")),
    "{{ " + MANY + "|map('upper')|list|length }}",
    "{% autoescape true %}{{ " + MANY + " ~ 'a' }}{% endautoescape %}",
    "{{ ('{0}' * 9999).format('b' * 20000000) }}",
    "{{ ('%(a)s' * 9999) % {'a': 'b' * 20000000} }}",
    *(KEPT % made for made in ("x.upper()", "x[1:]", "x|upper", "x.split()")),
    LONG + "{% set y = x" + " + x" * 999 + " %}",
    LONG + "{{ x" + " + x" * 999 + " }}",
    LONG + "{{ x" + " ~ x" * 999 + " }}",
    LONG + "{% for i in range(99999) %}{% if x.count('c') %}{% endif %}{% endfor %}",
    LONG + "{% for i in range(99999) %}{% if 'c' in x %}{% endif %}{% endfor %}",
    "{% set l = range(99999)|list %}{% for i in l %}{{ 'x' in l }}{% endfor %}",
    "{% set l = range(99999)|list %}{% for i in l %}{{ l|sort|sum }}{% endfor %}",
    (DOUBLED % "{% set ns.a = ns.a * ns.a %}").replace("'xxxx'", "10"),
    "{{ ('1' * 25000000)|int(0, 16) // ('1' * 9999999)|int(0, 16) }}",
    "{{ (1).from_bytes(('a' * 25000000).encode(), 'big') // 3 }}",
    "{{ strftime_now('%9999999999d' ~ 'x' * 20000000) }}",
    "{{ strftime_now('%c' * 10000000) }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "-" * 100_000 + "1 }}",
    "{{ " + "9" * 5000 + " }}",
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% include 'x' %}",
    "{% extends messages %}",
    "{% import 'os' as x %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    LONG + "{{ ([x] * 1000)|select|join }}",
    LONG + "{{ ''.join(([x] * 1000)|map('upper'))|length }}",
    LONG + "{{ ([x, x ~ 'a'] * 10000)|sort|length }}",
    LONG + "{{ ([{'a': x}] * 10000)|groupby('a')|length }}",
    LONG + "{{ (x ~ 'c') in [x ~ 'd'] * 1000000 }}",
    LONG + "{{ ([x ~ 'd'] * 1000000).count(x ~ 'c') }}",
    LONG + "{{ ([x ~ 'd', x ~ 'e'] * 1000000)|unique|list|length }}",
    LONG + "{{ ([x ~ 'd', x ~ 'e'] * 1000000)|min|length }}",
    LONG + "{{ x|sort|length }}",
    LONG + "{{ x|unique|list|length }}",
    LONG + "{{ x|wordwrap(1)|length }}",
    "{% for i in range(99999) %}{% set y = '%9999d' % i %}{{ y }}{% endfor %}",
    "{{ ('a ' * 20000000)|urlize|length }}",
    "{{ ('(' * 5000000)|urlize(9)|length }}",
    "{{ ('<a>' * 10000000)|striptags|length }}",
    "{{ ('a,' * 50000000).split(',')|length }}",
    "{{ ('a' * 10000000).translate({97: 'x' * 1000}) }}",
    "{{ ('\\u1234' * 20000000)|urlencode|length }}",
    "{{ {'a': '<' * 30000000}|xmlattr|length }}",
    "{{ dict.fromkeys(range(99999)|map('center', 100000)|list) }}",
    "{% for i in range(99999) if range(99999)|sum > 9999999999999 %}{% endfor %}",
    "{{ (10 ** 4000) ** 40000 }}",
    "{{ 10 ** (10 ** 8) }}",
    "{{ x" + "[0]" * 50000 + " }}",
    "{{ messages" + ".a" * 5000 + " }}",
    "{{ " + "+".join(["1"] * 100000) + " }}",
    "{% set " + "a, " * 100000 + "b = 1 %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    NESTED % ("{% for j in range(99999) %}{% set ns.a = [ns.a] %}{% endfor %}", ""),
    "{% filter center(10000000) %}x{% endfilter %}" * 100,
    "{{ 'x'|_count(-1000000) }}",
    "{{ namespace(__class__=dict) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = dict %}",
    "{{ raise_exception('\\ud800\\x1b' * 10000000) }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "a" * 40000000,
]


def rendered(source: str) -> str:
    return render(ChatTemplate(source), TALK, add_generation_prompt=True)


@pytest.fixture
def narrow(monkeypatch):
    """Bounds that are reached sooner, of a renderer of this test's own."""
    monkeypatch.setattr(template, "SECONDS", 0.3)
    monkeypatch.setattr(template, "MEMORY", 200_000_000)
    template._renderer.cache_clear()
    yield
    template._renderer.cache_clear()


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(bomb, id=str(i), marks=[pytest.mark.slow] if i % 4 else [])
        for i, bomb in enumerate(BOMBS)
    ],
)
def test_bombs_are_refused(narrow, source):
    started = time.process_time()
    with pytest.raises(UserError) as refusal:
        rendered(source)
    message = str(refusal.value)
    assert message.isprintable()
    assert len(message) < 1100
    assert time.process_time() - started < 1, "the process that asks has little to do"
    assert render(ChatTemplate("{{ messages[0].role }}"), TALK) == "user"


OUTPUTS = [
    "{{ m.content }}",
    "{{ messages }}",
    "{% set x = messages[0].content %}",
    "{% set x = x ~ x %}",
    "{% set x = [x, x] %}",
    "{% set ns = namespace(x=[1]) %}",
    "{% set ns.x = ns.x + ns.x %}",
    "{% set ns.x = [ns.x, ns.x] %}",
    "{{ ns.x|tojson(indent=2) }}",
    "{{ x|replace('o', x)|trim }}",
    "{{ x.split('o')|join(x) }}",
    "{{ (x * 99)|center(999) }}",
    "{{ '%s' % x }}",
    "{{ '{}'.format(x) }}",
    "{{ f(x) }}",
    "{{ f(f(x)) }}",
    "{% break %}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ dict(a=x)|items|list }}",
    "{{ x[::-1][:3] }}",
    "{{ 1 // 0 }}",
    "{% endfor %}",
    "text",
]
BLOCKS = [
    ("{% for m in messages %}", "{% endfor %}"),
    ("{% for i in range(9) %}", "{% endfor %}"),
    ("{% for i in range(60) %}", "{% endfor %}"),
    ("{% if m.role == 'user' %}", "{% else %}no{% endif %}"),
    ("{% set x %}", "{% endset %}"),
    ("{% macro f(a) %}", "{{ a }}{{ a }}{% endmacro %}"),
    ("{% generation %}", "{% endgeneration %}"),
    ("{%- filter upper -%}", "{% endfilter %}"),
    ("{% call f(x) %}", "{% endcall %}"),
]
SOURCES = st.recursive(
    st.sampled_from(OUTPUTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.tuples(st.sampled_from(BLOCKS), inner).map(lambda t: t[0][0] + t[1] + t[0][1]),
    ),
    max_leaves=10,
)


@counts(120, 10_000)
def test_made_of_fragments(count):
    slowest = longest = 0.0

    def read(source: str) -> None:
        nonlocal slowest, longest
        started = time.process_time()
        try:
            longest = max(longest, len(rendered(source)))
        finally:
            slowest = max(slowest, time.process_time() - started)

    tally = fuzz("templates", SOURCES, read, count)
    print(f"slowest {slowest:.1f} s, longest {longest:,.0f} characters")
    assert slowest < SECONDS
    assert longest <= renderer.LENGTH
    assert min(tally["read"], tally["refused"]) > count // 20


@pytest.mark.parametrize("name", ["chatml", "plain"])
@counts(150, 10_000)
def test_damaged(count, name):
    whole = Path(whet.chat.__file__).with_name(f"{name}.jinja").read_bytes()

    def read(content: bytes) -> None:
        rendered(content.decode("utf-8", "replace"))

    tally = fuzz(f"damaged {name}", damaged(whole), read, count)
    assert min(tally["read"], tally["refused"]) > 0


@pytest.mark.parametrize(
    "source",
    ["{% for i in range(99999) %}a{% endfor %}", "{{ 'a' * 10000000 }}"],
    ids=["time", "memory"],
)
def test_one_rendering_does_not_spend_the_next_ones_means(narrow, source):
    template = ChatTemplate(source)
    for _ in range(30):
        render(template, TALK)


@pytest.mark.parametrize("made", ["x.upper()", "x|upper", "x[1:]", "'%s.' % x", "x ~ 'a'", "x + x"])
def test_every_text_counts(narrow, made):
    """By the memory it takes: 99 texts of 3 million characters are too many."""
    kept = f"{{% set ns.a = dict(a={made}, b=ns.a) %}}"
    source = "{% set x = 'ab ' * 1000000 %}" + DOUBLED % kept
    with pytest.raises(UserError, match="memory"):
        rendered(source)


def test_long_conversations_render():
    """5 MB of text, more than a million tokens, in one turn and in many."""
    whole = Path(whet.chat.__file__).with_name("chatml.jinja").read_text()
    for count in (1, 5000):
        talk = [{"role": "user", "content": "word " * (1_000_000 // count)}] * count
        assert len(render(ChatTemplate(whole), talk)) > 5_000_000
