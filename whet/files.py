"""Files that are written: checked before the work, and whole or not at all."""

import errno
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from whet.errors import UserError

Kind = tuple[str, Callable[[Path], bool]]
"""What may be replaced: its name, and whether a file is one."""


def unwritable(
    flag: str, path: str | Path, others: Iterable[str | Path | None] = (), kind: Kind | None = None
) -> list[str]:
    """The problems of writing the file `path`; empty if there are none.

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
    """The problems of writing files into the folder `path`; empty if there are none."""
    if _is_any(path, others):
        return [f"{flag} {path}: the command reads or writes this already; give another path"]
    if os.path.exists(path) and not os.path.isdir(path):
        return [f"{flag} {path}: is a file; expected a folder to write"]
    return _unwritable_in(f"{flag} {path}", Path(path))


def nearest(folder: str | Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    path = Path(folder).absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def short_names(paths: list[str]) -> list[str]:
    """The paths without the folder that all of them share."""
    folders = {os.path.dirname(path) for path in paths}
    if len(folders) == 1:
        return [os.path.basename(path) or path for path in paths]
    try:
        shared = os.path.commonpath(folders)
    except ValueError:  # absolute and relative paths, or an empty list
        return list(paths)
    return [os.path.relpath(path, shared) if shared else path for path in paths]


def read_text(path: Path) -> str:
    """The text of the file `path`. Raises UserError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`. Raises UserError if it is missing or not an object."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # also nesting without end
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented UTF-8 JSON and flush it to the disk."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
    flush(path)


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A path beside `path`, whose file takes its name when the block succeeds; else nothing stays.

    Raises UserError where it cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.saving")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        yield aside
        flush(aside)
        os.replace(aside, path)
        flush(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            aside.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises UserError where it cannot be written."""
    with replaced(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def replaced_folder(
    folder: Path,
    nbytes: int,
    last: Iterable[str] = (),
    outdated: Callable[[Path], Iterable[Path]] = lambda folder: (),
) -> Iterator[Path]:
    """A temporary folder whose files replace those of `folder` when the block succeeds.

    `nbytes` is the space they will take. A new folder appears by one rename. In an existing one the
    files named in `last` are removed first and written last, so that a kill in between leaves a
    folder without them, never a mixture; its other files stay, except those `outdated` lists.
    Raises UserError if `folder` is a file or the disk is full.
    """
    created = not folder.exists()
    if not created and not folder.is_dir():
        raise UserError(f"{folder}: expected a folder to write into, found a file")
    parent = folder.parent if created else folder
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    aside = parent / f".{folder.name}.{os.getpid()}.saving"
    try:
        with full_disk_reported(folder, nbytes):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            for path in [*aside.rglob("*"), aside]:
                flush(path)
            if created:
                os.rename(aside, folder)
            else:
                _replace_files(aside, folder, set(last), outdated)
            flush(folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace_files(
    aside: Path, folder: Path, last: set[str], outdated: Callable[[Path], Iterable[Path]]
) -> None:
    for name in last:
        (folder / name).unlink(missing_ok=True)
    flush(folder)
    for path in outdated(folder):
        path.unlink(missing_ok=True)
    for path in sorted(aside.iterdir(), key=lambda path: path.name in last):
        if path.is_dir():  # such as further chat templates; one rename cannot replace a directory
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)


def remove_leftovers(folder: Path, *, locked: bool = False) -> None:
    """Remove what killed processes left half-written in `folder` (`.NAME.PROCESS.saving`).

    `locked`: nobody writes there now. Else the files of processes that run are kept; in a container
    that was started again, a number may be another process's by now.
    """
    for path in folder.glob(".*.saving"):
        process = path.name.split(".")[-2]
        if not process.isdigit() or (not locked and _runs(int(process))):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def full_disk_reported(path: Path, nbytes: int) -> Iterator[None]:
    """Raise UserError if `nbytes` do not fit on the disk of `path`, or if the block finds it full.

    A limit on the size of a file (`ulimit -f`) and a quota count as a full disk.
    """
    free = shutil.disk_usage(nearest(path)).free
    needed = f"{path}: no space: it needs {_size(nbytes)}, {_size(free)} are free"
    if nbytes > free:
        raise UserError(f"{needed}; free some or choose another --out")
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not (reason := _full(error)):
            raise
        raise UserError(f"{needed} ({reason}); nothing was written under its name") from None


def _full(error: Exception) -> str | None:
    """The system's words for a full disk if that is what `error` means. The libraries for weights
    report it in exceptions of their own."""
    if getattr(error, "errno", None) in _FULL:
        return os.strerror(error.errno)  # type: ignore[attr-defined]
    found = next((os.strerror(e) for e in _FULL if os.strerror(e) in str(error)), None)
    return "torch.save failed" if not found and "enforce fail" in str(error) else found


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _is_any(path: str | Path, others: Iterable[str | Path | None]) -> bool:
    return any(_is_same(path, other) for other in others if other)


def _is_same(path: str | Path, other: str | Path) -> bool:
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _unwritable_in(what: str, folder: Path) -> list[str]:
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)):
            return []
    except OSError as error:
        return [f"{what}: cannot be written: {error.strerror}"]


def is_pt(path: Path) -> bool:
    """Whether `path` is a file as torch.save writes them, a zip archive with a pickle in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


PT = (".pt file of torch", is_pt)
"""What a new `.pt` may replace: a `Kind`."""
