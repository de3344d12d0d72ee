"""The process in which chat templates are rendered.

A template is a program of a stranger: it may loop for ever or double a text until memory is gone,
and a single call of a C function may take hours, which nothing within a process can interrupt. So
templates are compiled and rendered in a process of their own, with little memory, which the kernel
ends when its processor time is over. `template.py` starts it and asks it.

The oracle is transformers' `apply_chat_template(tokenize=False)`: a sandboxed environment with
trimmed blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that escapes nothing,
and `{% generation %}` blocks.

A request is a pickle of (seconds, source, today, variables, asks): what is asked of one template,
for many conversations perhaps. An ask is (what, messages, tools, documents, prompt), where `what`
is `render`, `marks` (where beginnings of the messages end) or `describe` (what the template reads);
`seconds` bounds each. The reply to each ask is `=` or, for an error, `!`, then the length (8 bytes,
little-endian) and the text or message in UTF-8 (lone surrogates included). At the end of its memory
the process exits with ENOMEM, at the end of its time by SIGPROF, in the middle of its asks perhaps.
"""

import errno
import itertools
import json
import os
import pickle
import re
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import date, datetime
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes
from jinja2.utils import Namespace

LENGTH = 30_000_000  # characters of one rendering
SENT = 1 << 15  # bytes of replies that are sent at once, half of what a pipe holds
SHOWN = 1000  # characters of a message that a template writes
COMPILED = 256  # templates that are kept
# What lets a template know messages to come in its loop, or the loop's messages after it.
LOOKING = re.compile(r"last|nextitem|revindex|length|namespace|cycler|joiner|\bloop\b(?! *\.)")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` renders what it encloses, in a scope of its own.

    The tags say what somebody believed to be the model's words; Whet finds them by itself.
    """

    tags = {"generation"}  # noqa: RUF012 -- jinja's own interface

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    """The `dict` of templates: callable, without the attributes that lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace without names such as `__class__`, which would change Python's own object."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja's: one name may be `self`
        self, *given = args
        Namespace.__init__(self, {})
        for name, value in dict(*given, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace can't hold the name {name!r}")
        super().__setitem__(name, value)


class _Looking(Exception):  # noqa: N818 -- an answer, not an accident
    """A template asks more of the messages than the next one."""


class _Watched:
    """Messages that a template can only go through once, or ask for the first of them.

    `marks[k]` is how much text was written when message k was asked for, or the end after it.
    """

    def __init__(self, messages: list[Any], first: int = 0) -> None:
        self.messages, self.first = messages, first
        self.written = 0
        self.marks: list[int] = []
        self.rest: _Watched | None = None

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        if key == 0 and not self.first:
            return self.messages[0]
        if key != slice(1, None, None) or self.first or self.rest:
            raise _Looking
        self.rest = _Watched(self.messages, 1)
        return self.rest

    def __iter__(self) -> Iterator[Any]:
        if self.marks:
            raise _Looking
        self.marks = [0] * self.first
        for message in self.messages[self.first :]:
            self.marks.append(self.written)
            yield message
        self.marks.append(self.written)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Templates:
    """The environment that all templates share, and the date of the rendering under way."""

    def __init__(self) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals.pop("lipsum", None)  # random words
        environment.globals |= {
            "dict": _Dict(),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
        }
        self.environment = environment
        self.today = ""
        self.compiled = lru_cache(COMPILED)(self._compile)

    def _strftime_now(self, form: str) -> str:
        now = datetime.now()
        if self.today:
            now = datetime.combine(date.fromisoformat(self.today), datetime.min.time())
        return now.strftime(form)

    def _compile(self, source: str) -> jinja2.Template:
        template = self.environment.from_string(source)
        # A plain dict: each rendering copies it, and a ChainMap is slow to copy.
        template.globals = dict(template.globals)
        return template

    def render(self, source: str, today: str, variables: dict[str, Any]) -> str:
        self.today = today
        text = self.compiled(source).render(variables)
        if len(text) > LENGTH:
            raise ValueError(f"a text of more than {LENGTH:,} characters")
        return text

    def marks(self, source: str, today: str, variables: dict[str, Any]) -> str:
        """As JSON: where in the rendering of all messages each beginning of them ends, empty if
        the template could render a beginning in another way.

        It could not if it goes through the messages once, knows nothing of those to come, writes
        each before it asks for the next, and keeps nothing of them for the text after its loop.
        Then `messages[:k]` are rendered as `text[: marks[k]]` and what stands after `marks[-1]`,
        for k > 1.
        """
        if LOOKING.search(source):
            return "[]"
        watched = _Watched(variables["messages"])
        self.today, text, seen = today, "", watched
        template = self.compiled(source)
        context = template.new_context({**variables, "messages": watched})
        pieces = []
        try:
            for piece in template.root_render_func(context):
                pieces.append(piece)
                seen = watched.rest or watched
                watched.written += len(piece)
                seen.written = watched.written
        except Exception:  # an object that is no list may fail in any way
            return "[]"
        text, marks = "".join(pieces), (watched.rest or watched).marks
        grows = all(a < b for a, b in itertools.pairwise(marks[1:]))
        once = len(marks) == len(watched.messages) + 1 and not (watched.rest and watched.marks)
        alike = once and grows and text == template.render(variables)
        return json.dumps(marks if alike else [])

    def description(self, source: str) -> str:
        """As JSON: the variables that the template reads and the constants each is compared with.

        A name that is set in one branch only counts as read.
        """
        self.compiled(source)
        tree = self.environment.parse(source)
        read = jinja2.meta.find_undeclared_variables(tree) - set(self.environment.globals)
        found = {"variables": sorted(read), "compared": _compared(tree)}
        return json.dumps({**found, "looks": bool(LOOKING.search(source))})


def _compared(tree: nodes.Template) -> dict[str, list[Any]]:
    """The constants that each variable is compared with: `mode == "chat"` gives mode: ["chat"]."""
    found: dict[str, list[Any]] = {}
    for compare in tree.find_all(nodes.Compare):
        if not isinstance(compare.expr, nodes.Name):
            continue
        for operand in compare.ops:
            values = operand.expr.items if isinstance(operand.expr, nodes.List) else [operand.expr]
            for value in values:
                if isinstance(value, nodes.Const) and isinstance(value.value, str | bool | int):
                    found.setdefault(compare.expr.name, []).append(value.value)
    return found


def _answer(
    templates: _Templates,
    seconds: float,
    source: str,
    today: str,
    common: dict[str, Any],
    ask: tuple[str, Any, Any, Any, bool],
) -> tuple[bytes, str]:
    what, messages, tools, documents, prompt = ask
    variables = {**common, "messages": messages, "tools": tools, "documents": documents}
    variables["add_generation_prompt"] = prompt
    # The kernel ends the process when the time is over, within a C call, too.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        if what == "describe":
            return b"=", templates.description(source)
        if what == "marks":
            return b"=", templates.marks(source, today, variables)
        return b"=", templates.render(source, today, variables)
    except MemoryError:
        raise
    except jinja2.TemplateSyntaxError as error:
        return b"!", f"line {error.lineno}: {_shown(error.message)}"
    except jinja2.TemplateError as error:
        return b"!", f"refuses: {_shown(error.message or error)}"
    except RecursionError:
        return b"!", "calls itself without end, or is nested too deeply"
    except Exception as error:  # templates run code of their own; what it raises is their fault
        return b"!", f"fails with {type(error).__name__}: {_shown(error)}"


def _shown(message: Any) -> str:
    """`message` on one line, cut if it is long, with nothing that acts upon a terminal."""
    text = str(message)
    line = " ".join(text[:SHOWN].split()) + ("…" if len(text) > SHOWN else "")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _limit(memory: int) -> None:
    """Bound this process; if the machine lacks memory, the kernel is to end it before others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    with suppress(ValueError, OSError):  # a lower limit is set already; macOS knows none
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what Python writes at a sudden end


def serve(memory: int) -> NoReturn:
    """Answer the requests on stdin until there are no more, with `memory` bytes at most."""
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    templates = _Templates()
    _limit(memory)
    waiting = bytearray()
    try:
        while True:
            seconds, source, today, common, asks = pickle.load(requests)
            for ask in asks:
                if len(waiting) >= SENT:
                    _send(waiting, replies)
                kind, text = _answer(templates, seconds, source, today, common, ask)
                content = text.encode("utf-8", "surrogatepass")
                waiting += kind + len(content).to_bytes(8, "little") + content
            _send(waiting, replies)
    except MemoryError:
        os._exit(errno.ENOMEM)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # without the interpreter's end, which frees object by object


def _send(waiting: bytearray, replies: BinaryIO) -> None:
    replies.write(waiting)
    replies.flush()
    waiting.clear()
