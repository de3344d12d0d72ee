"""A stage that learns from pairs of replies: what the reward model and DPO share.

    packed pairs ──► (B, T) tokens ──► one number a document ──► chosen, rejected (B, P) ──► loss
                     chosen in odd, rejected in even segments

A stage brings a `Judge`: what the model makes of the pairs of a batch. Training sums its losses,
the evaluation counts over the whole dev file how often the chosen reply is put first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet.chat.chat import Chat
from whet.config import collected
from whet.data.batches import Batch, micro_batches, read_batch, shares_of
from whet.data.store import PackedStore
from whet.evaluate.answers import wilson
from whet.evaluate.dev import source_labels
from whet.flags.training import TrainSettings
from whet.generate.engine import evaluating
from whet.model.attention import planned
from whet.progress import track
from whet.stages.model import Opened, writer
from whet.stages.packed import batches_of_step, data_in_words, facts_of, rows_used, steps_of_epoch
from whet.train.distributed import Ranks, is_sharded, sum_over_ranks, unwrap
from whet.train.evaluation import Meeting, sample_replies
from whet.train.session import total_steps
from whet.train.signals import Stop
from whet.train.stage import Evaluation, Stage, Sums

FORGOTTEN = 0.5
"""Nats a token by which the chosen replies may become less likely before it is said: then each of
their tokens has lost 40 % of its probability."""


@dataclass(frozen=True)
class Judged:
    """What a model makes of a batch of pairs; each (B, P), P the most pairs in a row."""

    loss: Tensor
    """With a gradient."""
    chosen: Tensor
    """The chosen reply's reward, detached."""
    rejected: Tensor
    """The rejected reply's."""
    nll: Tensor
    """(B, T) detached: what the ledger sums over a document."""
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    """More numbers of each pair, for the log, detached; NaN where they do not apply."""

    @property
    def first(self) -> Tensor:
        """1 where the chosen reply is put first, 0 where the rejected one is, 0.5 for a tie."""
        return 0.5 + 0.5 * torch.sign(self.chosen - self.rejected)

    def all_numbers(self) -> dict[str, Tensor]:
        """What is logged of each pair."""
        margin = self.chosen - self.rejected
        return {
            "pair_accuracy": self.first,
            "margin": margin,
            "chosen_reward": self.chosen,
            "rejected_reward": self.rejected,
            **self.numbers,
        }


Judge = Callable[[nn.Module, Batch], Judged]


def sums(model: nn.Module, batch: Batch, *, judge: Judge) -> Sums:
    """The loss function of a stage of pairs: sums over the pairs that are there."""
    found, real = judge(model, batch), batch.extra["pairs"]
    named = {}
    for name, x in found.all_numbers().items():
        there = real * ~x.isnan()
        named[name] = ((x.nan_to_num() * there).sum(), there.sum())
    return Sums((found.loss * real).sum(), found.nll, named)


