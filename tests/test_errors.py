"""How a UserError is shown."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from whet.cli import COMMANDS, config_class
from whet.errors import UserError, tell

ROOT = Path(__file__).resolve().parent.parent
RUNS_OTHERS = ("whet.demo.", "whet.doctor.runs")
"""Modules that make the command lines of other commands."""


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("https://me:s3cr@et@host/a: absent", "https://***@host/a: absent"),
        ("see hf://user:tok%20en@hub.co/x and a:b@c", "see hf://***@hub.co/x and a:b@c"),
        ("https://host:80/a@b", "https://host:80/a@b"),
    ],
)
def test_passwords_in_urls_are_not_shown(capsys, message, shown):
    tell(UserError(message))
    assert capsys.readouterr().err == f"whet: error: {shown}\n"


FLAG = re.compile(r"(?<![\w-])--(?:no_)?([a-z][a-z0-9_]*)")
OF_OTHERS = {
    *("help", "config", "version"),  # every command's
    *("standalone", "nproc_per_node", "max_restarts"),  # torchrun
    *("logprobs", "enable", "max", "lora"),  # vLLM, SGLang: --logprobs-mode, --lora-paths, …
    "logdir",  # TensorBoard
    "no_",
}
NEXT = {("whet.data.prepare", name) for name in ("model", "dev", "loss")}
"""Of the command line of another command that `whet prepare` ends with."""


def texts_of(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """(line, text) of each text of a module that is no docstring, f-strings whole."""
    skipped = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(getattr(node, "value", None), str) and id(node) not in skipped:
            yield node.lineno, node.value


def imports_of(nodes: list[ast.AST]) -> set[str]:
    """The modules of Whet that a module imports, wherever in it."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("whet"):
            found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return found


def test_a_message_names_flags_of_commands_that_can_print_it() -> None:
    """Each flag in a text of a module is one of a command that imports it, or stands in a command
    line that names its own: `whet export … --merge`."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): [
            *ast.walk(ast.parse(path.read_text("utf-8")))
        ]
        for path in (ROOT / "whet").rglob("*.py")
    }
    imported = {name: imports_of(nodes) & modules.keys() for name, nodes in modules.items()}
    fields = {
        command: {field.name for field in dataclasses.fields(config_class(command))}
        for command in COMMANDS
    }
    known: dict[str, set] = {}
    for command, (module, _) in COMMANDS.items():
        waiting, seen = {module, f"whet.flags.{command}"}, set[str]()
        while waiting:
            name = waiting.pop()
            seen.add(name)
            waiting |= imported[name] - seen
        for name in seen:
            known.setdefault(name, set()).update(fields[command])
    wrong = []
    for name, nodes in modules.items():
        if name.startswith(RUNS_OTHERS):
            continue
        for line, text in texts_of(nodes):
            named = set(re.findall(r"whet (\w+)", text)) & COMMANDS.keys()
            allowed = known.get(name, set()).union(OF_OTHERS, NEXT, *(fields[c] for c in named))
            wrong += [
                f"{name}:{line}: --{f}" for f in FLAG.findall(text) if not {f, (name, f)} & allowed
            ]
    assert wrong == []
