"""`whet inspect`: see what is trained, token by token, in the terminal or as a page."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from whet.errors import UserError
from whet.files import write_text
from whet.flags.inspect import Config
from whet.progress import count, say
from whet.report.page import page
from whet.report.sheet import Sheet
from whet.report.terminal import choose_ink, header_lines, row_lines

T = TypeVar("T")
PAGE_ROWS = 1000
"""Rows on a page without --rows."""


def main(config: Config) -> None:
    """Print or write what `config` asks for."""
    if config.conversation:
        from whet.chat.chat import add_chat_tokens, load_tokenizer
        from whet.chat.template import read_variables
        from whet.report.conversation import conversation_lines, encode_line, encoded_sheet

        variables = read_variables(config.template_kwargs)
        chat = load_tokenizer(_required(config.tokenizer), config.chat_template)
        if config.chat_template:
            chat, _ = add_chat_tokens(chat, config.chat_template)
        shown = encode_line(config.conversation, chat.with_variables(variables))
        if config.html:
            _write(config.html, encoded_sheet(shown))
        else:
            _print(conversation_lines(shown, choose_ink()))
        return
    from whet.data.layout import KINDS
    from whet.data.store import PackedStore
    from whet.report.read import read_sheet

    store = PackedStore(_required(config.file), KINDS)
    first, end = _range(config, len(store))
    sheet = read_sheet(store, first, end, config.tokenizer)
    if config.html:
        _write(config.html, sheet)
    else:
        _print(_sheet_lines(sheet))


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
    write_text(path, page(sheet))
    say(f"{path}: {count(len(sheet.tokens), 'rows')}, {path.stat().st_size / 1e6:.1f} MB")
