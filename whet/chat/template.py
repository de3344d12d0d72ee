"""Chat templates: jinja, rendered as transformers renders it, but within bounds.

The rendering itself happens in a second process, `renderer.py`, so that whatever a stranger's
template does with time and memory ends in a UserError. There is one such process for each process
that renders. It starts with the first template, ends with its owner, and is replaced when it dies.
One message to it may ask for many renderings, as a message costs more than a short one of them.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import cache, cached_property
from threading import Lock
from typing import Any

from whet.chat.conversation import Message
from whet.errors import UserError

SECONDS = 5.0  # of processor time for one rendering; 1,000 turns take 0.03, at worst 1
MEMORY = 1 << 30  # bytes of address space of the renderer; Python and jinja take 50 MB of it
ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt")
# jinja's own names, and those of the functions that every template may call
TAKEN = {*ARGUMENTS, "self", "range", "dict", "namespace", "cycler", "joiner"}
TAKEN |= {"raise_exception", "strftime_now"}
Ask = tuple[str, list[Message], list[dict[str, Any]] | None, list[dict[str, Any]] | None, bool]
"""(`render`, `marks` or `describe`, messages, tools, documents, add_generation_prompt)."""
Reply = tuple[bytes, str]  # `=` or `!`, and the text or message
OF_TEMPLATE = "the chat template "
"""How the message of a TemplateError begins."""
START = "import sys; sys.path = {path!r}; from whet.chat.renderer import serve; serve({memory})"


class TemplateError(UserError):
    """The template did not render this conversation: its own message, or its own fault."""


class BoundsError(TemplateError):
    """The template took more time or memory than a rendering may."""


class ChatTemplate:
    """A chat template: `source` is the jinja text, `hash` its sha256.

    It is examined when it is first asked for something: whatever else it is asked for raises
    UserError if it is not valid jinja.
    """

    def __init__(self, source: str, name: str = "chat template") -> None:
        self.source = source
        self.name = name
        self.hash = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def described(self) -> dict[str, Any]:
        """What the template does, by its jinja: `variables`, `looks` and `compared`."""
        try:
            text = self._answer(("describe", [], None, None, False), None, None)
        except TemplateError as error:
            raise UserError(f"{self.name}: {str(error).removeprefix(OF_TEMPLATE)}") from None
        return dict(json.loads(text))

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that it reads."""
        return frozenset(self.described["variables"])

    @property
    def looks(self) -> bool:
        """Whether it may look at messages before it writes them."""
        return bool(self.described["looks"])

    @cached_property
    def compared(self) -> dict[str, frozenset[Any]]:
        """The constants that each of its variables is compared with."""
        return {name: frozenset(values) for name, values in self.described["compared"].items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.source, self.name)

    def answer(self, ask: Ask, today: date | None, variables: Mapping[str, Any] | None) -> str:
        """The renderer's reply to `ask`: a text, or JSON.

        `today` is the date of `strftime_now` (None: the clock's); `variables` are further template
        variables: bos_token, eos_token, enable_thinking, … Raises TemplateError with the template's
        own words if it refuses or fails, BoundsError if it takes too long, UserError if a variable
        has the name of something else.
        """
        _ = self.described  # refuses what is no jinja
        return self._answer(ask, today, variables)

    def _answer(self, ask: Ask, today: date | None, variables: Mapping[str, Any] | None) -> str:
        replies, cause = self._replies([ask], today, variables)
        if not replies:
            raise BoundsError(f"{OF_TEMPLATE}{cause}")
        [(kind, text)] = replies
        if kind == b"!":
            raise TemplateError(f"{OF_TEMPLATE}{text}")
        return text

    def answers(
        self, asks: Sequence[Ask], today: date | None, variables: Mapping[str, Any] | None
    ) -> list[str | TemplateError]:
        """`answer` to many asks in one message, with the error in the place of what is refused.

        The list ends before the first that breaks the bounds, perhaps because of what the others
        take: `answer` to it alone decides.
        """
        _ = self.described
        try:
            replies, _ = self._replies(asks, today, variables)
        except TemplateError:
            return []
        return [
            text if kind == b"=" else TemplateError(f"{OF_TEMPLATE}{text}")
            for kind, text in replies
        ]

    def _replies(
        self, asks: Sequence[Ask], today: date | None, variables: Mapping[str, Any] | None
    ) -> tuple[list[Reply], str]:
        """The renderer's replies, and why they are fewer than `asks`, if they are."""
        check_names(variables or {}, "template variables")
        date_given, request = today.isoformat() if today else "", io.BytesIO()
        content = (SECONDS, self.source, date_given, dict(variables or {}), asks)
        try:
            _Pickler(request, pickle.HIGHEST_PROTOCOL).dump(content)
        except RecursionError:
            raise TemplateError(f"{OF_TEMPLATE}can't render what is nested so deeply") from None
        return _renderer(os.getpid()).ask(request.getbuffer(), len(asks))


