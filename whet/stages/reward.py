"""Reward model: a number for a reply, learnt from which of two replies people prefer.

The model gets one row of weights, `score`, in the place of its head: its product with the last
hidden state at a conversation's last token is the reward r. By Bradley and Terry the probability
that the chosen reply wins is s(r_chosen - r_rejected), s being the logistic function; the loss of a
pair is -ln of it. Only differences count, so a reward says nothing alone.

The last token is known from the packed row: nothing looks for padding. So a reward is the same
whether its conversation stands alone or among others.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from whet.data.batches import Batch, per_document
from whet.data.store import PackedStore
from whet.flags.reward import Config
from whet.model.decoder import run_batch
from whet.rl.preference_loss import reward_model_loss
from whet.stages.model import open_for_training, run_tuned
from whet.stages.pairs import Judged, open_pairs, pair_stage, sides
from whet.train.distributed import Ranks
from whet.train.stage import Stage


def build(config: Config, ranks: Ranks) -> Stage:
    """Open the pairs and the model, and check that they fit together."""
    found = list[str]()
    stores = open_pairs(config, found, ("preferences",))
    given = stores["--data"].values("margins", 2) if "--data" in stores else np.zeros(1)
    if config.margin and np.isnan(given).all():
        found.append(f"--margin {config.margin:g}: no pair of {config.data} has a margin")
    opened = open_for_training(config, ranks, found, stores, score=True)
    judge = partial(judge_rewards, margin=config.margin, centre=config.centre)
    return pair_stage(
        config,
        ranks,
        opened,
        stores,
        judge,
        at_last_tokens,
        "reward",
        "whet grpo --reward {run} --model … --prompts …",
    )


def at_last_tokens(store: PackedStore, batch: Batch) -> Batch:
    """The batch with a weight of 1 at the last token of each document, and 0 elsewhere."""
    return replace(batch, weight=last_tokens(batch.segments).float())


def last_tokens(segments: Tensor) -> Tensor:
    """(B, T) bool: whether a place is the last one of its document."""
    after = torch.zeros_like(segments)
    after[:, :-1] = segments[:, 1:]
    return (segments != after) & (segments != 0)


def judge_rewards(model: nn.Module, batch: Batch, *, margin: float, centre: float) -> Judged:
    """Bradley-Terry's loss of the pairs of a batch."""
    scores = run_batch(model, batch)
    count = 2 * batch.extra["pairs"].shape[1]
    chosen, rejected = sides(per_document(scores, batch.segments, count))
    asked = margin * batch.extra["margins"]
    loss = reward_model_loss(chosen, rejected, margin=asked, centre=centre)
    # The ledger's loss of a document is its pair's.
    each = torch.nn.functional.pad(loss.detach().repeat_interleave(2, dim=1), (1, 0))
    nll = each.gather(1, batch.segments) * batch.weight
    return Judged(loss, chosen.detach(), rejected.detach(), nll)


def main(config: Config) -> int:
    """`whet reward`."""
    return run_tuned(config, "reward", build)
