"""Files that are written: whether a path can be, told before the work, and whole or not at all."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from whet.errors import UserError

Kind = tuple[str, Callable[[Path], bool]]
"""What may be replaced: its name, and whether a file is one."""


def unwritable(
    flag: str, path: str | Path, others: Iterable[str | Path | None] = (), kind: Kind | None = None
) -> list[str]:
    """What speaks against writing the file `path`; empty if nothing does.

    `others` are what the command reads or writes besides: none of it may be lost. With `kind`, a
    file that exists must be of this kind to be replaced.
    """
    if _is_any(path, others):
        return [f"{flag} {path}: the command reads or writes this already; give another path"]
    if os.path.isdir(path):
        return [f"{flag} {path}: is a directory; expected a file to write"]
    if os.path.exists(path) and not os.path.isfile(path):
        return [f"{flag} {path}: is a device or pipe; expected a file to write"]
    if kind and os.path.isfile(path) and os.path.getsize(path) and not kind[1](Path(path)):
        return [f"{flag} {path}: exists and is no {kind[0]}; give another name, or remove it"]
    return _unwritable_in(f"{flag} {path}", Path(path).absolute().parent)


def unwritable_folder(
    flag: str, path: str | Path, others: Iterable[str | Path | None] = ()
) -> list[str]:
    """The same for a folder that files are written into."""
    if _is_any(path, others):
        return [f"{flag} {path}: the command reads or writes this already; give another path"]
    if os.path.exists(path) and not os.path.isdir(path):
        return [f"{flag} {path}: is a file; expected a folder to write"]
    return _unwritable_in(f"{flag} {path}", Path(path))


def nearest(folder: str | Path) -> Path:
    """`folder`, or what is there of the folders above it."""
    path = Path(folder).absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A path beside `path`, whose file takes its name when the block succeeds; else nothing stays.

    Raises UserError where it cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            aside.unlink()


def _is_any(path: str | Path, others: Iterable[str | Path | None]) -> bool:
    return any(_is_same(path, other) for other in others if other)


def _is_same(path: str | Path, other: str | Path) -> bool:
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _unwritable_in(told: str, folder: Path) -> list[str]:
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)):
            return []
    except OSError as error:
        return [f"{told}: cannot be written: {error.strerror}"]
