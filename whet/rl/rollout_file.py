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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whet.data.batches import Batch, micro_batch_count, micro_batches, read_batch
from whet.data.packing import pack
from whet.data.store import DOCUMENT, PackedStore, StoreWriter
from whet.flags.choices import Advantage, Normalize, Truncated
from whet.model.attention import plan_documents
from whet.rl.advantages import group_advantages
from whet.rl.policy_loss import token_weights
from whet.rl.prompts import Prompts
from whet.rl.sampling import Sample
from whet.train.distributed import Ranks

ROWS = 1 << 20
"""Row r of rollout n has number n * ROWS + r in batches: the ledger meets rows of several files."""
SHORTEST_ROW = 256
"""Rows are at least so long, so that short replies share one."""


@dataclass(frozen=True)
class RolloutSettings:
    """What becomes of samples; see the flags of the same names."""

    advantage: Advantage
    normalize: Normalize
    truncated: Truncated
    max_new_tokens: int
    updates: int
    seed: int


def write_rollout(
    path: Path,
    groups: Sequence[Sequence[Sample]],
    prompts: Prompts,
    settings: RolloutSettings,
    *,
    pad_id: int,
    attrs: dict[str, Any],
) -> None:
    """Write the file: the groups are dealt to the updates in turn, each update has rows of its own.

    Raises UserError if the file cannot be written.
    """
    parts = _parts(groups, prompts, settings)
    length = max(SHORTEST_ROW, *(len(d.ids) for part in parts for d in part.documents))
    packings = [
        pack(np.array([len(d.ids) for d in part.documents]), length, settings.seed)
        for part in parts
    ]
    ends = np.cumsum([packing.n_rows for packing in packings]).tolist()
    shape = (ends[-1], length)
    tokens, segments = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    mask, logp = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    table = list[tuple[int, ...]]()
    placed = list[_Document]()
    for part, packing, first in zip(parts, packings, [0, *ends], strict=False):
        for i in np.lexsort((packing.start, packing.row)).tolist():
            document, row, start = part.documents[i], first + packing.row[i], packing.start[i]
            end = start + len(document.ids)
            reply = slice(end - len(document.sample.reply.ids), end)
            tokens[row, start:end] = document.ids
            segments[row, start:end] = segments[row].max() + 1
            mask[row, reply] = document.weight
            logp[row, reply] = document.sample.reply.logp
            line = prompts.prompts[document.sample.prompt].line
            trained = len(document.sample.reply.ids) if document.weight else 0
            table.append((row, start, len(document.ids), trained, 0, line, document.number))
            placed.append(document)
    said = {
        "kind": "rollout",
        "sources": [str(prompts.path)],
        "pad_id": pad_id,
        "ends": ends,
        "totals": [part.total for part in parts],
        **attrs,
    }
    with StoreWriter(path, *shape, weighted=True, attrs=said) as writer:
        writer.write_rows(tokens, mask, segments)
        writer.write_documents(np.array(table, DOCUMENT))
        writer.write_numbers("logp", logp)
        writer.write_numbers("advantages", np.array([d.advantage for d in placed]))
        writer.write_numbers("rewards", np.array([d.sample.reward for d in placed]))


@dataclass(frozen=True)
class _Document:
    sample: Sample
    number: int
    """Of the sample in its group."""
    ids: list[int]
    weight: float
    """Of each token of the reply."""
    advantage: float


@dataclass(frozen=True)
class _Part:
    """What one update trains."""

    documents: list[_Document]
    total: float


def _parts(
    groups: Sequence[Sequence[Sample]], prompts: Prompts, settings: RolloutSettings
) -> list[_Part]:
    rewards = torch.tensor([[s.reward for s in group] for group in groups], dtype=torch.float64)
    advantages = group_advantages(rewards, settings.advantage).tolist()
    found = []
    for update in range(min(settings.updates, len(groups))):
        documents, lengths = list[_Document](), list[int]()
        for g in range(update, len(groups), settings.updates):
            for k, sample in enumerate(groups[g]):
                ids = [*prompts.prompts[sample.prompt].ids, *sample.reply.ids]
                kept = settings.truncated != "mask" or sample.reply.stopped
                documents.append(_Document(sample, k, ids, float(kept), advantages[g][k]))
                lengths.append(len(sample.reply.ids) if kept else 0)
        # A masked reply is in neither sum: not in the losses, not in what they are divided by.
        counted = torch.tensor([n for n in lengths if n])
        weights, total = token_weights(counted, settings.normalize, settings.max_new_tokens)
        each = iter(weights.tolist())
        documents = [replace(d, weight=next(each)) if d.weight else d for d in documents]
        found.append(_Part(documents, total))
    return found


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

        `extra` has, of each place's target, `advantage` and `sampled`, its -ln p when it was
        sampled, both (B, T). The weight of replies without an advantage is 0, so that they are not
        computed; `total` counts them all the same. It is 0 if no reply has one.
        """
        whole = np.arange(self.ends[update - 1] if update else 0, self.ends[update])
        mine = whole[ranks.rank :: ranks.size]
        worth = bool(self.advantages[whole].any())
        total = self.totals[update] if worth else 0.0
        share = read_batch(self.store, mine, total=total, epoch=epoch)
        advantage = torch.from_numpy(self.advantages[mine]).gather(1, share.segments)
        sampled = -torch.from_numpy(self.logp[mine]).roll(-1, 1)
        weight = share.weight * (advantage != 0)
        inside = weight != 0
        share = replace(
            share,
            weight=weight,
            rows=mine + self.number * ROWS,
            extra={
                "advantage": torch.where(inside, advantage, 0.0),
                "sampled": torch.where(inside, sampled, 0.0),
            },
        )
        count = micro_batch_count(len(whole), ranks.size, micro_batch_size)
        return [_planned(micro) for micro in micro_batches(share, micro_batch_size, count)]


def _planned(batch: Batch) -> Batch:
    plan = plan_documents(batch.tokens.shape, batch.tokens.device, batch.segments, batch.weight)
    return replace(batch, plan=plan)


def rollout_path(folder: Path, number: int) -> Path:
    """The file of rollout `number`, from 0."""
    return folder / f"rollout_{number:08d}.h5"


def rollout_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """The rollouts of a run that are kept, oldest first."""
    for path in sorted(folder.glob("rollout_*.h5")):
        if path.stem[8:].isdigit():
            yield int(path.stem[8:]), path
