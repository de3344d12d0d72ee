"""One self-contained HTML page of a Sheet; template, style and script lie beside this file."""

import base64
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from whet.data.account import SourceAccount, totals
from whet.data.layout import DOCUMENT
from whet.files import short_names
from whet.report.figures import fills_figure, lengths_figure
from whet.report.markup import STYLE, fill
from whet.report.sheet import Sheet

LEFT_OUT_SHOWN = 1000
"""More lines than this slow the page and help nobody; the count is always whole."""
ACCOUNT = ("lines", "examples", "tokens", "trained", "context", "truncated", "dropped")


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
