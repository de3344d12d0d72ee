"""What `whet prepare` leaves out: told to the user, recorded in the file for `whet inspect`."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from whet.chat.certificate import REASONS, Refusal
from whet.chat.conversation import place
from whet.config import problems
from whet.data.account import SourceAccount
from whet.data.decontaminate import Evaluations
from whet.data.mixing import CONTAMINATED, DUPLICATE, FATES, KEPT, OVERLONG
from whet.data.spool import KEPT_REFUSALS, Spool
from whet.data.writing import Encoded

SHOWN = 20
"""Refused lines that are shown on the screen."""
SAME = 3
"""Refused lines of one reason that are shown."""
NAMES = re.compile(r'\d+|".*"')
UNREADABLE = "datum"
"""The kind of refusal that --bad_lines is about; --uncertain is about all others."""

Policy = Literal["error", "drop"]


def stop_at_refusals(
    spool: Spool, bad_lines: Policy, uncertain: Policy, *, has_flags: bool
) -> None:
    """Raise UserError with the first refused lines, unless the flags say to leave them out.

    `has_flags`: whether the command that the user gave has these flags.
    """
    bad = sum(n for (_, kind), n in spool.refused.items() if kind == UNREADABLE)
    unsure = spool.refused.total() - bad
    ways = []
    if bad and bad_lines == "error":
        way = "--bad_lines drop leaves them out" if has_flags else "mend them, or take them out"
        ways.append(f"{bad:,} cannot be read ({way})")
    if unsure and uncertain == "error":
        ways.append(f"{unsure:,} have no provable loss mask (--uncertain drop leaves them out)")
    if not ways:
        return
    fatal = [
        refusal
        for refusal in spool.refusals
        if (bad_lines if refusal.kind == UNREADABLE else uncertain) == "error"
    ]
    shown = _without_repetition(fatal)
    told = f"of {spool.lines.total():,} lines {' and '.join(ways)}; nothing was written"
    if len(shown) > SHOWN:
        told = f"these are the first {SHOWN}; {told}"
    problems([*shown[:SHOWN], told])


def _without_repetition(refusals: list[Refusal]) -> list[str]:
    """Their messages, at most SAME of those that differ in names and numbers alone."""
    groups: dict[str, list[str]] = {}
    for refusal in refusals:
        reason = refusal.message.removeprefix(f"{refusal.source}:{refusal.line}")
        reason = refusal.kind if refusal.kind != UNREADABLE else NAMES.sub("", reason)
        groups.setdefault(reason, []).append(refusal.message)
    shown = []
    for messages in groups.values():
        shown += messages[:SAME]
        if len(messages) > SAME:
            shown.append(f"{len(messages) - SAME:,} further lines are like the last one")
    return shown


class LeftOut:
    """The records of what was refused and left out of an encoded data set."""

    def __init__(
        self,
        encoded: Encoded,
        paths: tuple[str, ...],
        context_length: int,
        evaluations: Evaluations | None,
    ) -> None:
        self.encoded = encoded
        self.paths = paths
        self.context_length = context_length
        self.names = evaluations.names if evaluations else []

    def records(self) -> list[str]:
        """JSON objects with source, line, kind and reason: refused lines first, at most
        KEPT_REFUSALS of them, and as many examples that were left out for another reason."""
        refused = (
            _record(refusal.source, refusal.line, refusal.kind, refusal.message)
            for refusal in self.encoded.spool.refusals
        )
        fate = self.encoded.selection.fate
        told = np.flatnonzero(np.isin(fate, (DUPLICATE, CONTAMINATED, OVERLONG)))
        return [*refused, *self._dropped(told[:KEPT_REFUSALS])]

    def stop_at_overlong(self) -> None:
        """Raise UserError if an example is too long for a row."""
        overlong = np.flatnonzero(self.encoded.selection.fate == OVERLONG)
        if len(overlong) == 0:
            return
        shown = [json.loads(record)["reason"] for record in self._dropped(overlong[:SHOWN])]
        advice = f"{len(overlong):,} examples are longer than a row; nothing was written"
        problems([*shown, f"{advice}. Raise --context_length, or see --overlong drop and truncate"])

    def _dropped(self, members: Iterable[int]) -> Iterator[str]:
        examples, conversations = self.encoded.examples, self.encoded.conversations
        for i in members:
            conversation = conversations[examples["conversation"][i]]
            source = self.paths[conversation["source"]]
            line = int(conversation["line"])
            fate = int(self.encoded.selection.fate[i])
            if fate == OVERLONG:
                length = int(examples["length"][i])
                reason = f"{length:,} tokens, and a row has {self.context_length:,}"
            elif fate == CONTAMINATED:
                reason = f"shares a question with {self.names[conversation['question']]}"
            else:
                reason = "is the same as an earlier conversation"
            yield _record(source, line, FATES[fate], f"{place(source, line)}: {reason}")


def _record(source: str, line: int, kind: str, reason: str) -> str:
    record = {"source": source, "line": line, "kind": kind, "reason": reason}
    return json.dumps(record, ensure_ascii=False)


def fates(encoded: Encoded, truncate: bool) -> str:
    """How many examples had which fate, for instance `12 overlong, 3 duplicate`.

    `truncate` says whether long examples were cut.
    """
    fate = encoded.selection.fate
    counts = np.bincount(fate, minlength=len(FATES))
    told = ", ".join(f"{n:,} {name}" for name, n in zip(FATES, counts, strict=True) if n)
    if counts[OVERLONG]:
        shortest = encoded.examples["length"][fate == OVERLONG].min()
        told += f" (the shortest has {shortest:,} tokens; {_ways_to_fit(truncate)})"
    return told


def notes(
    encoded: Encoded, accounts: list[SourceAccount], left_out: list[str], truncate: bool
) -> list[str]:
    """What the user should know besides the account, one line each.

    `left_out` are the records of `LeftOut`; `truncate` says whether long examples were cut.
    """
    lines = [f"{n:,} {what}" for what, n in sorted(encoded.spool.notes.items()) if n]
    kinds: dict[str, int] = {}
    for account in accounts:
        for kind, n in account.refused.items():
            kinds[kind] = kinds.get(kind, 0) + n
    for kind, n in kinds.items():
        lines.append(f"{n:,} lines refused: {REASONS.get(kind, kind)}")
        lines += _some([r.message for r in encoded.spool.refusals if r.kind == kind])
    for fate, name in enumerate(FATES):
        n = int((encoded.selection.fate == fate).sum())
        if n and fate != KEPT:
            told = TOLD[name]
            if fate == OVERLONG:
                longest = encoded.examples["length"][encoded.selection.fate == OVERLONG].max()
                told += f", the longest has {longest:,} tokens; {_ways_to_fit(truncate)}"
            lines.append(f"{n:,} examples left out: {told}")
            if fate == CONTAMINATED:
                found = [r for r in map(json.loads, left_out) if r["kind"] == FATES[fate]]
                lines += _some([record["reason"] for record in found])
    truncated = sum(account.truncated_examples for account in accounts)
    if truncated:
        lines.append(f"{truncated:,} examples end after the last turn that fits into a row")
    return lines


def _some(reasons: list[str]) -> list[str]:
    """The first of them, indented, and where the others are found."""
    more = ["  … (whet inspect --html shows more)"] if len(reasons) > SAME else []
    return [*(f"  {reason}" for reason in reasons[:SAME]), *more]


def _ways_to_fit(truncate: bool) -> str:
    if truncate:
        return "no turn of theirs fits: raise --context_length"
    return "see --context_length and --overlong truncate"


TOLD = {
    "duplicate": "exact duplicates",
    "contaminated": "they share a question with an evaluation file",
    "not_drawn": "not drawn, since their source's weight is below 1",
    "overlong": "longer than a row",
}
