"""The flags of a dataclass: argparse with the fields' help texts."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from whet.config import (
    FIRST,
    POSITIONAL,
    check,
    collected,
    convert,
    flag_of,
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
    path, flags = _take_config_flag(list(argv))
    found: list[str] = []
    values: dict[str, Any] = {}
    with collected(found):
        values = read_toml(config_class, path) if path else {}
    with collected(found):
        values |= read_flags(config_class, flags, command)
    problems(found)
    return configured(config_class, values, command, flaws)


def configured(
    config_class: type[C],
    values: dict[str, Any],
    command: str,
    flaws: Callable[[C], Sequence[str]],
) -> C:
    """A `config_class` of `values`, each in its field's type. Raises UserError with what is missing
    or refused by a check of a field, by `flaws`, or because an output would replace an input."""
    missing = [
        flag_of(config_class, field.name)
        for field in dataclasses.fields(config_class)  # type: ignore[arg-type]
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        lines = [f"{flag}: is missing; see whet {command} --help" for flag in missing]
        problems(lines + refusals(config_class, values))
    config = config_class(**values)
    check(config, flaws(config))
    return config


def read_flags(config_class: type, words: Sequence[str], command: str) -> dict[str, Any]:
    """The fields that `words` set. `--help` prints the help and leaves with code 0.

    Raises UserError for all unknown flags and wrong values together.
    """
    hints = typing.get_type_hints(config_class, include_extras=True)
    found = []
    flags = []
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--") and len(name) > 2:
            name = "--" + name[2:].replace("-", "_")
            key = name[2:].removeprefix("no_") if name[2:] not in hints else name[2:]
            if key not in hints and name != "--help":
                said = word.partition("=")[0]
                found.append(f"unknown flag {said}{nearest_flag(key, hints, '--')}")
        flags.append(f"{name}{equals}{value}")
    problems(found)
    if {"-h", "--help"} & set(flags):
        say(help_of(config_class, hints, command))
        raise SystemExit(0)
    parser = _Parser(
        prog=f"whet {command}",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given stays away: the TOML comes later
    )
    for field in dataclasses.fields(config_class):
        _add(parser, field.name, hints[field.name])
    values = {}
    for name, given in vars(parser.parse_args(flags)).items():
        values[name], problem = convert(given, hints[name], text=True)
        if problem:
            found.append(f"--{name} {given}: {problem.rpartition(', got ')[0]}")
    problems(found)
    return values


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
