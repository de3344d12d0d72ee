"""Configurations: dataclass defaults < TOML file (`--config`) < command-line flags.

A configuration is a flat dataclass; the string under each field is its help text. Every flag can
stand in the TOML file under the same name. All problems are told at once, and an unknown key names
the nearest one.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from whet.errors import UserError
from whet.files import replaced

C = TypeVar("C")


def problems(found: Sequence[str]) -> None:
    """Raise one UserError that tells all of `found`, or return if there are none."""
    if found:
        raise UserError("\n".join(found))


@contextmanager
def collected(found: list[str]) -> Iterator[None]:
    """Add the UserError that the block raises to `found` instead, to be told with others."""
    try:
        yield
    except UserError as error:
        found += str(error).splitlines()


def parse(config_class: type[C], argv: Sequence[str], command: str) -> C:
    """Build a `config_class` from `argv`, the flags that follow `whet <command>`.

    Raises UserError for an unknown flag or key (all of them at once, each with the nearest name)
    and for values of the wrong type in the TOML file. Wrong flag values are told by tyro, which
    exits with code 2.
    """
    import tyro

    toml_path, flags = _take_config_flag(list(argv))
    from_toml = read_toml(config_class, toml_path) if toml_path else {}
    problems(_unknown_flags(config_class, flags))
    return tyro.cli(
        config_class,
        prog=f"whet {command}",
        args=flags,
        default=_with_defaults(config_class, from_toml) if from_toml else tyro.MISSING_NONPROP,
        use_underscores=True,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
    )


def read_toml(config_class: type, path: str | Path) -> dict[str, Any]:
    """Read `path` and check every key and type against the fields of `config_class`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # also numbers and nesting without end
        raise UserError(f"--config {path}: not valid TOML: {error}") from None
    hints = typing.get_type_hints(config_class)
    names = {field.name for field in dataclasses.fields(config_class)}
    values: dict[str, Any] = {}
    found = []
    for key, value in table.items():
        if key not in names and isinstance(value, dict):
            found.append(f"{path}: unknown table [{key}]; the flags stand above all tables")
            continue
        if key not in names:
            found.append(f"{path}: unknown key {key!r}{_nearest(key, names)}")
            continue
        value, problem = _convert(value, hints[key])
        if problem:
            found.append(f"{path}: key {key!r}: {problem}")
        values[key] = value
    problems(found)
    return values


def as_toml(config: Any) -> str:
    """The resolved `config` as TOML that `--config` reads back to an equal object.

    A field whose value is None is left out, since TOML has no null; None is such fields' default.
    """
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            lines.append(f"{field.name} = {_toml_value(value)}\n")
    return "".join(lines)


def save(config: Any, path: str | Path) -> None:
    """Write `as_toml` of the config."""
    with replaced(path) as aside:
        aside.write_text(as_toml(config), encoding="utf-8")


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


def _unknown_flags(config_class: type, flags: Sequence[str]) -> list[str]:
    names = {field.name for field in dataclasses.fields(config_class)}
    negations = {f"no_{name}" for name in names}
    found = []
    for word in flags:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and name and name not in names | negations | {"help"}:
            found.append(f"unknown flag {word.partition('=')[0]}{_nearest(name, names, '--')}")
    return found


def _nearest(key: str, names: set[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _with_defaults(config_class: type[C], values: dict[str, Any]) -> C:
    """An instance for tyro to take defaults from; required fields not in `values` stay missing."""
    import tyro

    missing = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(config_class)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return config_class(**{**missing, **values})


def _convert(value: Any, hint: Any) -> tuple[Any, str | None]:
    """Turn a TOML value into the type `hint`; the second item says what is wrong with it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:  # tyro.conf.Positional[...] and the like
        return _convert(value, args[0])
    if origin in (typing.Union, types.UnionType):
        for option in args:
            converted, problem = _convert(value, option)
            if problem is None:
                return converted, None
        return value, f"expected {_type_name(hint)}, got {value!r}"
    if origin is typing.Literal:
        ok = value in args
        return value, None if ok else f"expected one of {', '.join(map(repr, args))}, got {value!r}"
    if origin in (tuple, list):
        items = value if isinstance(value, list) else [value]
        converted_items = [_convert(item, args[0]) for item in items]
        problem = next((problem for _, problem in converted_items if problem), None)
        return origin(item for item, _ in converted_items), problem
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value), None
    if hint is Path and isinstance(value, str):
        return Path(value), None
    is_bool_for_int = hint is int and isinstance(value, bool)
    if isinstance(hint, type) and isinstance(value, hint) and not is_bool_for_int:
        return value, None
    return value, f"expected {_type_name(hint)}, got {value!r}"


def _type_name(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    names[Path] = "a path"
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return names.get(hint) or " or ".join(names.get(o, str(o)) for o in options) or str(hint)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        return _toml_string(str(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)  # int and float, inf and nan: Python writes them as TOML does


def _toml_string(text: str) -> str:
    """A TOML basic string: https://toml.io/en/v1.0.0#string."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    parts = [
        escapes.get(char) or (f"\\u{ord(char):04x}" if ord(char) < 32 or ord(char) == 127 else char)
        for char in text
    ]
    return '"' + "".join(parts) + '"'
