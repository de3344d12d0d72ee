"""A tokenizer.json opened by the `tokenizers` library, whose Rust code a stranger's file can break.

Rust panics reach Python as a `PanicException`, which is no `Exception`; the library's errors are
bare `Exception`s. Both become a UserError here. A file whose normalizer or decoder makes ever more
of a text would take the machine's memory where nothing can stop it; so it is refused beforehand.
"""

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tokenizers

from whet.errors import UserError

ASCII = "".join(map(chr, range(32, 127)))
TRIED = (ASCII, "Hello there,\n\n  12345 ", "é 日本 👍🏽\u200b\x00\t", "a" * 99, "")
GROWTH = 1000  # times as long as a text its normalised form may be; real ones take up to 18
LARGEST = 100_000_000  # characters of one step's result


class TokenizerError(UserError):
    """The tokenizers library failed on a text."""


@contextmanager
def failures_named(where: str | Path) -> Iterator[None]:
    """Raise TokenizerError for what the tokenizers library raises, panics included."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        what = " ".join(str(error).split())[:300]
        raise TokenizerError(f"{where}: the tokenizers library can't: {what}") from None


def open_backend(json_text: str, file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of `json_text`, the content of `file`. Raises UserError if it is none."""
    with _quiet(), failures_named(file):
        _check_growth(_parsed(json_text, file), file)
        backend = tokenizers.Tokenizer.from_str(json_text)
        backend.no_truncation()  # some files carry a truncation, which would cut silently
        backend.no_padding()
        for text in TRIED:  # only for panics: a small vocabulary may well lack characters
            with suppress(Exception):
                backend.decode(backend.encode(text).ids, skip_special_tokens=False)
    return backend


def _parsed(json_text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(json_text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no tokenizer.json: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is no tokenizer.json: expected an object")
    return content


def _check_growth(content: dict[str, Any], file: Path) -> None:
    """Raise UserError if what `content` does to texts makes them very long: tried step by step."""
    for part in ("normalizer", "decoder"):
        steps = list(_steps(content.get(part)))
        written = "".join(str(step.get("pattern")) + str(step.get("content")) for step in steps)
        text = "".join(dict.fromkeys(ASCII + written[:100_000]))
        limit = GROWTH * len(text)
        for step in steps:
            kind = step.get("type")
            if kind == "Precompiled":
                _check_charsmap(step.get("precompiled_charsmap"), file)
            if kind not in ("Replace", "Prepend"):
                continue
            longest = len(text) * (1 + len(str(step.get("content", step.get("prepend")))))
            text = _normalised(text, step) if longest < LARGEST else text
            if longest >= LARGEST or len(text) > limit:
                raise UserError(
                    f"{file}: its {part} makes more than {GROWTH:,} characters of one ({kind} "
                    f"{str(step.get('pattern'))[:40]}); mend it or take another tokenizer"
                )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The single steps of a normalizer or decoder; sequences may hold sequences."""
    waiting = [part]
    while waiting:
        step = waiting.pop(0)
        if isinstance(step, dict):
            inner = step.get("normalizers") or step.get("decoders")
            if isinstance(inner, list):
                waiting[:0] = inner
            else:
                yield step


def _normalised(text: str, step: dict[str, Any]) -> str:
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    whole = {"version": "1.0", "added_tokens": [], "normalizer": step, "model": model}
    normalizer = tokenizers.Tokenizer.from_str(json.dumps(whole)).normalizer
    return str(normalizer.normalize_str(text))


def _check_charsmap(charsmap: Any, file: Path) -> None:
    """The library takes as much memory as the first four bytes say, even if no more follow."""
    try:
        content = base64.b64decode(charsmap, validate=True)
    except (TypeError, ValueError):
        content = b""
    if len(content) < 4 or int.from_bytes(content[:4], "little") > len(content) - 4:
        raise UserError(f"{file}: its precompiled_charsmap is damaged; take another tokenizer")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Rust writes on standard error when it panics from the terminal."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
