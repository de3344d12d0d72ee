"""A hook of mkdocs: formulas as MathML, which browsers draw themselves, without a script.

pymdownx.arithmatex has marked them; latex2mathml translates them.
"""

import re
from html import unescape
from typing import Any


def on_page_content(html: str, **page: Any) -> str:
    """Replace the marked formulas of a page."""
    html = re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', block, html, flags=re.S)
    return re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, html, flags=re.S)


def block(found: re.Match[str]) -> str:
    """A formula on a line of its own."""
    return mathml(found[1], "block")


def inline(found: re.Match[str]) -> str:
    """A formula within a line."""
    return mathml(found[1], "inline")


def mathml(tex: str, display: str) -> str:
    """TeX as MathML."""
    from latex2mathml.converter import convert

    return convert(unescape(tex), display=display)
