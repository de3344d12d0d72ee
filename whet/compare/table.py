"""The table across the stages: a row a model, and what each has gained and lost."""

from collections.abc import Sequence
from typing import Any

from whet.compare.measure import Measured
from whet.evaluate.answers import gained_and_lost, mcnemar

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
