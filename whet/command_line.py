"""The flags of a dataclass: argparse with the fields' help texts."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from whet.config import (
    FIRST,
    POSITIONAL,
    check,
    convert,
    flag_of,
    hints_of,
    marks,
    problems,
    read_toml,
    refusals,
)
from whet.elsewhere import nearest_flag
from whet.errors import UserError
from whet.progress import say

C = TypeVar("C")


def parse(
    config_class: type[C],
    argv: Sequence[str],
    command: str,
    flaws: Callable[[C], Sequence[str]] = lambda config: (),
) -> C:
    """Build a `config_class` from `argv`, the flags that follow `whet <command>`.

    `flaws` finds what speaks against flags that do not go together. Raises UserError with all that
    is wrong: unknown flags and keys, wrong values, missing ones.
    """
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    path, flags = _take_config_flag(list(argv))
    try:
        values = read_toml(config_class, path, wrong) if path else {}
    except UserError as error:
        wrong["--config"] = str(error)
    values |= read_flags(config_class, flags, command, wrong)
    return configured(config_class, values, command, flaws, wrong)


def configured(
    config_class: type[C],
    values: dict[str, Any],
    command: str,
    flaws: Callable[[C], Sequence[str]],
    wrong: Mapping[str, str] = types.MappingProxyType({}),
) -> C:
    """A `config_class` of `values`, each in its field's type. Raises UserError with what is `wrong`
    with others, as `read_table` and `read_flags` find it, with what is missing or refused by a
    check of a field, by `flaws`, or because an output would replace an input."""
    names = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    missing = [
        f"{flag}: is missing; see whet {command} --help"
        for field in dataclasses.fields(config_class)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name not in values.keys() | wrong.keys() and "--config" not in wrong
        # what follows an unknown flag may have been RUN, and the flag may be a misspelt one
        if (flag := flag_of(config_class, field.name)).startswith("--") or wrong.keys() <= names
        if not any(f"--{field.name}" in line for line in wrong.values())
    ]
    if wrong or missing:
        problems([*wrong.values(), *missing, *refusals(config_class, values)])
    config = config_class(**values)
    check(config, flaws(config))
    return config


def read_flags(
    config_class: type, words: Sequence[str], command: str, wrong: dict[str, str]
) -> dict[str, Any]:
    """The fields that `words` set rightly; all unknown flags and wrong values are put into `wrong`,
    by the flag or the field. `--help` prints the help and leaves with code 0."""
    hints = hints_of(config_class)
    flags = []
    is_known = True  # the flag before a word
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--") and len(name) > 2:
            key = name[2:].replace("-", "_")
            is_known = key in hints or key.removeprefix("no_") in hints or key == "help"
            if not is_known:
                wrong[name] = f"unknown flag {name}{nearest_flag(key, hints, '--')}"
            elif equals and _bare(hints.get(key, bool)) is bool:
                wrong[key.removeprefix("no_")] = f"{word}: takes no value"
                continue
            name = f"--{key}"
        if is_known:
            flags.append(f"{name}{equals}{value}")
    if {"-h", "--help"} & set(flags):
        problems(list(wrong.values()))
        say(help_of(config_class, hints, command))
        raise SystemExit(0)
    parser = _Parser(
        prog=f"whet {command}",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given stays away: the TOML comes later
    )
    for field in dataclasses.fields(config_class):
        action = _add(parser, field.name, hints[field.name])
        if action.option_strings and action.nargs is None:
            action.nargs, action.const = "?", NOTHING
    values = {}
    given, others = parser.parse_known_args(flags)
    if others:
        wrong["words"] = f"unrecognized arguments: {' '.join(others)}; see {parser.prog} --help"
    for name, text in vars(given).items():
        value, problem = convert(text, hints[name], text=True)
        if text == NOTHING:
            wrong[name] = f"--{name}: expected a value after it; see {parser.prog} --help"
        elif problem:
            wrong[name] = f"--{name} {text}: {problem.rpartition(', got ')[0]}"
        else:
            values[name] = value
    return values


NOTHING = "\0"
"""What argparse gives for a flag without a value: no argument of a program holds it."""


def _take_config_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split `--config FILE` (or `--config=FILE`) from the other flags."""
    path, rest = None, []
    while argv:
        word = argv.pop(0)
        if word == "--config":
            if not argv:
                raise UserError("--config: expected a TOML file after it")
            path = argv.pop(0)
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
    return path, rest


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are Whet's own."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def _add(parser: Any, name: str, hint: Any) -> argparse.Action:
    """Add the field `name` to a parser or to a group of one; its values stay texts."""
    bare = _bare(hint)
    is_many = typing.get_origin(bare) is tuple
    action: argparse.Action
    if POSITIONAL in marks(hint):
        action = parser.add_argument(name, nargs="*" if is_many else "?")
    elif bare is bool:
        action = parser.add_argument(f"--{name}", action="store_const", const=True)
        no = {"action": "store_const", "const": False, "dest": name}
        parser.add_argument(f"--no_{name}", help=argparse.SUPPRESS, **no)
    elif is_many:
        action = parser.add_argument(f"--{name}", action="extend", nargs="*")
    else:
        action = parser.add_argument(f"--{name}")
    return action


