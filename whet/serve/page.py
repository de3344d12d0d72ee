"""The chat page: one self-contained HTML page, whose scripts talk to this server only."""

from functools import cache
from pathlib import Path

from whet.report.markup import STYLE, fill


@cache
def page() -> str:
    """The whole page as text."""
    here = Path(__file__)
    styles = [STYLE, here.with_name("chat.css")]
    return fill(here.with_name("chat.html"), styles, here.with_name("chat.js"))
