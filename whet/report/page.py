"""One self-contained HTML page of a Sheet: no network, no fonts, no scripts but its own.

The skeleton, style and script lie beside this file. The page's content security policy names the
hashes of the two, so the browser runs nothing else, whatever text the data holds.
"""

import base64
import hashlib
import json
import re
import zlib
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from whet.report.figures import fills_figure, lengths_figure
from whet.report.sheet import Sheet, short_names

REFUSALS_SHOWN = 1000
"""More lines than this slow the page and help nobody; the count is always whole."""


def page(sheet: Sheet) -> str:
    """The whole page as text."""
    style, script = _part("page.css"), _part("page.js")
    values = {
        "title": escape(sheet.title),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "numbers": _numbers(sheet),
        "facts": _definitions("facts", sheet.facts),
        "figures": lengths_figure(sheet.lengths) + fills_figure(sheet.fills, sheet.width),
        "account": _account(sheet),
        "refusals": _refusals(sheet),
        "data": _json(_payload(sheet)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _part("page.html"))


def _part(name: str) -> str:
    return files("whet.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or opens a comment."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


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
        **{name: _packed(documents[name], "i4") for name in documents.dtype.names},
    }
    return {
        "first": sheet.first,
        "n_rows": len(sheet.tokens),
        "width": sheet.width,
        "sources": sheet.sources,
        "labels": short_names(sheet.sources),
        "text": sheet.texts,
        "arrays": arrays,
    }


def _packed(values: np.ndarray, kind: str) -> dict[str, str]:
    raw = np.ascontiguousarray(values, dtype="<" + kind).tobytes()
    return {"type": kind, "data": base64.b64encode(zlib.compress(raw, 9)).decode()}


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
        "of the places filled": f"{100 * filled / places:.1f} %",
        "of the tokens trained": f"{100 * sheet.trained / max(filled, 1):.1f} %",
    }
    if len(sheet.tokens) < len(sheet.fills):
        numbers["rows on this page"] = f"{sheet.first:,} – {sheet.first + len(sheet.tokens) - 1:,}"
    return _definitions("numbers", numbers)


def _account(sheet: Sheet) -> str:
    """The token account, a row a source, the sum below, and each source's shares as a bar."""
    if not sheet.accounts:
        return ""
    columns = ("documents", "tokens", "trained", "context", "truncated", "dropped")
    rows = [(a.source, [int(getattr(a, name)) for name in columns]) for a in sheet.accounts]
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    body = [_account_row(source, counts, "") for source, counts in rows]
    if len(rows) > 1:
        sums = [sum(column) for column in zip(*(counts for _, counts in rows), strict=True)]
        body.append(_account_row("all", sums, ' class="total"'))
    return (
        '<section aria-labelledby="account-title"><h2 id="account-title">Token account</h2>'
        f'<div class="scroll"><table><thead><tr><th scope="col">source</th>{head}'
        f'<th scope="col" class="words">shares</th></tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        '<p class="note">tokens = trained + context + truncated + dropped. '
        "Bars: trained tall, context half as tall, truncated and dropped outlined.</p></section>"
    )


def _account_row(source: str, counts: list[int], attributes: str) -> str:
    cells = "".join(f"<td>{count:,}</td>" for count in counts)
    return (
        f'<tr{attributes}><th scope="row" class="words">{escape(source)}</th>{cells}'
        f'<td class="bar-cell">{_shares(*counts[1:])}</td></tr>'
    )


def _shares(tokens: int, trained: int, context: int, truncated: int, dropped: int) -> str:
    scale = 200 / max(tokens, 1)
    a, b, c = trained * scale, context * scale, (truncated + dropped) * scale
    lost = f'<rect class="s-lost" x="{a + b:.2f}" y="6.5" width="{c:.2f}" height="5"/>' if c else ""
    return (
        '<svg viewBox="0 0 200 12" preserveAspectRatio="none" role="img" '
        f'aria-label="{100 * trained / max(tokens, 1):.1f} % trained">'
        f'<rect class="s-trained" width="{a:.2f}" height="12"/>'
        f'<rect class="s-context" x="{a:.2f}" y="6" width="{b:.2f}" height="6"/>{lost}</svg>'
    )


def _refusals(sheet: Sheet) -> str:
    if not sheet.refused:
        return ""
    body = "".join(
        f'<tr><td>{escape(refusal.source)}</td><td>{refusal.line or ""}</td>'
        f'<td class="words">{escape(refusal.reason)}</td></tr>'
        for refusal in sheet.refusals[:REFUSALS_SHOWN]
    )
    shown = min(len(sheet.refusals), REFUSALS_SHOWN)
    more = f'<p class="note">The first {shown:,} are shown.</p>' if shown < sheet.refused else ""
    return (
        f'<details id="refusals"><summary>{sheet.refused:,} refused</summary>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Refusals"><table><thead><tr>'
        '<th scope="col">source</th><th scope="col">line</th><th scope="col" class="words">reason</th>'
        f"</tr></thead><tbody>{body}</tbody></table></div>{more}</details>"
    )
