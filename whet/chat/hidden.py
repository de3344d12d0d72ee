"""Control tokens within somebody's text (rule 5).

Each control string in a message, tool or document is replaced by one private-use character before
the template sees it. So the rendering itself shows which `<|im_end|>` is the template's and which
is somebody's, wherever the template puts it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from whet.chat.template import TemplateError

PRIVATE_USE = range(0xE000, 0xF8FF)
BORDER = "\uf8ff"  # the character after those: marks a place in a trial rendering

Content = Sequence[Any]  # messages, tools, documents


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


class Exposed(Exception):  # noqa: N818 -- an answer, not an accident
    """Why a conversation's control strings cannot be distinguished from the template's own."""


class Escapes:
    """The control strings of one conversation and the private-use characters that hide them.

    `content` is what the conversation holds, `hidden` the same with the characters, `count` how
    many strings were hidden. Raises Exposed if the texts hold every private-use character.
    """

    def __init__(self, content: Content, pattern: re.Pattern[str]) -> None:
        taken = json.dumps(content, ensure_ascii=False, default=str)
        self.content = content
        self.count = 0
        self.strings: dict[str, str] = {}  # character -> control string
        self._characters: dict[str, str] = {}
        self._free = (chr(code) for code in PRIVATE_USE if chr(code) not in taken)
        self.hidden = mapped(content, lambda text: pattern.sub(self._hidden, text))
        copies = [message["thinking"] for message in self.hidden[0] if "thinking" in message]
        self.count -= sum(copy.count(character) for copy in copies for character in self.strings)

    def _hidden(self, match: re.Match[str]) -> str:
        text = match.group()
        if text not in self._characters:
            character = next(self._free, "")
            if not character:
                raise Exposed(
                    "a text holds a control token, and the texts hold every private-use character "
                    "(U+E000 to U+F8FE), so that none is left to hide it; remove either"
                )
            self._characters[text] = character
            self.strings[character] = text
        self.count += 1
        return self._characters[text]

    def restore(self, text: str) -> str:
        """`text` with the control strings back in their places."""
        return re.sub(f"[{''.join(self.strings)}]", lambda found: self.strings[found.group()], text)

    def check(self, text: str, render: Callable[[Content], str]) -> None:
        """Show that the template treats the characters as it treats what they hide. `text` is the
        rendering of `hidden`. Raises Exposed, or TemplateError if it refuses the content itself."""
        if self.restore(text) != render(self.content):
            found = ", ".join(sorted(set(self.strings.values())))
            raise Exposed(
                f"the template acts upon {found} in a text, so these cannot be told apart from its "
                "own control tokens; --special_in_content allow takes them for control tokens"
            )


def check_joints(
    content: Content, pattern: re.Pattern[str], text: str, render: Callable[[Content], str]
) -> None:
    """Show of each control string in `text`, the rendering of `content`, that the template wrote
    it: it stands there as often if one of its signs is replaced in all texts by another character.
    Raises Exposed."""
    found = Counter(pattern.findall(text))
    left = {string for string in found if signs_of(string)}
    for sign in signs_of("".join(left)):

        def without(value: str, sign: str = sign) -> str:
            return value.replace(sign, BORDER)

        with suppress(TemplateError):
            other = render(mapped(content, without))
            counts = Counter(pattern.findall(other))
            left -= {s for s in left if sign in s and counts[s] == found[s]}
        if not left:
            return
    if left:
        raise Exposed(
            f"the template makes {', '.join(sorted(left))} out of texts that do not hold it, "
            "by cutting or joining them; remove what it cuts out, or --special_in_content "
            "allow takes it for a control token"
        )


CUTS = re.compile(r"replace|split|join|remove|strip|trim|truncate|\[[^\]\[]*:")  # in jinja source


class Joints:
    """Whether a template could make control strings out of texts that hold none.

    It could by joining texts, where one ends with the beginning of such a string, and by cutting
    something out of a text that has all the signs of one.
    """

    def __init__(self, strings: Iterable[str], source: str) -> None:
        strings = list(strings)
        begun = pattern_of(text[:end] for text in strings for end in range(1, len(text)))
        self.begun = re.compile(f"{begun.pattern if begun else '(?!)'}\\Z")
        self.longest = max(map(len, strings), default=0)
        signs = {frozenset(signs_of(text)) for text in strings}
        least = [one for one in signs if one and not any(other < one for other in signs if other)]
        self.signs = [sorted(one) for one in least] if CUTS.search(source) else []

    def possible(self, text: str) -> bool:
        """Whether `text` could be a part of it. Asked for every text, so it must be quick."""
        if self.begun.search(text.rstrip()[-self.longest :]):
            return True
        return any(all(sign in text for sign in signs) for signs in self.signs)


def signs_of(text: str) -> list[str]:
    """The characters of a control string that are neither letters nor digits, whitespace nor _."""
    return sorted({c for c in text if not (c.isalnum() or c.isspace() or c == "_")})


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` applied to each text in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {mapped(key, change): mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(item, change) for item in value]
    return value


def holds(value: Any, test: Callable[[str], Any]) -> bool:
    """Whether `test` finds something in any text within `value`."""
    if isinstance(value, str):
        return bool(test(value))
    if isinstance(value, dict):
        return any(holds(key, test) or holds(item, test) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(holds(item, test) for item in value)
    return False


def any_text_holds(content: Content, test: Callable[[str], Any]) -> bool:
    """`holds`, quick for messages that are texts: most are searched, few hold anything."""
    messages, *beside = content
    for message in messages:
        for value in message.values():
            if test(value) if type(value) is str else holds(value, test):
                return True
    return holds(beside, test)
