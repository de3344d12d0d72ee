"""What the demo prints: titles, wrapped texts, and the commands that it shows and runs."""

import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whet.command_line import parse
from whet.progress import say

WIDTH = 80  # columns of the terminal


def run_command(command: str, module: Any, words: str, **values: Any) -> None:
    """Show `whet COMMAND WORDS`, and run it. `{name}` within a word is one of `values`."""
    argv = [word.format(**values) for word in words.split()]
    say(textwrap.indent(folded([whet(), command, *argv]), "  ") + "\n")
    code = module.main(parse(module.Config, argv, command))
    if code:
        raise SystemExit(code)


def title(name: str, what: str) -> None:
    """Begin a section."""
    say(f"\n{name}\n{'─' * len(name)}\n{what}\n")


def wrapped(text: str) -> str:
    """A paragraph, indented."""
    return textwrap.fill(
        text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def folded(words: Sequence[str]) -> str:
    r"""A command line, broken with `\` before flags so that it fits the terminal."""
    lines, line = [], ""
    for word in words:
        quoted = shlex.quote(word)
        if word.startswith("--") and len(line) > WIDTH - 30:
            lines.append(line)
            line = " "
        line = f"{line} {quoted}" if line else quoted
    return " \\\n".join([*lines, line])


def whet() -> str:
    """How the user calls whet: by name where the environment is active, else by its path."""
    beside = Path(sys.executable).with_name("whet")
    if shutil.which("whet") == str(beside):
        return "whet"
    try:
        return str(beside.relative_to(Path.cwd()))
    except ValueError:
        return str(beside)
