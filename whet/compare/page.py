"""One self-contained page of a comparison: curve, table, and replies side by side."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from whet.compare.measure import Measured
from whet.compare.table import grid
from whet.report.markup import embedded, fill, table

SHOWN = 200  # problems on the page; the JSON file has them all
WIDTH, HEIGHT, LEFT, BOTTOM = 480, 200, 40, 30  # of the curve, in its own units


def page(rows: Sequence[dict[str, Any]], measured: Sequence[Measured]) -> str:
    """The whole page as text."""
    here = Path(__file__)
    head, *body = grid(rows)
    return fill(
        here.with_name("page.html"),
        [here.with_name("page.css")],
        here.with_name("page.js"),
        title=escape(" → ".join(row["model"] for row in rows)),
        curve=_curve(rows),
        numbers=table("Numbers", head, body),
        data=_replies(measured),
    )


def _curve(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy over the models, with its interval; nothing where no model has one."""
    points = [(i, row) for i, row in enumerate(rows) if "accuracy" in row]
    if not points:
        return ""
    step = (WIDTH - LEFT - 40) / max(1, len(rows) - 1)
    high = HEIGHT - BOTTOM

    def at(i: int, share: float) -> tuple[float, float]:
        return LEFT + 20 + i * step, high - share * (high - 10)

    line = " ".join("{:.1f},{:.1f}".format(*at(i, row["accuracy"])) for i, row in points)
    marks = ""
    for i, row in points:
        x, y = at(i, row["accuracy"])
        (_, top), (_, bottom) = at(i, row["accuracy_high"]), at(i, row["accuracy_low"])
        marks += (
            f'<line class="interval" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(row["model"])}: '
            f"{row['accuracy']:.1%}</title></circle>"
            f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(row["model"])}</text>'
        )
    grid = ""
    for share in (0.0, 0.5, 1.0):
        _, y = at(0, share)
        grid += (
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        )
    return (
        "<figure><figcaption>Right replies<small>greedy, with the 95 % interval</small>"
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Share of right replies of each model">{grid}'
        f'<polyline class="curve" points="{line}"/>{marks}</svg></figure>'
    )


def _replies(measured: Sequence[Measured]) -> str:
    """The replies for page.js."""
    answered = [each for each in measured if each.replies]
    questions = answered[0].questions[:SHOWN] if answered else []
    content = {
        "models": [each.name for each in answered],
        "problems": [
            {
                "question": str(question),
                "replies": [each.replies[i] for each in answered],
                "right": [each.right[i] for each in answered],
            }
            for i, question in enumerate(questions)
        ],
    }
    return embedded(content)
