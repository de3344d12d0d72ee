"""What one rendering of a chat template may spend in time and memory.

A template comes from strangers, and jinja's sandbox does not stop it from counting for ever or from
writing a terabyte. Here every loop round is counted, every text and list that is made is charged,
what could be huge is judged before it is made, and a clock ends what is slow without growing.
"""

import re
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import jinja2
from jinja2.runtime import Context
from jinja2.utils import _PassArg

from whet.errors import UserError

# Filters that hand values on as they are; every other one tells a list as a text, or may do so
PASSING = re.compile(
    "attr|batch|count|d|default|dictsort|first|groupby|items|join|last|length|list|map|max|min"
    "|random|reject|rejectattr|reverse|select|selectattr|slice|sort|sum|unique"
)
STEPS = 2_000_000  # loop rounds and macro calls in one rendering; long conversations take thousands
LENGTH = 30_000_000  # characters of one rendering or of a text within it; 1 to 4 bytes each
TOTAL = 250_000_000  # characters of all texts within one rendering, those thrown away included
MACRO_STEPS = 20  # a macro call takes about as long as so many rounds of an empty loop
ITEMS = 2_000_000  # of a list that a template builds, or values in one that becomes a text
PIECE = 50  # bytes that a short text takes besides its characters
BITS = 20_000  # of a whole number: products and quotients of longer ones take for ever
SECONDS = 60.0  # of processor time for one rendering; real ones take thousandths
NESTED = 300_000  # values in the lists of a list: one that doubles would be printed for ever
PRECISION = 100  # digits behind the point, spaces of an indent
WIDE = re.compile(r"\d{5,}|[*]|\{[^{}]*\{")  # a width in a format, or one taken from an argument


class TemplateError(UserError):
    """The template did not render this conversation: its own message, or its own fault."""


