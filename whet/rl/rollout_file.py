"""A rollout as a packed file: what was sampled, what it was worth, and the batches made of it.

Rows, loss mask and documents are those of every packed file, so that the store, micro-batches,
ledger, `whet inspect` and `whet replay` read it; a run that was killed between two updates of a
rollout goes on from it without the weights that sampled it. Beside them stand

    logp         (rows, context length) float32: ln p of each reply token when it was sampled
    advantages   (documents,) float32, of each reply
    rewards      (documents,) float32, of each reply

A document is one reply after its prompt; its `line` is the prompt's, its `part` the sample's
number. `loss_mask` holds each token's weight under `--normalize`; prompts, and replies that are
masked, have 0. The attribute `ends` says where the rows of each update end, `totals` what its
weights are divided by.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whet.data.batches import Batch, micro_batch_count, micro_batches, read_batch
from whet.data.packing import pack
from whet.data.store import DOCUMENT, PackedStore, new_store
from whet.model.attention import planned
from whet.rl.advantages import group_advantages
from whet.rl.policy_loss import token_weights
from whet.rl.prompts import Prompts
from whet.rl.sampling import PolicyConfig, Sample
from whet.train.distributed import Ranks

ROWS = 1 << 20
"""Row r of rollout n has number n * ROWS + r in batches: the ledger meets rows of several files."""
SHORTEST_ROW = 256
"""Rows are at least so long, so that short replies share one."""


@dataclass
class Document:
    """One reply after its prompt, and where it stands."""

    sample: Sample
    number: int
    """Of the sample in its group."""
    ids: list[int]
    advantage: float
    weight: float = 0.0
    """Of each token of the reply."""
    row: int = 0
    start: int = 0

    @property
    def end(self) -> int:
        """Where its last token ends."""
        return self.start + len(self.ids)

    @property
    def reply(self) -> range:
        """The places of the reply's tokens in its row."""
        return range(self.end - len(self.sample.reply.ids), self.end)


@dataclass(frozen=True)
class Layout:
    """A rollout in rows, before it is written."""

    documents: list[Document]
    """By row and start."""
    tokens: np.ndarray
    """(rows, T) int32."""
    segments: np.ndarray
    """(rows, T) int32."""
    mask: np.ndarray
    """(rows, T) float32."""
    logp: np.ndarray
    """(rows, T) float32."""
    ends: list[int]
    """Where the rows of each update end."""
    totals: list[float]
    """What the weights of each update are divided by."""


def lay_out(
    groups: Sequence[Sequence[Sample]],
    prompts: Prompts,
    config: PolicyConfig,
    pad_id: int,
) -> Layout:
    """Put samples into rows: the groups are dealt to the updates in turn, and each update has rows
    of its own."""
    rewards = torch.tensor([[s.reward for s in group] for group in groups], dtype=torch.float64)
    advantages = group_advantages(rewards, config.advantage).tolist()
    dealt = [
        [
            Document(s, k, [*prompts.prompts[s.prompt].ids, *s.reply.ids], advantages[g][k])
            for g in range(update, len(groups), config.updates)
            for k, s in enumerate(groups[g])
        ]
        for update in range(config.updates)
    ]
    length = max(SHORTEST_ROW, *(len(d.ids) for own in dealt for d in own))
    placed, ends, totals = list[Document](), [0], list[float]()
    for own in dealt:  # none where a short rollout ends an epoch: then an update trains nothing
        # A masked reply is in neither sum: not in the losses, not in what they are divided by.
        kept = [d for d in own if config.truncated != "mask" or d.sample.reply.stopped]
        lengths = torch.tensor([len(d.reply) for d in kept])
        weights, total = token_weights(lengths, config.normalize, config.max_new_tokens)
        for d, weight in zip(kept, weights.tolist(), strict=True):
            d.weight = weight
        packing = pack(np.array([len(d.ids) for d in own]), length, config.seed)
        for d, row, start in zip(own, packing.row.tolist(), packing.start.tolist(), strict=True):
            d.row, d.start = ends[-1] + row, start
        placed += sorted(own, key=lambda d: (d.row, d.start))
        ends.append(ends[-1] + packing.n_rows)
        totals.append(total)
    shape = (ends[-1], length)
    tokens, segments = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    mask, logp = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for d in placed:
        tokens[d.row, d.start : d.end] = d.ids
        segments[d.row, d.start : d.end] = segments[d.row].max() + 1
        mask[d.row, d.reply] = d.weight
        logp[d.row, d.reply] = d.sample.reply.logp
    return Layout(placed, tokens, segments, mask, logp, ends[1:], totals)


