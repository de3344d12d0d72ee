"""The table across the stages: a row a model, what each has gained and lost; as text and as a page.

The page is self-contained: the curve, the table, and the replies side by side.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from whet.compare.measure import Measured
from whet.evaluate.answers import gained_and_lost, mcnemar
from whet.report.markup import embedded, fill, table

SHOWN = 200  # problems on the page; the JSON file has them all
WIDTH, HEIGHT, LEFT, BOTTOM = 480, 200, 40, 30  # of the curve, in its own units
COLUMNS = (
    # number, heading, how it is written
    ("accuracy", "right", "{:.1%}"),
    ("gained", "gained", "+{:d}"),
    ("lost", "lost", "-{:d}"),
    ("p", "p", "{:.2g}"),
    ("unstopped", "unstopped", "{:.1%}"),
    ("reply_tokens", "tokens a reply", "{:.0f}"),
    ("reward", "reward", "{:.3f}"),
    ("sampled_reward", "of samples", "{:.3f}"),
    ("pair_accuracy", "pairs right", "{:.1%}"),
    ("dev_loss", "dev loss", "{:.4f}"),
    ("kl_to_first", "nats from the first", "{:.2f}"),
)


def rows_of(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The numbers of each model, and its difference from the model before it.

    `gained` and `lost` are problems that it alone, or the one before alone, has right; `p` is the
    exact p-value of their difference.
    """
    rows: list[dict[str, Any]] = []
    before: Measured | None = None
    for each in measured:
        row: dict[str, Any] = {"model": each.name, **each.numbers}
        if each.right and before is not None:
            gained, lost = gained_and_lost(before.right, each.right)
            row |= {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}
        rows.append(row)
        before = each if each.right else before
    return rows


def columns_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The columns of which some row has a number; pass@k after the accuracy."""
    found = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("pass@"))
    return [*found[:1], *((name, name, "{:.1%}") for name in names), *found[1:]]


def cell(row: dict[str, Any], column: tuple[str, str, str]) -> str:
    """A number as it is written, with its 95 % interval if it has one."""
    name, _, form = column
    if name not in row:
        return ""
    text = form.format(row[name])
    if f"{name}_low" in row:
        text += f" ({row[f'{name}_low']:.1%} to {row[f'{name}_high']:.1%})"
    return text


def grid(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table as texts, headings first."""
    columns = columns_of(rows)
    head = ["model", *(heading for _, heading, _ in columns)]
    return [head, *([row["model"], *(cell(row, column) for column in columns)] for row in rows)]


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal: as it is, a table in Markdown."""
    lines = grid(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = f"| {' | '.join(f'{{:<{width}}}' for width in widths)} |"
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([form.format(*lines[0]), rule, *(form.format(*line) for line in lines[1:])])


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
    axis = ""
    for share in (0.0, 0.5, 1.0):
        _, y = at(0, share)
        axis += (
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        )
    return (
        "<figure><figcaption>Right replies<small>greedy, with the 95 % interval</small>"
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Share of right replies of each model">{axis}'
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
