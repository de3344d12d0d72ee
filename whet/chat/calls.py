"""The tool calls in a reply, read back from its text.

What a template writes around the name and the arguments of a call is found by trying it with a
made-up call, as everything else of it. Read back are calls whose arguments it writes as a JSON
object, as most do; for those that write XML or Python there is no `CallForm`.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whet.chat.conversation import Message
from whet.chat.dialect import Dialect, beginning_of
from whet.chat.form import ASKED, CALL_ID, FUNCTION, SAID, TOOLS, VALUE, call
from whet.chat.template import TemplateError

HOLES = {"name": r"[\w.:/-]+", "id": r"[\w.:/-]+"}
SIGN = re.compile(r"[^\w\s]*\w*")
Call = tuple[str, dict[str, Any]]
"""Name and arguments."""


@dataclass(frozen=True)
class CallForm:
    """The texts around the holes of a call: what differs from call to call."""

    before: str
    """Before the first hole of the first call."""
    holes: tuple[str, ...]
    """`name`, `arguments` and perhaps `id`, in the template's order."""
    middle: tuple[str, ...]
    """Between two holes of a call."""
    between: str | None
    """Between the last hole of a call and the first of the next; None: there is one call only."""
    after: str

    @property
    def sign(self) -> str:
        """The text without which a reply makes no call."""
        return SIGN.match(self.before)[0]  # type: ignore[index]

    def read(self, text: str, names: Sequence[str]) -> tuple[str, list[Call]] | None:
        """What a reply says before its calls, and the calls; None if it does not end in calls of
        these functions."""
        at = text.find(self.sign)
        while at >= 0:
            if found := self._calls(text, at, names):
                return text[:at].rstrip(), found
            at = text.find(self.sign, at + 1)
        return None

    def _calls(self, text: str, at: int, names: Sequence[str]) -> list[Call] | None:
        found: list[Call] = []
        follows: str | None = self.before
        while follows is not None and (at := _literal(follows, text, at)) >= 0:
            values: dict[str, Any] = {}
            for hole, literal in zip(self.holes, (*self.middle, ""), strict=True):
                value, at = _hole(hole, text, at)
                at = _literal(literal, text, at) if at >= 0 else at
                if at < 0:
                    return None
                values[hole] = value
            if values["name"] not in names:
                return None
            found.append((values["name"], values["arguments"]))
            end = _literal(self.after, text, at)
            if end >= 0 and not text[end:].strip():
                return found
            follows = self.between
        return None


def _literal(literal: str, text: str, at: int) -> int:
    """Where `literal` ends that stands at `at`, perhaps with other whitespace and numbers, since
    some templates count the calls; -1 if it does not stand there."""
    sign = SIGN.match(literal)[0]  # type: ignore[index]
    rest = re.findall(r"\d+|[^\W\d]+|[^\w\s]", literal[len(sign) :])
    pattern = r"\s*".join(r"\d+" if word.isdigit() else re.escape(word) for word in [sign, *rest])
    found = re.compile(rf"\s*{pattern}\s*").match(text, at)
    return found.end() if found else -1


def _hole(hole: str, text: str, at: int) -> tuple[Any, int]:
    """The value of a hole and where it ends; -1 if there is none."""
    if hole == "arguments":
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
            json.dumps(value, allow_nan=False)  # Python reads NaN, which is no JSON
        except (ValueError, RecursionError):
            return None, -1
        return value, end if isinstance(value, dict) else -1
    found = re.compile(HOLES[hole]).match(text, at)
    return (found[0], found.end()) if found else (None, -1)


def find_form(dialect: Dialect) -> CallForm | None:
    """How the template of `dialect` writes calls; None if they can't be read back."""
    one, two, said = (_words(dialect, reply) for reply in (call(), call(calls=2), call(SAID)))
    holes = _holes(one)
    if not {"name", "arguments"} <= {hole for hole, _, _ in holes}:
        return None
    count, after = len(holes), one[holes[-1][2] :]
    middle = _gaps(one, holes)
    before = one[: holes[0][1]]
    if SAID in said and (others := _holes(said)):
        inner = said[said.find(SAID) + len(SAID) : others[0][1]]
        before = beginning_of(before[::-1], inner[::-1])[::-1]
    between, pairs = None, _holes(two)
    if len(pairs) == 2 * count and two.endswith(after):
        between = _gaps(two, pairs)[count - 1]
    form = CallForm(before.lstrip(), tuple(h for h, _, _ in holes), middle, between, after)
    given = (FUNCTION, {"value": VALUE})
    expected = {one: [given], two: [given] * 2} if between is not None else {one: [given]}
    good = all(
        (form.read(text, [FUNCTION]) or ("", []))[1] == calls for text, calls in expected.items()
    )
    return form if form.sign and good else None


def _holes(words: str) -> list[tuple[str, int, int]]:
    """The names of the made-up calls' holes in `words`, with where each begins and ends."""
    found = []
    for name, text in (("name", FUNCTION), ("id", CALL_ID)):
        found += [(name, m.start(), m.end()) for m in re.finditer(re.escape(text), words)]
    for brace in re.finditer(re.escape("{"), words):
        value, end = _hole("arguments", words, brace.start())
        if value == {"value": VALUE}:
            found.append(("arguments", brace.start(), end))
    return sorted(found, key=lambda hole: hole[1])


def _gaps(words: str, holes: list[tuple[str, int, int]]) -> tuple[str, ...]:
    return tuple(words[a[2] : b[1]] for a, b in itertools.pairwise(holes))


def _words(dialect: Dialect, reply: Message) -> str:
    """The words of `reply` as the template writes them; "" if its prompt does not name the tool."""
    talk: list[Message] = [{"role": "user", "content": ASKED}, reply]
    shaped = dialect.form(talk).shape(talk)
    try:
        prompt = dialect.render(shaped[:1], TOOLS, prompt=True)
        whole = dialect.render(shaped, TOOLS)
    except TemplateError:
        return ""
    if FUNCTION not in prompt or not whole.startswith(prompt):
        return ""
    ends = dialect.ending_of(whole, len(prompt), calls=True)
    if ends is None:
        return ""
    end, ending = ends
    return whole[len(prompt) : end - len(ending.close or ending.stop)]
