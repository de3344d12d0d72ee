"""Configurations: dataclass defaults < TOML file (`--config`) < command-line flags.

A configuration is a flat dataclass; the string under each field is its help text. Every flag can
stand in the TOML file under the same name. What a field takes stands in its type: besides the type
itself, `Annotated` holds functions that check a value, and the marks below. All problems are
reported at once, and an unknown key names the nearest one.
"""

import dataclasses
import json
import os
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from whet.elsewhere import nearest_flag
from whet.errors import UserError
from whet.files import Kind, unwritable, unwritable_folder, write_text

SHIPPED = Path(__file__).with_name("configs")
"""The TOML files that come with Whet; `whet configs` lists them."""

POSITIONAL = "positional"
"""Mark of a field that is given without its name, such as RUN in `whet chat RUN`."""
FIRST = "first"
"""Mark of a flag that most people set: the help begins with these."""
FREE = "free on resume"
"""Mark of a flag that may change when a run is resumed: the numbers do not depend on it."""
READ = "read"
"""Mark of a path that the command reads, and of the folder that it writes into: a `Written` file
never takes its place."""
PLACE = "place"
"""Mark of a text that may be a path: a leading `~` is the home directory."""

Place = Annotated[str, PLACE, READ]
"""A path or a name on the Hub."""


@dataclass(frozen=True)
class Written:
    """Mark of a file that the command writes; one that exists must be of its `kind`, if any."""

    kind: Kind | None = None


@dataclass(frozen=True)
class With:
    """Mark of a flag that does nothing unless the flag `other` is given, too."""

    other: str


def above_0(value: float) -> str:
    """A check of a number; like all checks it returns what is wrong, or nothing."""
    return "" if 0 < value < float("inf") else "expected a number above 0"


def at_least(least: int) -> Callable[[float], str]:
    """A check for counts and seeds: below 2**31, which all that counts holds."""

    def check(value: float) -> str:
        if least <= value < 2**31:
            return ""
        return f"expected {least} or more" + (", below 2^31" if value > least else "")

    return check


from_0, from_1 = at_least(0), at_least(1)


def share(value: float) -> str:
    """A fraction, both ends included."""
    return "" if 0 <= value <= 1 else "expected a number from 0 to 1"


def below_1(value: float) -> str:
    """A fraction that is not the whole."""
    return "" if 0 <= value < 1 else "expected a number from 0 to below 1"


def existing_file(value: Path) -> str:
    """A file that is there."""
    if Path(value).is_dir():
        return "is a directory; expected a file"
    return "" if Path(value).exists() else "no such file"


def existing_dir(value: Path) -> str:
    """A directory that is there."""
    return "" if Path(value).is_dir() else "is no directory"


def packed_file(value: Path) -> str:
    """A file that is there, with the way to make one; what is in it is examined when it is open."""
    if Path(value).is_dir():
        return "is a directory; expected a packed file of `whet prepare`"
    return "" if Path(value).is_file() else "no such file; `whet prepare` makes packed files"


def in_folder(value: Path) -> str:
    """A file to be written, into a folder that is there."""
    parent = value.absolute().parent
    return "" if parent.is_dir() else f"its folder {parent} does not exist"


def writable_folder(value: Path) -> str:
    """A folder to be written."""
    return "".join(unwritable_folder("", value)).removeprefix(f" {value}: ")


InputFile = Annotated[Path, existing_file, READ]
PackedFile = Annotated[Path, packed_file, READ]
InputDir = Annotated[Path, existing_dir, READ]
OutputFile = Annotated[Path, Written()]


def problems(found: Sequence[str]) -> None:
    """Raise one UserError that reports all of `found`, or return if there are none."""
    if found:
        raise UserError("\n".join(found))


@contextmanager
def collected(found: list[str]) -> Iterator[None]:
    """Add the UserError that the block raises to `found` instead, to be reported with others."""
    try:
        yield
    except UserError as error:
        found += str(error).splitlines()


