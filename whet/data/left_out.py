"""What `whet prepare` leaves out: reported to the user, recorded in the file for `whet inspect`."""

import re

import numpy as np

from whet.chat.certificate import REASONS, Refusal
from whet.chat.conversation import Origin
from whet.config import problems
from whet.data.decontaminate import Evaluations
from whet.data.mixing import CONTAMINATED, DUPLICATE, FATES, KEPT, OVERLONG
from whet.data.writing import KEPT_REFUSALS, Spool, Tables
from whet.flags.choices import Refused
from whet.progress import count

SHOWN = 20
"""Refused lines that are shown on the screen."""
SAME = 3
"""Refused lines of one reason that are shown."""
NAMES = re.compile(r'\d+|".*"')
UNREADABLE = "datum"
"""The kind of refusal of a line that cannot be read; all others have no provable loss mask."""
WORDS = {
    "duplicate": "exact duplicates",
    "contaminated": "they share a question with an evaluation file",
    "not_drawn": "not drawn, since their source's weight is below 1",
    "overlong": "longer than a row",
    "equal_sides": "chosen and rejected are the same",
    "empty_reply": "a reply is empty",
    "prompts": "the two replies have different prompts",
}
"""Words for kinds of refusal that only `whet prepare` has, and for fates."""
NEVER_STOP = ("equal_sides", "empty_reply")
"""From these nothing good can be learnt: usual in real data, so they are always left out."""


def stop_at_refusals(spool: Spool, policy: Refused, *, has_flag: bool) -> None:
    """Raise UserError with the first refused lines, unless `policy` says to leave them out.

    `has_flag`: whether the command that the user gave has `--refused`.
    """
    kinds = spool.refused_by_kind()
    left = {"drop": set(kinds), "drop_unproven": set(kinds) - {UNREADABLE}, "error": set()}
    fatal = set(kinds) - left[policy] - set(NEVER_STOP)
    bad, unsure = kinds[UNREADABLE], sum(kinds[kind] for kind in fatal - {UNREADABLE})
    ways = []
    if UNREADABLE in fatal:
        way = "--refused drop leaves them out" if has_flag else "mend them, or take them out"
        ways.append(f"{bad:,} cannot be read ({way})")
    if unsure:
        way = "--refused drop_unproven leaves them out"
        ways.append(f"{unsure:,} have no provable loss mask ({way})")
    if not ways:
        return
    shown = _without_repetition([r for r in spool.refusals if r.kind in fatal])
    summary = f"of {count(spool.lines.total(), 'lines')} {' and '.join(ways)}; nothing was written"
    if len(shown) > SHOWN:
        summary = f"these are the first {SHOWN}; {summary}"
    problems([*shown[:SHOWN], summary])


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


def records(tables: Tables, evaluations: Evaluations | None) -> list[Refusal]:
    """Why lines and examples are left out: refused lines first, at most KEPT_REFUSALS of them, and
    as many examples that were left out for another reason."""
    found = list(tables.spool.refusals)
    fate, examples = tables.selection.fate, tables.examples
    left = np.flatnonzero(np.isin(fate, (DUPLICATE, CONTAMINATED, OVERLONG)))
    for i in left[:KEPT_REFUSALS]:
        conversation = tables.conversations[examples["conversation"][i]]
        source, line = tables.paths[conversation["source"]], int(conversation["line"])
        if fate[i] == OVERLONG:
            needed, width = int(tables.selection.needed[i]), tables.config.context_length
            reason = f"{needed:,} tokens, and a row has {width:,}"
        elif fate[i] == CONTAMINATED and evaluations:
            reason = f"shares a question with {evaluations.names[conversation['question']]}"
        else:
            reason = "is the same as an earlier conversation"
        message = f"{Origin(source, line).where}: {reason}"
        found.append(Refusal(FATES[int(fate[i])], message, source, line))
    return found


def stop_at_overlong(tables: Tables, left_out: list[Refusal]) -> None:
    """Raise UserError if an example is too long for a row; `left_out` are the `records`."""
    n = int((tables.selection.fate == OVERLONG).sum())
    if n:
        shown = [r.message for r in left_out if r.kind == FATES[OVERLONG]]
        advice = f"{n:,} examples are longer than a row; nothing was written"
        advice += ". Raise --context_length, or see --overlong drop and truncate"
        problems([*shown[:SHOWN], advice])


def fates(tables: Tables) -> str:
    """How many examples had which fate, for instance `12 overlong, 3 duplicate`."""
    fate = tables.selection.fate
    counts = np.bincount(fate, minlength=len(FATES))
    text = ", ".join(f"{n:,} {name}" for name, n in zip(FATES, counts, strict=True) if n)
    if counts[OVERLONG]:
        shortest = tables.selection.needed[fate == OVERLONG].min()
        text += f" (the shortest has {shortest:,} tokens; {_ways_to_fit(tables)})"
    return text


def notes(tables: Tables, left_out: list[Refusal]) -> list[str]:
    """What the user should know besides the account, one line each."""
    spool, selection = tables.spool, tables.selection
    lines = [f"{n:,} {what}" for what, n in sorted(spool.notes.items()) if n]
    for kind, n in spool.refused_by_kind().items():
        lines.append(f"{count(n, 'lines')} refused: {WORDS.get(kind) or REASONS.get(kind, kind)}")
        lines += _some([r.message for r in spool.refusals if r.kind == kind])
    for fate, name in enumerate(FATES):
        of_fate = selection.fate == fate
        if fate == KEPT or not of_fate.any():
            continue
        what = WORDS[name]
        if fate == OVERLONG:
            longest = selection.needed[of_fate].max()
            what += f", the longest has {longest:,} tokens; {_ways_to_fit(tables)}"
        lines.append(f"{count(int(of_fate.sum()), 'examples')} left out: {what}")
        if fate == CONTAMINATED:
            lines += _some([r.message for r in left_out if r.kind == name])
    cut = (selection.kept < tables.examples["length"]) * selection.copies
    if cut.any():
        lines.append(f"{cut.sum():,} examples end after the last turn that fits into a row")
    if spool.unused:
        often = sorted(spool.unused.items(), key=lambda item: (-item[1], item[0]))
        names = ", ".join(f"{name} ({count(n, 'rows')})" for name, n in often)
        lines.append(f"fields not used: {names}")
    return lines


def _some(reasons: list[str]) -> list[str]:
    """The first of them, indented, and where the others are found."""
    more = ["  … (whet inspect --html shows more)"] if len(reasons) > SAME else []
    return [*(f"  {reason}" for reason in reasons[:SAME]), *more]


def _ways_to_fit(tables: Tables) -> str:
    if tables.cuts:
        return "nothing of them fits whole: raise --context_length"
    return "see --context_length and --overlong truncate"
