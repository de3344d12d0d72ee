"""A stage whose rows come from a packed file: what pretraining, SFT and preferences share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from whet.data.batches import (
    Batch,
    global_batch_rows,
    micro_batch_count,
    micro_batches,
    read_batch,
    steps_per_epoch,
)
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.evaluate.gsm8k import Problem
from whet.flags.training import TrainSettings
from whet.model.attention import planned
from whet.model.decoder import run_batch
from whet.progress import count
from whet.stages.model import Opened, writer
from whet.train.distributed import Ranks
from whet.train.evaluation import Evaluator
from whet.train.session import total_steps
from whet.train.stage import Stage, Sums


def packed_stage(
    config: TrainSettings,
    ranks: Ranks,
    opened: Opened,
    stage: str,
    store: PackedStore,
    dev: PackedStore | None,
    questions: Sequence[Problem] = (),
) -> Stage:
    """The stage that minimises the weighted loss of the tokens of `store`; `questions` are answered
    at each evaluation."""
    for each in filter(None, (store, dev)):
        _ = each.scan  # reads all rows, and refuses those that cannot be trained or measured
    trained = float(store.loss_tokens[: rows_used(config, store)].sum())
    if trained == 0:
        raise UserError(f"{store.path}: no token of it is trained; see `whet inspect {store.path}`")
    save = writer(config, opened, stage, facts_of(store))
    about = data_in_words(config, store, dev, f"{trained:,.0f} trained tokens")
    evaluate = None
    if dev is not None or questions:
        quiet, rows = config.quiet or not ranks.first, config.micro_rows
        evaluate = Evaluator(dev, opened.chat, rows, questions, config.samples, quiet)
    return Stage(
        model=opened.model,
        documents=store,
        dev=dev,
        total_steps=total_steps(config, steps_of_epoch(config, store)),
        batches=partial(batches_of_step, config=config, store=store, ranks=ranks),
        loss_fn=token_loss,
        evaluate=evaluate,
        save_model=save,
        rehearse=save.rehearse,
        header=[*opened.header, *about],
    )


def facts_of(store: PackedStore) -> dict[str, Any]:
    """What a model's lineage says of the packed file that it was trained on."""
    hashes = {name: store.attrs.get(name) for name in ("tokenizer_hash", "template_hash")}
    return {"data": str(store.path), "data_hash": store.fingerprint, **hashes}


def data_in_words(
    config: TrainSettings, store: PackedStore, dev: PackedStore | None, trained: str
) -> list[tuple[str, str]]:
    """What a header says of the data; `trained`: how much is trained in it."""
    size = f"{count(rows_used(config, store), 'rows')} of {store.context_length:,}, {trained}"
    return [
        ("data", f"{store.path}: {size}, {count(steps_of_epoch(config, store), 'steps')} an epoch"),
        (
            "dev",
            f"{dev.path}: {len(dev):,} rows" if dev else "none, so there is no dev loss",
        ),
    ]


def rows_used(config: TrainSettings, store: PackedStore) -> int:
    """How many rows of the file are trained on."""
    return min(len(store), config.overfit_rows or len(store))


def steps_of_epoch(config: TrainSettings, store: PackedStore) -> int:
    """Optimizer steps in which each row is trained once."""
    return steps_per_epoch(rows_used(config, store), config.batch_size)


def token_loss(model: nn.Module, batch: Batch) -> Sums:
    """sum(weight x -ln p(target)) of a micro-batch."""
    found = run_batch(model, batch)
    return Sums(found.loss, found.nll)


def batches_of_step(
    step: int,
    *,
    config: TrainSettings,
    store: PackedStore,
    ranks: Ranks,
    weights: np.ndarray | None = None,
    complete: Callable[[Batch], Batch] = lambda batch: batch,
) -> list[Batch]:
    """This rank's micro-batches of global batch `step`; equally many on every rank.

    `weights` (rows,) add up to the batch's `total`; by default what the tokens of a row weigh.
    `complete` puts into this rank's share what the stage needs besides.
    """
    whole = global_batch_rows(rows_used(config, store), config.batch_size, config.seed, step)
    mine: np.ndarray = whole[ranks.rank :: ranks.size]
    weights = store.loss_tokens if weights is None else weights
    epoch = step // steps_of_epoch(config, store)
    share = read_batch(store, mine, total=float(weights[whole].sum()), epoch=epoch)
    count = micro_batch_count(len(whole), ranks.size, config.micro_rows)
    cut = micro_batches(complete(share), config.micro_rows, count)
    return [planned(micro) for micro in cut]