def help_of(config_class: type, hints: dict[str, Any], command: str) -> str:
    """What `whet <command> --help` prints."""
    title, _, example = inspect.cleandoc(config_class.__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"whet {command}",
        usage=_usage(config_class, hints, command),
        description=title,
        epilog=("example:\n" + textwrap.indent(example, "  ") + "\n\n" if example else "")
        + "Every flag can also stand in a TOML file: --config FILE.toml; flags win.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, texts in _groups(config_class, hints).items():
        group = parser.add_argument_group(title)
        for field in (f for f in dataclasses.fields(config_class) if f.name in texts):
            action, hint = _add(group, field.name, hints[field.name]), hints[field.name]
            action.help = (texts[field.name] + _default(field)).replace("%", "%%")
            if POSITIONAL in marks(hint):
                action.metavar = field.name.upper()
            elif _bare(hint) is not bool:
                action.metavar = _metavar(hint)
    return parser.format_help().rstrip()


def _usage(config_class: type, hints: dict[str, Any], command: str) -> str:
    words = []
    for field in dataclasses.fields(config_class):
        is_required = field.default is field.default_factory  # both are MISSING
        if POSITIONAL in marks(hints[field.name]):
            many = "..." if typing.get_origin(_bare(hints[field.name])) is tuple else ""
            name = field.name.upper() + many
            words.append(name if is_required else f"[{name}]")
        elif is_required:
            words.append(f"--{field.name} {_metavar(hints[field.name])}")
    return " ".join(["whet", command, *words, "[flags]"])


def _groups(config_class: type, hints: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Title -> field -> help: first the flags that most people set, then the command's own, then a
    group for each class that it shares with others."""
    groups: dict[str, dict[str, str]] = {"most used": {}, "flags": {}}
    for part in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(part):
            title = (part.__doc__ or "").split("\n")[0].rstrip(".")
            title = "flags" if part is config_class else title[0].lower() + title[1:]
            for name, text in help_texts(part).items():
                chosen = "most used" if FIRST in marks(hints[name]) else title
                for names in groups.values():
                    names.pop(name, None)  # a stage that gives a shared flag another default
                groups.setdefault(chosen, {})[name] = text
    return {title: names for title, names in groups.items() if names}


def help_texts(config_class: type) -> dict[str, str]:
    """Field -> the string under it, of the fields that this class itself defines."""
    names = {field.name for field in dataclasses.fields(config_class)}
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[field.target.id] = " ".join(str(after.value.value).split()) if is_text else ""  # type: ignore[union-attr]
    return {name: text for name, text in found.items() if name in names}  # no ClassVar


def _bare(hint: Any) -> Any:
    """The type without marks and without None."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    is_optional = type(None) in typing.get_args(hint)
    return _bare(options[0]) if is_optional and len(options) == 1 else hint


def _metavar(hint: Any) -> str:
    bare = _bare(hint)
    if typing.get_origin(bare) is Literal:
        return "|".join(map(str, typing.get_args(bare)))
    if typing.get_origin(bare) is tuple:
        return _metavar(typing.get_args(bare)[0])
    return {int: "N", float: "X", Path: "PATH"}.get(bare, "TEXT")


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if value is dataclasses.MISSING or value is None or value is False or value in ((), ""):
        return ""
    return f" [{'on; --no_' + field.name + ' turns it off' if value is True else value}]"