def hints_of(config_class: type) -> dict[str, Any]:
    """The types of a dataclass's fields with their marks; of a ClassVar nobody may set one."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def refusals(config_class: type, values: Mapping[str, Any]) -> list[str]:
    """What the fields' own checks refuse of `values` of these names, and outputs among them that
    would replace an input or another file; a line each."""
    hints = hints_of(config_class)
    found = [
        f"{flag_of(config_class, name)} {each}: {wrong}"
        for name, value in values.items()
        for each, wrong in refused(value, hints[name])
    ]
    read = [p for name, v in values.items() if READ in marks(hints[name]) for p in parts_of(v)]
    for name, value in values.items():
        for mark in marks(hints[name]):
            if isinstance(mark, Written) and value is not None:
                found += unwritable(flag_of(config_class, name), value, read, mark.kind)
                read.append(value)
    return found


def check(config: Any, also: Sequence[str] = ()) -> None:
    """Refuse values that a field's own checks refuse, flags that would do nothing, and outputs that
    would replace an input.

    `also` are further problems, which are reported with these.
    """
    hints = hints_of(type(config))
    problems([*refusals(type(config), vars(config)), *_idle(config, hints), *also])


def _idle(config: Any, hints: Mapping[str, Any]) -> list[str]:
    """Flags that are set although what they belong to is not."""
    return [
        f"{flag_of(type(config), field.name)}: does nothing without --{mark.other}"
        + " above 0" * (type(getattr(config, mark.other)) in (int, float))
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
        for mark in marks(hints[field.name])
        if isinstance(mark, With) and not getattr(config, mark.other)
    ]


def refused(value: Any, hint: Any) -> list[tuple[Any, str]]:
    """(value, what is wrong) by the checks of a field; of a tuple for each value in it."""
    tests = [mark for mark in marks(hint) if callable(mark)]
    return [(each, wrong) for each in parts_of(value) for test in tests if (wrong := test(each))]


def parts_of(value: Any) -> list[Any]:
    """The values of a field: one, those of a tuple, or none."""
    values = value if isinstance(value, tuple) else (value,)
    return [each for each in values if each is not None]


def wrong_values(record: Any) -> list[str]:
    """What is wrong with the fields of a dataclass that a file was read into: `NAME is VALUE;
    expected …`, by their types and checks."""
    found = []
    for name, hint in hints_of(type(record)).items():
        value = getattr(record, name)
        _, problem = convert(value, hint)
        wrong = [problem.rpartition(", got ")[0]] if problem else []
        wrong += [] if problem else [what for _, what in refused(value, hint)]
        if wrong:
            shown = list(value) if isinstance(value, tuple) else value
            found.append(f"{name} is {shown!r}; {wrong[0]}")
    return found


def marks(hint: Any) -> list[Any]:
    """The checks and marks of a field, also those of the types that its own type is made of."""
    found = list(getattr(hint, "__metadata__", ()))
    inner = [hint.__origin__] if found else typing.get_args(hint)
    if typing.get_origin(hint) is not typing.Literal:
        for part in inner:
            found += marks(part)
    return found


def marked(config_class: type, mark: str) -> list[str]:
    """The fields with this mark."""
    hints = hints_of(config_class)
    return [name for name, hint in hints.items() if mark in marks(hint)]


def read_toml(
    config_class: type, path: str | Path, wrong: dict[str, str] | None = None
) -> dict[str, Any]:
    """Read `path` and check every key and type against the fields of `config_class`, as
    `read_table` does. Raises UserError if it is not TOML."""
    try:
        table = tomllib.loads(_config_file(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"--config {path}: there is no such file, and `whet configs` has none of that name"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # also numbers and nesting without end
        raise UserError(f"--config {path}: not valid TOML: {error}") from None
    return read_table(config_class, table, path, wrong)


def read_table(
    config_class: type,
    table: dict[str, Any],
    where: str | Path,
    wrong: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The values of `table`, whose keys are fields, in the fields' types; `where` it stands.

    Raises UserError for all unknown keys and wrong values together, or, given `wrong`, puts them
    there by their keys, to be reported with others, and returns the values that are right.
    """
    hints = hints_of(config_class)
    values: dict[str, Any] = {}
    found: dict[str, str] = {}
    for key, given in table.items():
        if key not in hints and isinstance(given, dict):
            found[key] = f"{where}: unknown table [{key}]; the flags stand above all tables"
            continue
        if key not in hints:
            found[key] = f"{where}: unknown key {key!r}{nearest_flag(key, hints)}"
            continue
        value, problem = convert(given, hints[key])
        if problem:
            found[key] = f"{where}: key {key!r}: {problem}"
        else:
            values[key] = value
    if wrong is None:
        problems(list(found.values()))
    else:
        wrong |= found
    return values


def _config_file(path: str | Path) -> Path:
    """The file at `path`, else the one of that name that comes with Whet."""
    file = Path(path).expanduser()
    shipped = SHIPPED / f"{str(path).removesuffix('.toml')}.toml"
    return shipped if not file.exists() and shipped.is_file() else file


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
    write_text(path, as_toml(config))


def convert(value: Any, hint: Any, text: bool = False) -> tuple[Any, str | None]:
    """Turn a TOML value, or the `text` of a flag, into the type `hint`; the second item says what
    is wrong with it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if PLACE in args and isinstance(value, str):
            value = os.path.expanduser(value)
        return convert(value, args[0], text)
    if origin in (typing.Union, types.UnionType):
        if text and value == "None" and type(None) in args:
            return None, None
        for option in args:
            converted, problem = convert(value, option, text)
            if problem is None:
                return converted, None
        return value, f"expected {_type_name(hint)}, got {value!r}"
    if origin is typing.Literal:
        ok = value in args
        return value, None if ok else f"expected one of {', '.join(map(repr, args))}, got {value!r}"
    if hint is Any:
        return value, None
    if origin is dict:
        return value, None if isinstance(value, dict) else f"expected a table, got {value!r}"
    if origin in (tuple, list):
        items = value if isinstance(value, list | tuple) else [value]
        converted_items = [convert(item, args[0], text) for item in items]
        problem = next((problem for _, problem in converted_items if problem), None)
        return origin(item for item, _ in converted_items), problem
    if text and hint in (int, float):
        with suppress(ValueError):
            return hint(value), None
    if hint is float and type(value) is int and abs(value) < 2**1023:  # more is no float
        return float(value), None
    if hint is Path and isinstance(value, str):
        return Path(os.path.expanduser(value)), None
    is_bool_for_int = hint is int and isinstance(value, bool)
    if isinstance(hint, type) and isinstance(value, hint) and not is_bool_for_int:
        return value, None
    return value, f"expected {_type_name(hint)}, got {value!r}"


def flag_of(config_class: type, name: str) -> str:
    """How the user writes a field: `--name`, or NAME for what has no flag."""
    return name.upper() if name in marked(config_class, POSITIONAL) else f"--{name}"


def _type_name(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    names[Path] = "a path"
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return names.get(hint) or " or ".join(map(_type_name, options)) or str(hint)


def _toml_value(value: Any) -> str:
    """TOML writes texts, lists and true as JSON does, but for DEL; numbers as Python does, inf and
    nan included: https://toml.io/en/v1.0.0."""
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")