def write_rollout(
    path: Path,
    layout: Layout,
    prompts: Prompts,
    places: Mapping[str, np.ndarray],
    attrs: Mapping[str, Any],
) -> None:
    """Write the file; `places` are further numbers (rows, T) of each place, by name.

    Raises UserError if it cannot be written.
    """
    said = {
        "kind": "rollout",
        "sources": [str(prompts.path)],
        "ends": layout.ends,
        "totals": layout.totals,
        "places": list(places),
        **attrs,
    }
    lines = [prompts.prompts[d.sample.prompt].line for d in layout.documents]
    table = [
        (d.row, d.start, len(d.ids), len(d.reply) if d.weight else 0, 0, line, d.number)
        for d, line in zip(layout.documents, lines, strict=True)
    ]
    with new_store(path, *layout.tokens.shape, weighted=True, attrs=said) as writer:
        writer.write_rows(layout.tokens, layout.mask, layout.segments)
        writer.write_documents(np.array(table, DOCUMENT))
        for name, numbers in {"logp": layout.logp, **places}.items():
            writer.write_numbers(name, numbers)
        writer.write_numbers("advantages", np.array([d.advantage for d in layout.documents]))
        writer.write_numbers("rewards", np.array([d.sample.reward for d in layout.documents]))


class Rollout:
    """A rollout's file, opened."""

    def __init__(self, path: Path, number: int) -> None:
        """Raises UserError if the file is missing, damaged or no rollout."""
        self.number = number
        self.store = PackedStore(path, kinds=("rollout",))
        self.logp = self.store.of_places("logp")
        """(rows, T) float32."""
        self.advantages = self.by_segment(self.store.values("advantages", 1))
        """(rows, S + 1) float32, of the documents of each row; column 0, the padding's, is 0."""
        self.places = {name: self.store.of_places(name) for name in self.store.attrs["places"]}
        """Further numbers (rows, T) float32 of each token."""
        self.ends: list[int] = self.store.attrs["ends"]
        self.totals: list[float] = self.store.attrs["totals"]

    def by_segment(self, values: np.ndarray) -> np.ndarray:
        """A number for each document -> (rows, S + 1), as batches have them; column 0 is 0."""
        rows = self.store.document_rows
        segment = np.arange(len(rows)) - np.searchsorted(rows, rows, "left") + 1
        table = np.zeros((len(self.store), int(segment.max()) + 1), values.dtype)
        table[rows, segment] = values
        return table

    def batches(self, update: int, ranks: Ranks, micro_batch_size: int, epoch: int) -> list[Batch]:
        """This rank's micro-batches of an update, from 0; equally many on every rank.

        `extra` has, of each place's target and by name, (B, T): `sampled`, its -ln p when it was
        sampled; `advantage`, its own or its reply's; and what else the file has of places. Where
        the advantage is the reply's, those without one get a weight of 0, so that they are not
        computed; `total` counts them all the same. It is 0 if nothing is left to train.
        """
        whole = np.arange(self.ends[update - 1] if update else 0, self.ends[update])
        mine = whole[ranks.rank :: ranks.size]
        worth = bool(self.places) or bool(self.advantages[whole].any())
        total = self.totals[update] if worth else 0.0
        share = read_batch(self.store, mine, total=total, epoch=epoch)
        extra = {name: _before(numbers[mine]) for name, numbers in self.places.items()}
        extra["sampled"] = -_before(self.logp[mine])
        weight = share.weight
        if "token_advantages" in extra:
            extra["advantage"] = extra.pop("token_advantages")
        else:
            extra["advantage"] = torch.from_numpy(self.advantages[mine]).gather(1, share.segments)
            weight = weight * (extra["advantage"] != 0)
        share = replace(
            share,
            weight=weight,
            rows=mine + self.number * ROWS,
            extra={name: torch.where(weight != 0, x, 0.0) for name, x in extra.items()},
        )
        count = max(1, micro_batch_count(len(whole), ranks.size, micro_batch_size))
        return [planned(micro) for micro in micro_batches(share, micro_batch_size, count)]


def _before(numbers: np.ndarray) -> Tensor:
    """(B, T) numbers of tokens, at the places before them: where the model predicts them."""
    return torch.from_numpy(numbers).roll(-1, 1)


def rollout_path(folder: Path, number: int) -> Path:
    """The file of rollout `number`, from 0."""
    return folder / f"rollout_{number:08d}.h5"


def rollout_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """The rollouts of a run that are kept, oldest first."""
    for path in sorted(folder.glob("rollout_*.h5")):
        if path.stem[8:].isdigit():
            yield int(path.stem[8:]), path
