"""One self-contained page of a comparison: curve, table, and replies side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whet.compare.measure import Measured
from whet.compare.table import grid
from whet.report.markup import fill

SHOWN = 200  # problems on the page; the JSON file has them all
WIDTH, HEIGHT, LEFT, BOTTOM = 480, 200, 48, 30  # of the curve; "100%" fits on a phone, too


def page(rows: Sequence[dict[str, Any]], measured: Sequence[Measured]) -> str:
    """The whole page as text."""
    here = Path(__file__)
    head, *body = grid(rows)
    return fill(
        here.with_name("page.html"),
        [here.with_name("page.css")],
        here.with_name("page.js"),
        title=" → ".join(row["model"] for row in rows),
        curve=_curve(rows),
        levels=[(_level(share), f"{share:.0%}") for share in (0.0, 0.5, 1.0)],
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT},
        head=head,
        numbers=body,
        data=_replies(measured),
    )


def _curve(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each model that has an accuracy: where it stands on the curve, and its interval."""
    measured = [row for row in rows if "accuracy" in row]
    step = (WIDTH - LEFT - 80) / max(1, len(measured) - 1)
    return [
        {
            "model": row["model"],
            "share": f"{row['accuracy']:.1%}",
            "x": round(LEFT + 40 + i * step, 1),
            "y": _level(row["accuracy"]),
            "top": _level(row["accuracy_high"]),
            "bottom": _level(row["accuracy_low"]),
        }
        for i, row in enumerate(measured)
    ]


def _level(share: float) -> float:
    """How far down a share of the problems is drawn."""
    high = HEIGHT - BOTTOM
    return round(high - share * (high - 10), 1)


def _replies(measured: Sequence[Measured]) -> dict[str, Any]:
    """The replies for page.js."""
    answered = [each for each in measured if each.replies]
    questions = answered[0].questions[:SHOWN] if answered else []
    return {
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
