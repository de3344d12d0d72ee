"""Files that appear whole or not at all, and JSON."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from whet.errors import UserError
from whet.model.hf.weights import INDEX

_WEIGHTS = re.compile(r"(adapter_)?model\.safetensors|model-\d{5}-of-\d{5}\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`. Raises UserError if it is missing or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # also nesting without end
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented UTF-8 JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


@contextmanager
def written_aside(directory: Path, nbytes: int) -> Iterator[Path]:
    """A temporary directory whose files replace those of `directory` when the block succeeds.

    A new directory appears by one rename. In an existing one `config.json` (of an adapter:
    `adapter_config.json`) goes first and comes last: a directory without it is no model, so a kill
    in between leaves none, never a mixture.
    """
    created = not directory.exists()
    if not created and not directory.is_dir():
        raise UserError(f"{directory}: expected a directory to save the model in, found a file")
    parent = directory.parent if created else directory
    parent.mkdir(parents=True, exist_ok=True)
    aside = parent / f".{directory.name}.{os.getpid()}.saving"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with on_full_disk(directory, nbytes):
            aside.mkdir()
            yield aside
            for file in aside.rglob("*"):
                sync(file)
            sync(aside)
            if created:
                os.rename(aside, directory)
            else:
                _replace_files(aside, directory)
            sync(directory)
            sync(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace_files(aside: Path, directory: Path) -> None:
    markers = ("config.json", "adapter_config.json")
    for name in markers:
        (directory / name).unlink(missing_ok=True)
    sync(directory)
    for old in _old_weights(directory):
        old.unlink(missing_ok=True)
    for file in sorted(aside.iterdir(), key=lambda file: file.name in markers):
        if file.is_dir():  # further chat templates; a directory can't be replaced in one step
            shutil.rmtree(directory / file.name, ignore_errors=True)
        os.replace(file, directory / file.name)


def _old_weights(directory: Path) -> list[Path]:
    """The files of the model that lies there; weights of any other name may be another model's."""
    indexed: Any = None
    with suppress(OSError, ValueError):
        indexed = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    weight_map = indexed.get("weight_map") if isinstance(indexed, dict) else None
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    return [
        file
        for file in directory.iterdir()
        if file.name == INDEX or file.name in named or _WEIGHTS.fullmatch(file.name)
    ]


@contextmanager
def on_full_disk(path: Path, nbytes: int) -> Iterator[None]:
    """Tell a full disk in one line: beforehand if the weights can't fit, else when it happens."""
    parent = next(folder for folder in [path, *path.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(parent).free
    full = f"{path}: no space: the model needs {_size(nbytes)}, {_size(free)} are free"
    if nbytes > free:
        raise UserError(f"{full}; free some or choose another --out")
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        no_space = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if no_space or "No space left" in str(error) or "enforce fail" in str(error):
            raise UserError(f"{full}; nothing was written under its name") from None
        raise


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def sync(path: Path) -> None:
    """Ask the system to bring a file, or the names in a directory, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
