"""Self-contained HTML pages: a skeleton with its style, its script and its parts filled in.

No network, no fonts, no scripts but the page's own: its content security policy names the hashes of
style and script, so the browser runs nothing else, whatever text the data hold.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("page.css")
"""The style that most pages begin with."""


def fill(skeleton: Path, styles: Sequence[Path], script: Path | None = None, **parts: str) -> str:
    """The page as text: each `{{name}}` of the skeleton is that part."""
    style = "".join(file.read_text("utf-8") for file in styles)
    code = script.read_text("utf-8") if script is not None else ""
    values = {"style": style, "style_hash": _hash(style), **parts}
    values |= {"script": code, "script_hash": _hash(code)}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], skeleton.read_text("utf-8"))


def _hash(text: str) -> str:
    """What a content security policy calls a style or script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(value: Any) -> str:
    """JSON for a script element: nothing in it ends the element or opens a comment."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "words"
) -> str:
    """A section with a table; nothing without rows."""
    if not rows:
        return ""
    return f"<section><h2>{escape(title)}</h2>{grid(title, head, rows, kind)}</section>"


def grid(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "words"
) -> str:
    """The table alone, which scrolls where it is too wide. `kind` is the cells' class: words are
    wide."""
    top = "".join(f'<th scope="col" class="{kind}">{escape(word)}</th>' for word in head)
    body = "".join(
        f'<tr><th scope="row" class="{kind}">{escape(row[0])}</th>'
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )
