"""Control tokens within somebody's text (rule 5).

Each control string in a message, tool or document is replaced by one private-use character before
the template sees it. So the rendering itself tells which `<|im_end|>` is the template's and which
is somebody's, wherever the template puts it.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

PRIVATE_USE = range(0xE000, 0xF8FF)


def pattern_of(strings: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that matches the longest of `strings` at each place, with shared beginnings."""
    tree: dict[str, Any] = {}
    for text in strings:
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}
    return re.compile(_expression(tree)) if tree else None


def _expression(tree: dict[str, Any]) -> str:
    ends = "" in tree
    branches = [re.escape(letter) + _expression(node) for letter, node in tree.items() if letter]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 and not ends else f"(?:{'|'.join(branches)})"
    return f"{joined}?" if ends else joined


class NoneFree(Exception):  # noqa: N818 -- an answer, not an accident
    """The texts hold every private-use character themselves."""


class Escapes:
    """A two-way table between control strings and private-use characters, for one conversation."""

    def __init__(self, pattern: re.Pattern[str], taken: str) -> None:
        self.pattern = pattern
        self.count = 0
        self.strings: dict[str, str] = {}  # character -> control string
        self._characters: dict[str, str] = {}
        self._free = (chr(code) for code in PRIVATE_USE if chr(code) not in taken)

    def hide(self, value: Any) -> Any:
        """`value` (any JSON) with its control strings replaced."""
        return mapped(value, lambda text: self.pattern.sub(self._hidden, text))

    def _hidden(self, match: re.Match[str]) -> str:
        text = match.group()
        if text not in self._characters:
            character = next(self._free, "")
            if not character:
                raise NoneFree
            self._characters[text] = character
            self.strings[character] = text
        self.count += 1
        return self._characters[text]

    def restore(self, text: str) -> str:
        """`text` with the control strings back in their places."""
        return re.sub(f"[{''.join(self.strings)}]", lambda found: self.strings[found.group()], text)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` applied to each text in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {mapped(key, change): mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(item, change) for item in value]
    return value


def holds(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether `pattern` matches in any text within `value`."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, dict):
        return any(holds(key, pattern) or holds(item, pattern) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(holds(item, pattern) for item in value)
    return False