class _Renderer:
    """The second process, started when it is asked and there is none."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], Any] = lambda: None

    def ask(self, request: memoryview, count: int) -> tuple[list[Reply], str]:
        """The replies to the `count` asks of `request`, and why they are fewer, if they are."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None
            replies: list[Reply] = []
            try:
                for reply in _exchange(self._process, request, count):
                    replies.append(reply)
            except (EOFError, BrokenPipeError):
                return replies, _cause(self._process.wait())
            except BaseException:  # Ctrl-C: the replies to come are no longer waited for
                self._end()
                raise
        return replies, ""

    def _start(self) -> None:
        self._end()
        command = [sys.executable, "-c", START.format(path=sys.path, memory=MEMORY)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        self._process = process
        self._end = weakref.finalize(self, _end, process)  # at the end of this process, too


@cache
def _renderer(process_id: int) -> _Renderer:
    """The renderer of this process: a forked one must not share its parent's."""
    return _Renderer()


class _Pickler(pickle.Pickler):
    """Writes JSON's types; any other object as its type's name, as transformers does."""

    def reducer_override(self, value: Any) -> Any:  # pickle asks for what is no built-in type
        import numpy as np

        if any(value is plain for plain in (dict, str, int, float, bool)):
            return NotImplemented  # the types themselves, which an earlier answer named
        if isinstance(value, np.generic):
            value = value.item()
        kinds: Any = ((Mapping, dict), (str, str), (bool, bool), (int, int), (float, float))
        for kind, plain in kinds:
            if isinstance(value, kind):
                return plain, (plain(value),)
        return str, (f"<{type(value).__name__}>",)


def _exchange(process: Any, request: memoryview, count: int) -> Iterator[Reply]:
    """The replies as they come. Raises EOFError or BrokenPipeError if `process` dies."""
    requests, replies = process.stdin, process.stdout
    requests.write(request)
    requests.flush()
    for _ in range(count):
        head = replies.read(9)
        length = int.from_bytes(head[1:], "little")
        content = replies.read(length)
        if len(head) < 9 or len(content) < length:
            raise EOFError
        yield head[:1], content.decode("utf-8", "surrogatepass")


def _cause(exit_code: int) -> str:
    """Why the renderer has ended."""
    if exit_code == -signal.SIGPROF:
        return f"takes more than {SECONDS:g} s of processor time"
    if exit_code == errno.ENOMEM:
        return f"takes more than {MEMORY >> 20:,} MB of memory"
    how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return f"was being rendered when its process ended ({how}), for want of memory perhaps"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # of what was not written yet
            pipe.close() if pipe else None
    process.wait()


def check_names(variables: Mapping[str, Any], where: str) -> None:
    """Raises UserError if one of `variables` has the name of something that templates rely on."""
    if taken := sorted(TAKEN & variables.keys()):
        raise UserError(
            f"{where}: {', '.join(taken)} can't be set, as the template gets what it calls so from "
            "Whet or from jinja; take other names"
        )


def read_variables(text: str | None) -> dict[str, Any]:
    """The variables of `--template_kwargs`, a JSON object. Raises UserError for anything else."""
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"--template_kwargs: not JSON ({error})") from None
    if not isinstance(given, dict):
        raise UserError(f"--template_kwargs: expected a JSON object, got {text}")
    check_names(given, "--template_kwargs")
    return given
