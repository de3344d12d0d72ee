"""The token account: of each source's tokens, how many are trained, context, truncated, dropped."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from whet.data.mixing import FATES, KEPT, Selection


@dataclass
class SourceAccount:
    """One source. `tokens` = `trained` + `context` + `truncated` + `dropped`, to the token.

    A copy (weight above 1) counts like any other conversation; what is left out counts once.
    """

    source: str
    weight: float = 1.0
    lines: int = 0  # read
    refused: dict[str, int] = field(default_factory=dict)  # lines, by kind of refusal
    conversations: int = 0  # encoded
    examples: int = 0  # written, copies counted
    tokens: int = 0
    trained: int = 0  # written, with a loss weight other than 0
    context: int = 0  # written, without
    truncated: int = 0  # cut off the end of written examples
    dropped: int = 0
    dropped_tokens: dict[str, int] = field(default_factory=dict)  # `dropped` by reason
    dropped_examples: dict[str, int] = field(default_factory=dict)
    truncated_examples: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def count(
    accounts: list[SourceAccount],
    source: np.ndarray,
    trained: np.ndarray,
    length: np.ndarray,
    selection: Selection,
    members: np.ndarray,
) -> None:
    """Add the examples `members` to the accounts of their sources.

    `source`, `trained` (tokens of the kept part) and `length` have one entry for each example.
    """
    for number, account in enumerate(accounts):
        own = members[source[members] == number]
        fate, copies = selection.fate[own], selection.copies[own]
        written = fate == KEPT
        kept, whole = selection.kept[own], length[own]
        account.examples += int(copies.sum())
        account.trained += int((copies * trained[own])[written].sum())
        account.context += int((copies * (kept - trained[own]))[written].sum())
        account.truncated += int((copies * (whole - kept))[written].sum())
        account.truncated_examples += int((copies * (kept < whole))[written].sum())
        account.tokens += int((copies * whole)[written].sum()) + int(whole[~written].sum())
        account.dropped += int(whole[~written].sum())
        for reason, name in enumerate(FATES):
            if reason != KEPT and (fate == reason).any():
                account.dropped_tokens[name] = int(whole[fate == reason].sum())
                account.dropped_examples[name] = int((fate == reason).sum())


def totals(accounts: list[SourceAccount]) -> SourceAccount:
    """The sum of all sources."""
    total = SourceAccount("total")
    for account in accounts:
        for name in NUMBERS:
            setattr(total, name, getattr(total, name) + getattr(account, name))
        for name in ("refused", "dropped_tokens", "dropped_examples"):
            sums = getattr(total, name)
            for key, value in getattr(account, name).items():
                sums[key] = sums.get(key, 0) + value
    return total


NUMBERS = (
    "lines",
    "conversations",
    "examples",
    "tokens",
    "trained",
    "context",
    "truncated",
    "dropped",
    "truncated_examples",
)
SHOWN = ("lines", "refused", "examples", "tokens", "trained", "context", "truncated", "dropped")


def table(accounts: list[SourceAccount]) -> str:
    """The account as a table for the terminal; a last line sums up more than one source."""
    rows = [["source", *SHOWN]]
    for account in [*accounts, totals(accounts)] if len(accounts) > 1 else accounts:
        numbers = {**account.as_dict(), "refused": sum(account.refused.values())}
        name = account.source if account.weight == 1 else f"{account.source} x {account.weight:g}"
        name = name if len(name) <= 40 else f"…{name[-39:]}"
        rows.append([name, *(f"{numbers[column]:,}" for column in SHOWN)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
