"""The chat page: one self-contained HTML page, whose scripts talk to this server only."""

import re
from functools import cache
from importlib.resources import files

from whet.report.page import csp_hash


@cache
def page() -> str:
    """The whole page as text."""
    style = _part("whet.report", "page.css") + _part("whet.serve", "chat.css")
    script = _part("whet.serve", "chat.js")
    values = {
        "style": style,
        "style_hash": csp_hash(style),
        "script": script,
        "script_hash": csp_hash(script),
    }
    return re.sub(
        r"\{\{(\w+)\}\}", lambda match: values[match[1]], _part("whet.serve", "chat.html")
    )


def _part(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")
