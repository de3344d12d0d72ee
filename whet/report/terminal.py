"""Rows in a terminal: trained tokens green and underlined, or in brackets where there is no colour."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from whet.report.sheet import Sheet, SourceAccount, short_names

GREEN, GREY, BOLD, END = "\x1b[4;32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class Ink:
    """How trained text, margins and titles are marked."""

    trained: tuple[str, str]
    faint: tuple[str, str] = ("", "")
    title: tuple[str, str] = ("", "")

    @property
    def legend(self) -> str:
        """A line that says how trained tokens are marked."""
        return f"trained tokens look {self.trained[0]}like this{self.trained[1]}"


def choose_ink() -> Ink:
    """Colours on a terminal; brackets into files and where NO_COLOR is set (no-color.org)."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        return Ink((GREEN, END), (GREY, END), (BOLD, END))
    try:
        "⟦⟧".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return Ink(("[[", "]]"))
    return Ink(("⟦", "⟧"))


def marked(text: str, ink: tuple[str, str]) -> str:
    """`text` between the marks, line by line, so that a pager that cuts lines keeps the colours."""
    before, after = ink
    if not before.startswith("\x1b"):
        return before + text + after
    return "\n".join(f"{before}{line}{after}" if line else "" for line in text.split("\n"))


def spans_text(texts: Sequence[str], mask: np.ndarray, ink: Ink) -> str:
    """Tokens as running text, the trained spans marked."""
    if not texts:
        return ""
    trained = np.asarray(mask) > 0
    starts = np.flatnonzero(np.diff(trained, prepend=~trained[:1]))
    parts = []
    for start, end in zip(starts, [*starts[1:], len(texts)], strict=True):
        text = "".join(texts[start:end])
        parts.append(marked(text, ink.trained) if trained[start] else text)
    return "".join(parts)


def header_lines(sheet: Sheet, ink: Ink) -> Iterator[str]:
    """What is known about the whole file."""
    filled, places = int(sheet.fills.sum()), max(len(sheet.fills) * sheet.width, 1)
    yield marked(sheet.title, ink.title)
    yield (
        f"{len(sheet.fills):,} rows of {sheet.width:,} tokens, {len(sheet.lengths):,} documents, "
        f"{100 * filled / places:.2f} % filled, {100 * sheet.trained / max(filled, 1):.1f} % trained"
    )
    for name, value in sheet.facts.items():
        yield f"{marked(name, ink.faint)} {value}"
    if sheet.accounts:
        yield ""
        yield from account_lines(sheet.accounts)
    if sheet.refused:
        yield ""
        yield f"{sheet.refused:,} refused"
        for refusal in sheet.refusals[:10]:
            where = f"{refusal.source}:{refusal.line}" if refusal.line else refusal.source
            yield f"  {where}: {refusal.reason}"
        if sheet.refused > 10:
            yield f"  … {sheet.refused - 10:,} more: --html shows them"


def account_lines(accounts: Sequence[SourceAccount]) -> Iterator[str]:
    """The token account as a table, with a sum if there is more than one source."""
    columns = ("documents", "tokens", "trained", "context", "truncated", "dropped")
    rows = [[a.source, *(int(getattr(a, column)) for column in columns)] for a in accounts]
    if len(rows) > 1:
        rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(columns) + 1))])
    table = [["source", *columns], *([row[0], *(f"{n:,}" for n in row[1:])] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns) + 1)]
    for line in table:
        cells = [line[0].ljust(widths[0])]
        yield "  ".join(cells + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)])


def row_lines(sheet: Sheet, row: int, ink: Ink) -> Iterator[str]:
    """Row `row` of the sheet, document after document."""
    documents = sheet.documents[sheet.documents["row"] == row]
    filled, trained = int(documents["length"].sum()), int(documents["trained"].sum())
    labels = short_names(sheet.sources)
    title = f"Row {sheet.first + row}"
    yield (
        f"{marked(title, ink.title)}  {len(documents)} documents, {filled:,} of {sheet.width:,} "
        f"places filled, {trained:,} trained"
    )
    for document in documents:
        start, length = int(document["start"]), int(document["length"])
        name = labels[document["source"]] if 0 <= document["source"] < len(labels) else "unknown"
        where = f"{name}:{document['line']}" if document["line"] > 0 else name
        told = f"── {where}: {length:,} tokens, {int(document['trained']):,} trained "
        yield marked(told.ljust(78, "─"), ink.faint)
        end = start + length
        yield spans_text(sheet.text(row, start, end), sheet.mask[row, start:end], ink)
    if filled < sheet.width:
        told = f"── padding: {sheet.width - filled:,} places "
        yield marked(told.ljust(78, "─"), ink.faint)