def sides(documents: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2 P + 1) a number for each document -> (B, P) of the chosen, (B, P) of the rejected."""
    return documents[:, 1::2], documents[:, 2::2]


def open_pairs(config: Any, found: list[str], kinds: Sequence[str]) -> dict[str, PackedStore]:
    """--data and --dev by flag; problems are added to `found`."""
    stores = {}
    for flag, path in (("--data", config.data), ("--dev", config.dev)):
        with collected(found):
            if path is not None:
                stores[flag] = PackedStore(path, kinds)
                found += [f"{flag} {path}: {wrong}" for wrong in _flaws_of(stores[flag])]
    return stores


def _flaws_of(store: PackedStore) -> list[str]:
    """Why the file can't be learnt from; it may be somebody else's."""
    if not units_of(store).any():
        return ["holds no pair"]
    if store.kind == "labels" and not np.isin(store.values("labels", 1), (0, 1)).all():
        return ["labels must be 1 for each good reply and 0 for each bad one"]
    if store.kind == "preferences" and np.isinf(store.values("margins", 2)).any():
        return ["margins must be finite"]
    return []


def units_of(store: PackedStore) -> np.ndarray:
    """(rows,) the pairs in each row, or the labelled replies."""
    documents = np.bincount(store.document_rows, minlength=len(store)).astype(np.float64)
    return documents // 2 if store.kind == "preferences" else documents


def pair_stage(
    config: TrainSettings,
    ranks: Ranks,
    opened: Opened,
    stores: Mapping[str, PackedStore],
    judge: Judge,
    complete: Callable[[PackedStore, Batch], Batch],
    stage: str,
    next_command: str = "whet chat {run}",
) -> Stage:
    """The stage that minimises the mean of `judge`'s loss over the pairs of a step.

    `complete` adds to a batch of some rows what the judge needs.
    """
    store, dev = stores["--data"], stores.get("--dev")
    units, used = units_of(store), rows_used(config, store)
    unit = "pairs" if store.kind == "preferences" else "replies"
    count = f"{units[:used].sum():,.0f} {unit}"
    save = writer(config, opened, stage, facts_of(store))
    return Stage(
        model=opened.model,
        documents=store,
        dev=dev,
        total_steps=total_steps(config, steps_of_epoch(config, store)),
        batches=partial(
            batches_of_step,
            config=config,
            store=store,
            ranks=ranks,
            weights=units,
            complete=partial(complete, store),
        ),
        loss_fn=partial(sums, judge=judge),
        unit=unit,
        evaluate=None
        if dev is None
        else PairEvaluator(
            dev,
            judge,
            complete,
            config.micro_rows,
            chat=None if getattr(opened.model.config, "score", False) else opened.chat,
            n_samples=config.samples,
            quiet=config.quiet or not ranks.first,
        ),
        save_model=save,
        next=next_command,
        rehearse=save.rehearse,
        header=[*opened.header, *data_in_words(config, store, dev, count)],
    )


def batch_of_rows(
    store: PackedStore,
    rows: np.ndarray,
    micro_rows: int,
    complete: Callable[[PackedStore, Batch], Batch],
    device: torch.device,
) -> Batch:
    """Some rows of a file, filled up to `micro_rows`, on the device."""
    batch = complete(store, read_batch(store, rows, total=1.0))
    return planned(micro_batches(batch, micro_rows, 1)[0]).to(device)


@dataclass(frozen=True)
class PairEvaluator:
    """The judge's numbers over a dev file, and pair accuracy by source with its interval."""

    dev: PackedStore
    judge: Judge
    complete: Callable[[PackedStore, Batch], Batch]
    micro_rows: int
    chat: Chat | None = None
    """For sample replies."""
    n_samples: int = 0
    quiet: bool = True

    def __call__(self, model: nn.Module, ranks: Ranks, stop: Stop) -> Evaluation:
        """All ranks call it. Raises Interrupted and UserError on all of them, see `Meeting`."""
        inner: Any = unwrap(model)
        meeting = Meeting(stop, ranks)
        with evaluating(inner), torch.no_grad(), meeting.work(inner):
            table = self._table(inner, ranks)
            meeting.end_part()
            # Where every forward is a collective, all ranks generate the same.
            count = self.n_samples if ranks.first or is_sharded(model) else 0
            samples = sample_replies(inner, self.dev, self.chat, count, every=2)
        names = sorted(table)
        flat = sum_over_ranks(np.concatenate([table[name] for name in names]).tolist(), ranks)
        parts = dict(zip(names, np.reshape(flat, (len(names), 2)), strict=True))
        metrics = {name: float(total / n) for name, (total, n) in parts.items() if n}
        right, pairs = parts["dev_pair_accuracy"]
        low, high = wilson(right, int(pairs))
        metrics |= {"dev_pair_accuracy_low": low, "dev_pair_accuracy_high": high}
        of_pairs = self.dev.kind == "preferences"
        return Evaluation(metrics, samples, in_words(metrics, of_pairs))

    def _table(self, model: Any, ranks: Ranks) -> dict[str, np.ndarray]:
        """Name -> (sum, count) over this rank's pairs."""
        labels = dict.fromkeys(source_labels(self.dev))
        found = {f"dev_pair_accuracy/source/{label}": np.zeros(2) for label in labels}
        shares = shares_of(len(self.dev), ranks.rank, ranks.size, self.micro_rows)
        with track("Judging pairs", len(self.dev) // ranks.size, "rows", self.quiet) as progress:
            for rows in shares:
                batch = batch_of_rows(self.dev, rows, self.micro_rows, self.complete, ranks.device)
                judged = self.judge(model, batch)
                real = batch.extra["pairs"].cpu().numpy() != 0
                for name, x in {"loss": judged.loss, **judged.all_numbers()}.items():
                    values = x.double().cpu().numpy()[real]
                    values = values[~np.isnan(values)] if name in judged.numbers else values
                    found.setdefault(f"dev_{name}", np.zeros(2))
                    found[f"dev_{name}"] += values.sum(), len(values)
                first = judged.first.double().cpu().numpy()
                for label, value in zip(self._labels(batch, real), first[real], strict=True):
                    if label is not None:
                        found[f"dev_pair_accuracy/source/{label}"] += value, 1
                progress.advance(len(rows))
        return found

    def _labels(self, batch: Batch, real: np.ndarray) -> list[str | None]:
        """The source of each pair that is there, in the order of `real`."""
        row, pair = np.nonzero(real)
        if not len(self.dev.documents):
            return [None] * len(row)
        segment = 2 * pair + 1 if self.dev.kind == "preferences" else pair + 1
        numbers = self.dev.numbers(batch.rows[row], segment)
        labels: list[str | None] = [*source_labels(self.dev)]
        sources = self.dev.documents["source"][numbers]
        return [labels[s] if 0 <= s < len(labels) else None for s in sources]


def in_words(metrics: dict[str, float], of_pairs: bool) -> str:
    """An evaluation's numbers for people: how often the chosen reply is put first, or a labelled
    one on its side; how the chosen ones have changed, and what that warns of."""
    low, high = (100 * metrics[f"dev_pair_accuracy_{end}"] for end in ("low", "high"))
    share = f"{100 * metrics['dev_pair_accuracy']:.1f} %"
    what, each, kind = f"{share} of the replies are judged as they are labelled", "reply", "good"
    if of_pairs:
        what = f"the chosen reply is put first in {share} of the pairs"
        each, kind = "pair", "chosen"
    words = (
        f"{what} ({low:.1f} to {high:.1f} %), loss {metrics['dev_loss']:.4f} a {each}, margin "
        f"{metrics['dev_margin']:.3g}"
    )
    if (less := metrics.get("dev_chosen_less_likely")) is not None:
        words += f"; {100 * less:.0f} % of the {kind} replies have become less likely"
    change = {"chosen_change_a_token": metrics.get("dev_chosen_change_a_token", 0.0)}
    warning = forgetting(change, of_pairs=of_pairs)
    return f"{words}; {warning}" if warning else words


def forgetting(numbers: Mapping[str, float], *, of_pairs: bool) -> str:
    """What `chosen_change_a_token` warns of: nothing while the replies stay likely."""
    change = numbers.get("chosen_change_a_token", 0.0)
    if not change < -FORGOTTEN:
        return ""
    return (
        f"the {'chosen' if of_pairs else 'good'} replies have lost {-change:.2g} nats a token: the "
        "model forgets how to write them, whatever loss and margin say; take a lower --lr, a "
        "larger --beta, or --sft_weight 1"
    )
