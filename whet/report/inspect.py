"""`whet inspect`: see what is trained, token by token, in the terminal or as a page."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from whet.config import problems
from whet.errors import UserError
from whet.files import replaced, unwritable
from whet.progress import say
from whet.report.page import page
from whet.report.sheet import Sheet
from whet.report.terminal import choose_ink, header_lines, row_lines

T = TypeVar("T")
PAGE_ROWS = 1000
"""Rows on a page unless --rows says otherwise."""


@dataclass(frozen=True)
class Config:
    """Show packed rows, or one conversation, with what is trained."""

    file: tyro.conf.Positional[Path | None] = None
    """A packed file that `whet prepare` wrote, or any HDF5 file with tokens and loss_mask."""
    row: int | None = None
    """Show this row, from 0. Without --row and --rows: row 0, or a page of the first 1,000."""
    rows: str | None = None
    """Show rows A:B, from A up to but not including B; either may be left out."""
    html: Path | None = None
    """Write one self-contained page to this file instead of printing rows."""
    conversation: str | None = None
    """FILE.jsonl:LINE, counted from 1 (.json, .parquet: FILE:NUMBER of the record): show how this
    conversation is encoded. Needs --tokenizer."""
    tokenizer: Path | None = None
    """Model or tokenizer directory; for a packed file the one that it was prepared with."""
    chat_template: str | None = None
    """plain, chatml or a jinja file, for --conversation; the tokenizer's own if not given."""
    template_kwargs: str | None = None
    """Further variables for that template: a JSON object, as '{"enable_thinking": false}'."""


def main(config: Config) -> None:
    """Print or write what `config` asks for."""
    _check(config)
    if config.conversation:
        from whet.chat.chat import load_tokenizer
        from whet.chat.template import read_variables
        from whet.report.conversation import conversation_lines, encode_line, encoded_sheet

        chat = load_tokenizer(_required(config.tokenizer), config.chat_template)
        shown = encode_line(config.conversation, chat, read_variables(config.template_kwargs))
        if config.html:
            _write(config.html, encoded_sheet(shown))
        else:
            _print(conversation_lines(shown, choose_ink()))
        return
    from whet.data.check import KINDS
    from whet.data.store import PackedStore
    from whet.report.read import read_sheet

    store = PackedStore(_required(config.file), KINDS)
    first, end = _range(config, len(store))
    sheet = read_sheet(store, first, end, config.tokenizer)
    if config.html:
        _write(config.html, sheet)
    else:
        _print(_sheet_lines(sheet))


def _check(config: Config) -> None:
    found = []
    if (config.file is None) == (config.conversation is None):
        found.append("whet inspect: give a packed file, or --conversation FILE.jsonl:LINE")
    if config.conversation and not config.tokenizer:
        found.append("--conversation: needs --tokenizer DIR, whose template renders it")
    if (config.chat_template or config.template_kwargs) and not config.conversation:
        found.append(
            "--chat_template and --template_kwargs: a packed file is rendered already; "
            "they go with --conversation"
        )
    if config.row is not None and config.rows is not None:
        found.append("--row and --rows: give one of them")
    if config.conversation and (config.row is not None or config.rows is not None):
        found.append("--row and --rows: go with a packed file, not with --conversation")
    if config.html is not None:
        conversations = (config.conversation or "").rpartition(":")[0]
        inputs = [config.file, conversations, config.tokenizer, config.chat_template]
        found += unwritable("--html", config.html, inputs)
    problems(found)


def _required(value: T | None) -> T:
    assert value is not None  # _check saw to it
    return value


def _range(config: Config, n_rows: int) -> tuple[int, int]:
    """First row and the row after the last one that are shown."""
    if config.row is not None:
        return config.row, config.row + 1
    if config.rows is None:
        return 0, min(n_rows, PAGE_ROWS if config.html else 1)
    match = re.fullmatch(r"(\d*):(\d*)", config.rows)
    if not match:
        raise UserError(f"--rows {config.rows}: expected A:B, such as 0:100 (the first 100 rows)")
    first, end = int(match[1] or 0), int(match[2] or n_rows)
    return first, min(end, n_rows)


def _sheet_lines(sheet: Sheet) -> Iterator[str]:
    ink = choose_ink()
    yield from header_lines(sheet, ink)
    yield ink.legend
    for row in range(len(sheet.tokens)):
        yield ""
        yield from row_lines(sheet, row, ink)


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        say(line)


def _write(path: Path, sheet: Sheet) -> None:
    with replaced(path) as aside:
        aside.write_text(page(sheet), encoding="utf-8")
    say(f"{path}: {len(sheet.tokens):,} rows, {path.stat().st_size / 1e6:.1f} MB")
