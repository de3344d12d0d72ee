"""What becomes of each conversation and example: left out, copied, cut short, held out for dev.

Pure functions of the tables that the workers made, and of the seed; the order of the steps is that
of `select`. Nothing here touches a token.
"""

from dataclasses import dataclass

import numpy as np

from whet.data.encoding import KIND_NAMES
from whet.errors import UserError
from whet.flags.prepare import Config

KEPT, DUPLICATE, CONTAMINATED, NOT_DRAWN, OVERLONG = range(5)
FATES = ("kept", "duplicate", "contaminated", "not_drawn", "overlong")
"""What becomes of an example, by number: the reasons that the token account gives."""


@dataclass
class Selection:
    """One entry for each example. A dev example has one copy, a left-out one none."""

    fate: np.ndarray  # (examples,) index into FATES
    kept: np.ndarray  # (examples,) tokens of it that are kept, from its beginning
    copies: np.ndarray  # (examples,) how often it is written
    dev: np.ndarray  # (examples,) bool: belongs to the dev file
    needed: np.ndarray  # (examples,) places in one row: of a pair those of both sides


def select(
    conversations: np.ndarray,
    examples: np.ndarray,
    runs: np.ndarray,
    config: Config,
    weights: list[float],
) -> Selection:
    """Decide about every example; tables as in `whet.data.encoding`, `weights` by source.

    Duplicates and contaminated conversations go first, then the dev part is held out, then the rest
    is mixed by weight, and what is too long for a row is treated last.
    """
    context_length, seed = config.context_length, config.seed
    fate = np.full(len(conversations), KEPT)
    fate[duplicates(conversations["digest"])] = DUPLICATE
    fate[(fate == KEPT) & (conversations["question"] >= 0)] = CONTAMINATED
    dev = hold_out(conversations["opening"], fate == KEPT, config.dev_fraction, seed)
    copies = dev.astype(np.int64)
    for source, weight in enumerate(weights):
        own = np.flatnonzero((conversations["source"] == source) & (fate == KEPT) & ~dev)
        copies[own] = draw_copies(len(own), weight, np.random.default_rng([seed, 1, source]))
    fate[(fate == KEPT) & (copies == 0)] = NOT_DRAWN
    copies[fate != KEPT] = 0

    owner, length = examples["conversation"], examples["length"]
    paired = (conversations["kind"] == KIND_NAMES.index("preferences"))[owner]
    both = np.bincount(owner, length, len(conversations)).astype(np.int64)
    needed = np.where(paired, both[owner], length)
    selection = Selection(fate[owner], length.copy(), copies[owner], dev[owner], needed)
    for i in np.flatnonzero((selection.fate == KEPT) & (needed > context_length)):
        kept = 0
        if config.overlong == "truncate" and not paired[i]:
            first = int(examples["first_run"][i])
            kept = whole_turns(runs[first : first + int(examples["n_runs"][i])], context_length)
        selection.kept[i] = kept
        if kept == 0:
            selection.fate[i] = OVERLONG
            selection.copies[i] = 0
    return selection


def duplicates(digests: np.ndarray) -> np.ndarray:
    """The numbers of all entries that equal an earlier one; digests (n, 2) uint64."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the first of equals comes first
    same = (digests[order][1:] == digests[order][:-1]).all(axis=1)
    return np.sort(order[1:][same])


def whole_turns(runs: np.ndarray, context_length: int) -> int:
    """Tokens up to the end of the last trained turn that ends within `context_length`; 0 if none.

    What is trained is never cut: a turn whose end is missing would teach the model not to stop. A
    turn whose weight changes within it has several runs, which touch.
    """
    ends = np.append(runs["start"][1:] != runs["end"][:-1], True)
    inside = runs["end"][ends & (runs["end"] <= context_length)]
    return int(inside.max()) if len(inside) else 0


def draw_copies(n: int, weight: float, random: np.random.Generator) -> np.ndarray:
    """How often each of `n` is used: weight 3 is three times, 0.25 is a random quarter of them.

    Exactly so, up to rounding: not each by a coin of its own.
    """
    copies = np.full(n, int(weight))
    copies[random.permutation(n)[: round((weight - int(weight)) * n)]] += 1
    return copies


def hold_out(openings: np.ndarray, usable: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which conversations are the dev part: bool, about `fraction` of the usable ones.

    Conversations with the same opening go to the same side: continuations of one question would
    otherwise be trained and measured at once. Raises UserError where no such part can be found.
    """
    dev = np.zeros(len(openings), bool)
    members = np.flatnonzero(usable)
    if fraction == 0 or len(members) == 0:
        return dev
    groups, group_of, sizes = np.unique(openings[members], return_inverse=True, return_counts=True)
    order = np.random.default_rng([seed, 2]).permutation(len(groups))
    wanted = max(1, round(fraction * len(members)))
    taken = np.zeros(len(groups), bool)
    n = 0
    for group in order:
        if n + sizes[group] <= wanted:
            taken[group] = True
            n += sizes[group]
        if n == wanted:
            break
    if n == 0 or n == len(members):
        raise UserError(
            f"--dev_fraction {fraction:g} of {len(members):,} conversations or rows of text, with "
            f"{len(groups):,} different openings, leaves no dev part or nothing to train on: what "
            "opens alike stays together; use more data, or --dev_fraction 0"
        )
    dev[members[taken[group_of]]] = True
    return dev
