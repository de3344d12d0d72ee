"""Rows in a terminal: trained tokens green and underlined, or in brackets without colour."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from whet.chat.conversation import Origin
from whet.data.account import table
from whet.files import short_names
from whet.report.sheet import Sheet, document_name

LEFT_OUT_SHOWN = 10
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
    trained = np.asarray(mask) != 0
    starts = np.flatnonzero(np.diff(trained, prepend=~trained[:1]))
    parts = []
    for start, end in pairwise([*starts.tolist(), len(texts)]):
        text = "".join(texts[start:end])
        parts.append(marked(text, ink.trained) if trained[start] else text)
    return "".join(parts)


def header_lines(sheet: Sheet, ink: Ink) -> Iterator[str]:
    """What is known about the whole file."""
    filled, places = int(sheet.fills.sum()), max(len(sheet.fills) * sheet.width, 1)
    filled_share, trained_share = filled / places, sheet.trained / max(filled, 1)
    yield marked(sheet.title, ink.title)
    yield (
        f"{len(sheet.fills):,} rows of {sheet.width:,} tokens, {len(sheet.lengths):,} documents, "
        f"{100 * filled_share:.2f} % filled, {100 * trained_share:.1f} % trained"
    )
    for name, value in sheet.facts.items():
        yield f"{marked(name, ink.faint)} {value}"
    if sheet.accounts:
        yield ""
        yield table(sheet.accounts)
    if sheet.left_out_counts:
        yield ""
        yield "refused and left out"
        for kind, count in sheet.left_out_counts.items():
            yield f"  {count:,}: {kind}"
        yield ""
        said = dict.fromkeys(
            f"{Origin(o.source, o.line).where}: {o.reason}" for o in sheet.left_out
        )
        yield from (f"  {line}" for line in list(said)[:LEFT_OUT_SHOWN])
        if sum(sheet.left_out_counts.values()) > LEFT_OUT_SHOWN:
            yield "  … --html shows more"


def rule(text: str, ink: Ink) -> str:
    """A faint line across the terminal that begins with `text`."""
    return marked(f"── {text} ".ljust(78, "─"), ink.faint)


def row_lines(sheet: Sheet, row: int, ink: Ink) -> Iterator[str]:
    """Row `row` of the sheet, document after document."""
    (here,) = np.nonzero(sheet.documents["row"] == row)
    documents = sheet.documents[here]
    filled, trained = int(documents["length"].sum()), int(documents["trained"].sum())
    labels = short_names(sheet.sources)
    title = f"Row {sheet.first + row}"
    yield (
        f"{marked(title, ink.title)}  {len(documents)} documents, {filled:,} of {sheet.width:,} "
        f"places filled, {trained:,} trained"
    )
    for number, document in zip(here, documents, strict=True):
        start, length = int(document["start"]), int(document["length"])
        where = document_name(document, labels)
        end = start + length
        said = f"{where}: {length:,} tokens, {int(document['trained']):,} trained"
        weights = np.setdiff1d(sheet.mask[row, start:end], (0, 1))
        if len(weights):
            said += f", weights other than 1: {', '.join(f'{weight:g}' for weight in weights[:5])}"
        if sheet.notes:
            said = f"{sheet.notes[number]}: {said}"
        yield rule(said, ink)
        yield spans_text(sheet.text(row, start, end), sheet.mask[row, start:end], ink)
    if filled < sheet.width:
        yield rule(f"padding: {sheet.width - filled:,} places", ink)
