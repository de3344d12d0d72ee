"""One self-contained HTML page of a Sheet; skeleton, style and script lie beside this file."""

import base64
import zlib
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from whet.data.account import SourceAccount, totals
from whet.data.layout import DOCUMENT
from whet.files import short_names
from whet.report.figures import fills_figure, lengths_figure
from whet.report.markup import STYLE, embedded, fill, grid, table
from whet.report.sheet import Sheet

LEFT_OUT_SHOWN = 1000
"""More lines than this slow the page and help nobody; the count is always whole."""


def page(sheet: Sheet) -> str:
    """The whole page as text."""
    here = Path(__file__)
    return fill(
        here.with_name("page.html"),
        [STYLE],
        here.with_name("page.js"),
        title=escape(sheet.title),
        numbers=_numbers(sheet),
        facts=_definitions("facts", sheet.facts),
        figures=lengths_figure(sheet.lengths) + fills_figure(sheet.fills, sheet.width),
        turns=table(
            "Turns",
            ("turn", "role", "what is trained"),
            [(str(number), role, what) for number, role, what in sheet.turns],
        ),
        account=_account(sheet),
        left_out=_left_out(sheet),
        data=embedded(_payload(sheet)),
    )


# ---- The rows, for page.js ----


def _payload(sheet: Sheet) -> dict[str, Any]:
    """The rows as compressed arrays; a token is the number of its text, which knows its id."""
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


# ---- What Python draws itself ----


def _definitions(name: str, pairs: dict[str, str]) -> str:
    items = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in pairs.items()
    )
    return f'<dl class="{name}">{items}</dl>'


def _numbers(sheet: Sheet) -> str:
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
    return _definitions("numbers", numbers)


ACCOUNT = ("lines", "examples", "tokens", "trained", "context", "truncated", "dropped")


def _account(sheet: Sheet) -> str:
    """The token account, a row a source, the sum below, and each source's shares as a bar."""
    if not sheet.accounts:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ACCOUNT)
    names = short_names([account.source for account in sheet.accounts])
    body = [_account_row(a, name) for a, name in zip(sheet.accounts, names, strict=True)]
    if len(sheet.accounts) > 1:
        body.append(_account_row(totals(sheet.accounts), "total", ' class="total"'))
    return (
        '<section aria-labelledby="account-title"><h2 id="account-title">Token account</h2>'
        '<p class="note more">The table goes on to the right.</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Token account as a table">'
        f'<table><thead><tr><th scope="col">source</th>{head}'
        '<th scope="col" class="words">shares</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="note">tokens = trained + context + truncated + dropped. '
        "Bars: trained tall, context half as tall, truncated and dropped outlined.</p></section>"
    )


def _account_row(account: SourceAccount, name: str, attributes: str = "") -> str:
    if account.weight != 1:
        name += f" × {account.weight:g}"
    cells = "".join(f"<td>{getattr(account, column):,}</td>" for column in ACCOUNT)
    return (
        f'<tr{attributes}><th scope="row" class="words" '
        f'title="{escape(account.source)}">{escape(name)}</th>{cells}'
        f'<td class="bar-cell">{_shares(account)}</td></tr>'
    )


def _shares(account: SourceAccount) -> str:
    scale = 200 / max(account.tokens, 1)
    a, b = account.trained * scale, account.context * scale
    c = (account.truncated + account.dropped) * scale
    lost = f'<rect class="s-lost" x="{a + b:.2f}" y="6.5" width="{c:.2f}" height="5"/>' if c else ""
    return (
        '<svg viewBox="0 0 200 12" preserveAspectRatio="none" role="img" '
        f'aria-label="{a / 2:.1f} % trained">'
        f'<rect class="s-trained" width="{a:.2f}" height="12"/>'
        f'<rect class="s-context" x="{a:.2f}" y="6" width="{b:.2f}" height="6"/>{lost}</svg>'
    )


def _left_out(sheet: Sheet) -> str:
    """The lines that are not in the file, with their reasons, folded away."""
    total = sum(sheet.left_out_counts.values())
    if not total:
        return ""
    kinds = "".join(
        f"<li>{count:,}: {escape(kind)}</li>" for kind, count in sheet.left_out_counts.items()
    )
    first = sheet.left_out[:LEFT_OUT_SHOWN]
    rows = [(left.source, str(left.line or ""), left.reason) for left in first]
    more = f'<p class="note">{len(rows):,} of {total:,}; the list scrolls.</p>'
    return (
        f'<details id="left-out"><summary>{total:,} refused or left out</summary>'
        f"<ul>{kinds}</ul>{more}"
        f"{grid('Refused and left out', ('source', 'line', 'reason'), rows)}</details>"
    )
