"""The token account: of each source's tokens, how many are trained, context, truncated, dropped."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from whet.data.mixing import FATES, KEPT
from whet.data.reader import Source
from whet.data.writing import Tables


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


def accounts_of(
    sources: Sequence[Source], tables: Tables, members: np.ndarray, *, training: bool
) -> list[SourceAccount]:
    """Each source's account of the examples `members`, which are those of one packed file.

    Lines, refusals and weights belong to the training file.
    """
    selection, owner = tables.selection, tables.examples["conversation"]
    fate, length, trained = selection.fate, tables.examples["length"], tables.trained
    accounts = []
    for number, source in enumerate(sources):
        own = members[tables.conversations["source"][owner[members]] == number]
        written = own[fate[own] == KEPT]
        copies, kept, whole = selection.copies[written], selection.kept[written], length[written]
        left = {name: own[fate[own] == i] for i, name in enumerate(FATES) if i != KEPT}
        account = SourceAccount(
            source.path,
            conversations=len(np.unique(owner[own])),
            examples=int(copies.sum()),
            trained=int((copies * trained[written]).sum()),
            context=int((copies * (kept - trained[written])).sum()),
            truncated=int((copies * (whole - kept)).sum()),
            truncated_examples=int((copies * (kept < whole)).sum()),
            dropped=int(length[own].sum() - whole.sum()),
            dropped_tokens={name: int(length[i].sum()) for name, i in left.items() if len(i)},
            dropped_examples={name: len(i) for name, i in left.items() if len(i)},
        )
        account.tokens = int((copies * whole).sum()) + account.dropped
        if training:
            spool, account.weight = tables.spool, source.weight
            account.lines = spool.lines[number]
            account.refused = {k: n for (s, k), n in spool.refused.items() if s == number}
        accounts.append(account)
    return accounts


def totals(accounts: Sequence[SourceAccount]) -> SourceAccount:
    """The sum of all sources."""
    total = SourceAccount("total")
    for account in accounts:
        for name, value in vars(account).items():
            if isinstance(value, dict):
                sums = getattr(total, name)
                sums |= {key: sums.get(key, 0) + n for key, n in value.items()}
            elif name not in ("source", "weight"):
                setattr(total, name, getattr(total, name) + value)
    return total


SHOWN = ("lines", "refused", "examples", "tokens", "trained", "context", "truncated", "dropped")


def table(accounts: list[SourceAccount]) -> str:
    """The account as a table for the terminal; a last line sums up more than one source."""
    rows = [["source", *SHOWN]]
    for account in [*accounts, totals(accounts)] if len(accounts) > 1 else accounts:
        numbers = {**vars(account), "refused": sum(account.refused.values())}
        name = account.source if account.weight == 1 else f"{account.source} x {account.weight:g}"
        name = name if len(name) <= 40 else f"…{name[-39:]}"
        rows.append([name, *(f"{numbers[column]:,}" for column in SHOWN)])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
    lines = [form.format(*row) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