@dataclass
class Budget:
    """What is left of one rendering's means."""

    steps: int = STEPS
    characters: int = TOTAL
    began: float = field(default_factory=time.monotonic)
    began_cpu: float = field(default_factory=time.process_time)

    def renew(self) -> None:
        """For the next rendering."""
        self.steps, self.characters = STEPS, TOTAL
        self.began, self.began_cpu = time.monotonic(), time.process_time()

    @jinja2.pass_context  # or else jinja would take it for a constant
    def count(self, context: Any, steps: int) -> None:
        """A loop round, or the call of a macro."""
        self.steps -= steps
        if self.steps < 0:
            raise TemplateError(
                f"the chat template loops more than {STEPS:,} times for one conversation"
            )
        self.look_at_clock()

    def look_at_clock(self) -> None:
        """For what is slow without making anything: searching and sorting, again and again."""
        if time.monotonic() - self.began < SECONDS:  # ten times as quick to ask as the other
            return
        if time.process_time() - self.began_cpu > SECONDS:
            raise TemplateError(
                f"the chat template takes more than {SECONDS:g} s for one conversation"
            )

    def spend(self, length: int) -> None:
        """A text or list of `length` is made, or is about to be."""
        self.characters -= length
        if length > LENGTH:
            raise TemplateError(
                f"the chat template builds a text of more than {LENGTH:,} characters"
            )
        if self.characters < 0:
            raise TemplateError(
                f"the chat template builds texts of more than {TOTAL:,} characters in all"
            )

    def made(self, value: Any) -> Any:
        """`value`, charged by its length if it has one."""
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, list | tuple):
            self.spend(8 * len(value))
            if len(value) > ITEMS:
                raise TemplateError(f"the chat template builds a list of more than {ITEMS:,} items")
        elif isinstance(value, int) and value.bit_length() > BITS:
            raise TemplateError(f"the chat template computes a number of more than {BITS:,} bits")
        return value

    def called(self, value: Any) -> Any:
        """`value`, what a filter or function has made, charged; the pieces of a text, too."""
        self.look_at_clock()
        if isinstance(value, list) and value and isinstance(value[0], str):
            self.characters -= PIECE * len(value)
        return self.made(value)

    def told(self, value: Any) -> Any:
        """`value`, which is about to become a text: judged by what is in it if it is a list."""
        if isinstance(value, list | tuple | dict):
            self.spend(self.length_told(value))
        return value

    def length_told(self, value: Any) -> int:
        """Characters of `value` as a text, about; what stands in it twice is told twice."""
        waiting, length, items = [value], 0, 0
        while waiting:
            inner = waiting.pop()
            items += 1
            if isinstance(inner, str | bytes):
                length += len(inner)
            elif isinstance(inner, dict):
                waiting += [*inner.keys(), *inner.values()]
            elif isinstance(inner, list | tuple):
                waiting += inner
            if items > ITEMS or length > LENGTH:
                return LENGTH + 1
        return length + items

    def concat(self, parts: Iterable[str]) -> str:
        """What a block or the whole template has printed, judged before it is joined."""
        kept, length = [], 0
        for part in parts:
            length += len(part)
            if length > LENGTH:
                break
            kept.append(part)
        self.spend(length)
        return "".join(kept)

    def joining(self, join: Callable[[Iterable[Any]], str]) -> Callable[[Iterable[Any]], str]:
        """What `~` calls, with its operands judged before."""

        def joined(operands: Iterable[Any]) -> str:
            operands = tuple(operands)
            self.spend(self.length_told(operands))
            return join(operands)

        return joined

    def nested(self, value: Any) -> Any:
        """`value`, a list made in the template, if all that is in it can be told in a sane time."""
        waiting, items = [value], 0
        while waiting:
            inner = waiting.pop()
            items += 1
            if items > NESTED:
                raise TemplateError(
                    f"the chat template builds a list of more than {NESTED:,} values"
                )
            if isinstance(inner, dict):
                waiting += inner.values()
            elif isinstance(inner, list | tuple):
                waiting += inner
        return value

    def before_call(self, name: str, subject: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        """Judge the call of a text's method or of a filter that may make much of little."""
        judge = GROWING.get(name)
        if judge is None or isinstance(subject, jinja2.Undefined):
            return
        try:
            length = judge(subject, [*args, *kwargs.values()])
        except (TypeError, ValueError, AttributeError):
            return  # wrong arguments: the call itself will say so
        self.spend(length)

    def guard(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter `function` with its call judged and its result charged.

        Takes the context, so that jinja does not compute it beforehand for constants.
        """
        takes = _PassArg.from_obj(function)

        @wraps(function)
        def guarded(context: Context, *args: Any, **kwargs: Any) -> Any:
            subject = args[0]
            if name == "join" and not isinstance(subject, str) and isinstance(subject, Iterable):
                subject = list(subject)
                args = (subject, *args[1:])
            if not PASSING.fullmatch(name):
                for value in (*args, *kwargs.values()):
                    self.told(value)
            self.before_call(name, subject, args[1:], kwargs)
            if takes is _PassArg.context:
                args = (context, *args)
            elif takes is _PassArg.eval_context:
                args = (context.eval_ctx, *args)
            elif takes is _PassArg.environment:
                args = (context.environment, *args)
            return self.called(function(*args, **kwargs))

        return jinja2.pass_context(guarded)

    def before_format(self, form: Any, values: Any) -> None:
        """Judge `form % values` or `form.format(values)`: each place may take the longest value."""
        formatted(form, [])
        if not isinstance(form, str | bytes):
            return
        places = form.count("%") + form.count("{") if isinstance(form, str) else form.count(b"%")
        parts = values if isinstance(values, tuple) else (values,)
        self.spend(places * max([0, *(self.length_told((part,)) for part in parts)]))


def _widest(subject: Any, args: list[Any]) -> int:
    """A number among the arguments is the length of the result, or of each of its parts."""
    return max([0, *(abs(arg) for arg in args if isinstance(arg, int))])


def _indented(subject: Any, args: list[Any]) -> int:
    step = max([4, *(arg if isinstance(arg, int) else len(arg) for arg in args)])
    return len(subject) + step * (subject.count("\n") + 1)


def _replaced(subject: Any, args: list[Any]) -> int:
    old, new = str(args[0]), str(args[1])
    return len(subject) + str(subject).count(old) * len(new)


def _joined(subject: Any, args: list[Any]) -> int:
    """As a filter `items | join(glue)`, as a method `glue.join(items)`."""
    items, glue = (args[0], subject) if isinstance(subject, str) and args else (subject, "")
    glue = next((arg for arg in args if isinstance(arg, str)), glue)
    if not isinstance(items, list | tuple | str):
        return 0  # a generator: the text is charged when it is made
    length = len(items) * len(glue)
    for item in items:
        length += len(item) if isinstance(item, Sized) else 20
    return length


def _wrapped(subject: Any, args: list[Any]) -> int:
    return len(subject) * max([1, *(len(arg) for arg in args if isinstance(arg, str))])


def _translated(subject: Any, args: list[Any]) -> int:
    values = args[0].values()
    return len(subject) * max([1, *(len(value) for value in values if isinstance(value, str))])


def formatted(subject: Any, args: list[Any]) -> int:
    """Of `"%5d" % x` and `"{:5}".format(x)`: no width of many digits, none from outside."""
    if isinstance(subject, str) and WIDE.search(subject):
        raise TemplateError(f"the chat template formats with a computed or huge width: {subject!r}")
    return 0


def _precise(subject: Any, args: list[Any]) -> int:
    size = max([0, *(abs(a) if isinstance(a, int) else len(a) for a in args if a is not None)])
    if size > PRECISION and not (args and args[0] in ("common", "ceil", "floor")):
        raise TemplateError(f"the chat template asks for {size:,} digits or spaces")
    return 0


GROWING: dict[str, Callable[[Any, list[Any]], int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice"), _widest),
    "expandtabs": lambda subject, args: subject.count("\t") * _widest(subject, [8, *args]),
    "indent": _indented,
    "replace": _replaced,
    "join": _joined,
    "wordwrap": _wrapped,
    "translate": _translated,
    "format": formatted,
    "tojson": _precise,
    "round": _precise,
}
