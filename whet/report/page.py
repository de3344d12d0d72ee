"""One self-contained HTML page of a Sheet; template, style and script lie beside this file."""

import base64
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from whet.data.account import SourceAccount, totals
from whet.data.layout import DOCUMENT
from whet.files import short_names
from whet.report.markup import STYLE, fill
from whet.report.sheet import Sheet

LEFT_OUT_SHOWN = 1000
"""More lines than this slow the page and help nobody; the count is always whole."""
ACCOUNT = ("lines", "examples", "tokens", "trained", "context", "truncated", "dropped")
WIDTH, HEIGHT = 480, 150  # of the drawing, in its own units; the page scales it
BASE = HEIGHT - 22  # where the bars stand; below it the axis is labelled
TOP = 16  # room for the label of the highest bar
GAP = 1.5
Figure = dict[str, Any]
"""What `parts.html` draws."""


def page(sheet: Sheet) -> str:
    """The whole page as text."""
    here, figures = Path(__file__), []
    if len(sheet.lengths):
        figures.append(lengths_figure(sheet.lengths))
    if len(sheet.fills):
        figures.append(fills_figure(sheet.fills, sheet.width))
    return fill(
        here.with_name("page.html"),
        [STYLE],
        here.with_name("page.js"),
        title=sheet.title,
        numbers=_numbers(sheet),
        facts=sheet.facts,
        figures=figures,
        turns=sheet.turns,
        account=_account(sheet.accounts),
        columns=ACCOUNT,
        left_out=[(left.source, left.line or "", left.reason) for left in sheet.left_out],
        left_out_shown=LEFT_OUT_SHOWN,
        left_out_counts=sheet.left_out_counts,
        data=_payload(sheet),
    )


def _payload(sheet: Sheet) -> dict[str, Any]:
    """The rows for page.js, as compressed arrays; a token is the number of its text, which knows
    its id."""
    ids = np.zeros(len(sheet.texts), np.int32)
    ids[sheet.index.reshape(-1)] = sheet.tokens.reshape(-1)
    documents = sheet.documents
    binary = bool(np.isin(sheet.mask, (0, 1)).all())
    arrays = {
        "tokens": _packed(sheet.index.reshape(-1), "u2" if len(ids) <= 1 << 16 else "u4"),
        "mask": _packed(sheet.mask.reshape(-1), "u1" if binary else "f4"),
        "ids": _packed(ids, "i4"),
        **{name: _packed(documents[name], "i4") for name in DOCUMENT.names or ()},
    }
    return {
        "first": sheet.first,
        "n_rows": len(sheet.tokens),
        "width": sheet.width,
        "sources": sheet.sources,
        "labels": short_names(sheet.sources),
        "text": sheet.texts,
        "notes": sheet.notes,
        "arrays": arrays,
    }


def _packed(values: np.ndarray, kind: str) -> dict[str, str]:
    raw = np.ascontiguousarray(values, dtype="<" + kind).tobytes()
    return {"type": kind, "data": base64.b64encode(zlib.compress(raw)).decode()}


def _numbers(sheet: Sheet) -> dict[str, str]:
    """The numbers above all, by their names."""
    filled = int(sheet.fills.sum())
    places = max(len(sheet.fills) * sheet.width, 1)
    numbers = {
        "rows": f"{len(sheet.fills):,}",
        "tokens a row": f"{sheet.width:,}",
        "documents": f"{len(sheet.lengths):,}",
        "of the places filled": f"{100 * filled / places:.2f} %",
        "of the tokens trained": f"{100 * sheet.trained / max(filled, 1):.1f} %",
    }
    if len(sheet.tokens) < len(sheet.fills):
        numbers["rows on this page"] = f"{sheet.first:,} – {sheet.first + len(sheet.tokens) - 1:,}"
    return numbers


def _account(accounts: list[SourceAccount]) -> list[dict[str, Any]]:
    """The token account, a row a source with its shares as a bar, the sum below."""
    names = short_names([account.source for account in accounts])
    rows = list(zip(names, accounts, strict=True))
    if len(accounts) > 1:
        rows.append(("total", totals(accounts)))
    return [
        {
            "name": name + (f" × {account.weight:g}" if account.weight != 1 else ""),
            "source": account.source,
            "numbers": [f"{getattr(account, column):,}" for column in ACCOUNT],
            "shares": [
                200 * part / max(account.tokens, 1)
                for part in (account.trained, account.context, account.truncated + account.dropped)
            ],
        }
        for name, account in rows
    ]


# ---- Histograms, for parts.html to draw as SVG: no plotting library, and the page's colours ----


def lengths_figure(lengths: np.ndarray) -> Figure:
    """Histogram of the lengths of the documents, in tokens."""
    longest = int(lengths.max())
    edges = np.unique(np.linspace(0, longest, min(longest, 40) + 1).astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    median = float(np.median(lengths))
    words = (
        f"{len(lengths):,} documents, median {median:,.0f} tokens, "
        f"99 % within {np.percentile(lengths, 99):,.0f}, longest {longest:,}"
    )
    # np.histogram's bins are [from, to), except the last, which holds its upper edge as well.
    upper = [*(edges[1:-1] - 1), edges[-1]]
    names = [
        f"{a:,}–{b:,} tokens" if a != b else f"{a:,} tokens"
        for a, b in zip(edges[:-1], upper, strict=True)
    ]
    return _figure("Length of the documents", words, counts, names, edges, lambda x: f"{x:,.0f}")


def fills_figure(fills: np.ndarray, width: int) -> Figure:
    """Histogram of how much of each row is filled, in percent of its `width` places."""
    share = fills / width
    lowest = np.floor(share.min() * 20) / 20 if share.min() < 1 else 0.95
    edges = np.linspace(lowest, 1, 41)
    counts, _ = np.histogram(share, edges)
    full = int((fills == width).sum())
    words = f"{len(fills):,} rows, {full:,} full, {100 * share.mean():.2f} % of all places filled"
    names = [f"{100 * a:.1f}–{100 * b:.1f} % filled" for a, b in pairwise(edges)]
    return _figure("Fill of the rows", words, counts, names, edges, lambda x: f"{100 * x:.4g} %")


def _figure(
    title: str,
    words: str,
    counts: np.ndarray,
    names: list[str],
    edges: np.ndarray,
    label: Callable[[float], str],
) -> Figure:
    """Bars of `counts` over `edges` (one more than bars), the highest count, three ticks."""
    highest = int(counts.max())
    step = WIDTH / len(counts)
    bars = []
    for i, (count, name) in enumerate(zip(counts, names, strict=True)):
        # A bar of one document among a million must still be seen.
        height = max(1.5, (BASE - TOP) * count / highest) if count else 0
        place = (i * step, BASE - height, max(step - GAP, 1), height)
        bars.append((*(f"{number:.2f}" for number in place), f"{name}: {count:,}"))
    peak = (int(counts.argmax()) + 0.5) * step
    anchor = "start" if peak < 40 else "end" if peak > WIDTH - 40 else "middle"
    ends = {"start": (0, edges[0]), "middle": (WIDTH / 2, (edges[0] + edges[-1]) / 2)}
    ends |= {"end": (WIDTH, edges[-1])}
    at = peak if anchor == "middle" else ends[anchor][0]
    ticks = [(x, HEIGHT - 6, anchor, label(edge)) for anchor, (x, edge) in ends.items()]
    return {
        "title": title,
        "words": words,
        "width": WIDTH,
        "height": HEIGHT,
        "base": BASE,
        "bars": bars,
        "labels": [(f"{at:.1f}", TOP - 5, anchor, f"{highest:,}"), *ticks],
    }
