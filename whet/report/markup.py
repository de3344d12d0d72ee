"""Self-contained HTML pages: jinja templates that are filled with plain values.

No network, no fonts, no scripts but the page's own: its content security policy names the hashes of
style and script, so the browser runs nothing else, whatever text the data hold. What is filled in
is escaped, but for what a template itself marks as safe.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

HERE = Path(__file__).parent
STYLE = HERE / "page.css"
"""The style that most pages begin with."""


def fill(skeleton: Path, styles: Sequence[Path], script: Path | None = None, **values: Any) -> str:
    """The page as text: the template `skeleton`, which may import `parts.html`, with `values`."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader([skeleton.parent, HERE]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    style = "".join(file.read_text("utf-8") for file in styles)
    code = script.read_text("utf-8") if script is not None else ""
    values |= {"style": style, "style_hash": _hash(style), "script": code}
    return pages.get_template(skeleton.name).render(values, script_hash=_hash(code))


def _hash(text: str) -> str:
    """What a content security policy calls a style or script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
