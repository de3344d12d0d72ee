"""A stage whose rows come from a packed file: what pretraining, SFT and preferences share."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from whet.chat.chat import Chat
from whet.config import as_toml
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
from whet.model.decoder import Transformer, run_batch
from whet.model.hf.weights import saved_as
from whet.model.lora.lora import LoRA
from whet.stages.model import ModelWriter
from whet.train.distributed import Ranks
from whet.train.evaluation import Evaluator
from whet.train.session import total_steps
from whet.train.stage import Stage, Sums


def packed_stage(
    config: TrainSettings,
    ranks: Ranks,
    model: Transformer,
    chat: Chat | None,
    store: PackedStore,
    dev: PackedStore | None,
    *,
    lineage: dict[str, Any],
    lora: LoRA | None = None,
    questions: Sequence[Problem] = (),
    header: Sequence[tuple[str, str]],
) -> Stage:
    """The stage that minimises the weighted loss of the tokens of `store`.

    `lineage` is completed by what the file and the settings are; `questions` are answered at each
    evaluation.
    """
    for each in filter(None, (store, dev)):
        _ = each.scan  # reads all rows, and refuses those that cannot be trained or measured
    trained = float(store.loss_tokens[: rows_used(config, store)].sum())
    if trained == 0:
        raise UserError(f"{store.path}: no token of it is trained; see `whet inspect {store.path}`")
    assert config.micro_batch_size is not None, "resolved before"
    save = writer(config, model, chat, store, lineage, lora)
    evaluate = None
    if dev is not None or questions:
        quiet = config.quiet or not ranks.first
        evaluate = Evaluator(dev, chat, config.micro_batch_size, questions, config.samples, quiet)
    return Stage(
        model=model,
        documents=store,
        dev=dev,
        total_steps=total_steps(config, steps_of_epoch(config, store)),
        batches=partial(batches_of_step, **order_of(config, store), store=store, ranks=ranks),
        loss_fn=token_loss,
        evaluate=evaluate,
        save_model=save,
        rehearse=save.rehearse,
        header=[*header, *data_in_words(config, store, dev, f"{trained:,.0f} trained tokens")],
    )


def writer(
    config: TrainSettings,
    model: Transformer,
    chat: Chat | None,
    store: PackedStore,
    lineage: dict[str, Any],
    lora: LoRA | None,
) -> ModelWriter:
    """Saves the model with where it comes from: `lineage`, the packed file, and the settings, as
    the SHA-256 of the run's config.toml."""
    lineage = {
        "data": str(store.path),
        **lineage,
        "data_hash": store.fingerprint,
        "tokenizer_hash": store.attrs.get("tokenizer_hash"),
        "template_hash": store.attrs.get("template_hash"),
        "config_hash": hashlib.sha256(as_toml(config).encode()).hexdigest(),
    }
    dtype = saved_as("same", model.config.hf)
    return ModelWriter(chat, lineage, config.out_ckpt, config.out, lora, dtype)


def data_in_words(
    config: TrainSettings, store: PackedStore, dev: PackedStore | None, trained: str
) -> list[tuple[str, str]]:
    """What a header says of the data; `trained`: how much is trained in it."""
    size = f"{rows_used(config, store):,} rows of {store.context_length:,}, {trained}"
    return [
        ("data", f"{store.path}: {size}, {steps_of_epoch(config, store):,} steps an epoch"),
        ("dev", f"{dev.path}: {len(dev):,} rows" if dev else "none, so there is no dev loss"),
    ]


def rows_used(config: TrainSettings, store: PackedStore) -> int:
    """How many rows of the file are trained on."""
    return min(len(store), config.overfit_rows or len(store))


def steps_of_epoch(config: TrainSettings, store: PackedStore) -> int:
    """Optimizer steps in which each row is trained once."""
    return steps_per_epoch(rows_used(config, store), config.batch_size)


def order_of(config: TrainSettings, store: PackedStore) -> dict[str, Any]:
    """The arguments of `batches_of_step` that the settings decide."""
    sizes = {"batch_size": config.batch_size, "micro_batch_size": config.micro_batch_size}
    return {"n_rows": rows_used(config, store), "seed": config.seed, **sizes}


def token_loss(model: nn.Module, batch: Batch) -> Sums:
    """sum(weight x -ln p(target)) of a micro-batch."""
    found = run_batch(model, batch)
    return Sums(found.loss, found.nll)


def batches_of_step(
    step: int,
    *,
    store: PackedStore,
    n_rows: int,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    ranks: Ranks,
    weights: np.ndarray | None = None,
    complete: Callable[[Batch], Batch] = lambda batch: batch,
) -> list[Batch]:
    """This rank's micro-batches of global batch `step`; equally many on every rank.

    `weights` (rows,) add up to the batch's `total`; by default what the tokens of a row weigh.
    `complete` puts into this rank's share what the stage needs besides.
    """
    whole = global_batch_rows(n_rows, batch_size, seed, step)
    mine: np.ndarray = whole[ranks.rank :: ranks.size]
    weights = store.loss_tokens if weights is None else weights
    epoch = step // steps_per_epoch(n_rows, batch_size)
    share = read_batch(store, mine, total=float(weights[whole].sum()), epoch=epoch)
    count = micro_batch_count(len(whole), ranks.size, micro_batch_size)
    cut = micro_batches(complete(share), micro_batch_size, count)
    return [planned(micro) for micro in cut]
