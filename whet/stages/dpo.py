"""Direct preference optimisation: from pairs of replies to a model that writes the better kind.

A reply's implicit reward is beta x (ln p under the model - ln p under the reference), the reference
being the model that training begins with. DPO is the reward model's loss with that reward: the
model becomes its own judge. Its relatives, in the table of `whet.rl.preference_loss`, differ in
what they compare.

The reference is no second model but two numbers a pair, computed before the first step. What the
loss leaves open is where the probability goes: both replies may become unlikely as long as the
rejected one does so faster. So the chosen reply's own log-probability is logged, and said in words.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet.data.batches import Batch, make_batch, per_document, shares_of
from whet.data.layout import Rows
from whet.data.reference import MISMATCHED, Reference, mismatched, read_reference
from whet.data.store import PackedStore
from whet.flags.dpo import WITHOUT_REFERENCE, Config
from whet.generate.engine import evaluating
from whet.model.decoder import run_batch
from whet.model.lora.lora import adapters
from whet.progress import track
from whet.rl.preference_loss import Objective, Replies, implicit_reward, kto_loss, preference_loss
from whet.stages.model import open_for_training, run_tuned
from whet.stages.packed import batches_of_step
from whet.stages.pairs import (
    Judged,
    batch_of_rows,
    forgetting,
    open_pairs,
    pair_stage,
    sides,
    units_of,
)
from whet.train.distributed import Ranks, sum_over_ranks, unwrap
from whet.train.resume import weights_fingerprint
from whet.train.signals import Stop
from whet.train.stage import Evaluation, Stage

ADAPTER_LR = 1e-5


def build(config: Config, ranks: Ranks) -> Stage:
    """Open the pairs, the model and the reference, and check that they fit together."""
    found = list[str]()
    units = ("preferences", "labels") if config.loss == "kto" else ("preferences",)
    stores = open_pairs(config, found, units)
    opened = open_for_training(config, ranks, found, stores, adapter_lr=ADAPTER_LR)
    beta = config.beta or (2.0 if config.loss == "simpo" else 0.1)
    gamma = (beta / 2 if config.gamma is None else config.gamma) if config.loss == "simpo" else 0.0
    objective = Objective(config.loss, beta, gamma, config.label_smoothing, config.sft_weight)
    z = Baseline() if config.loss == "kto" else None
    judge = partial(judge_replies, objective=objective, z=z)
    kinds = ("",) if z is None else ("", MISMATCHED)
    reference, made = Reference("", kinds), config.out / "reference.safetensors"
    if config.loss not in WITHOUT_REFERENCE:
        reference.model = f"{model_fingerprint(opened.model)} {config.precision}"
        is_begun = made.exists() and (config.out / "config.toml").exists()
        if path := config.reference or (made if is_begun else None):
            without = "leave out --reference" if config.reference else "remove it"
            reference = read_reference(path, reference, stores, without)
    complete = partial(with_reference, reference=reference)
    stage = pair_stage(config, ranks, opened, stores, judge, complete, "dpo")
    of_pairs = stores["--data"].kind == "preferences"
    stage = replace(stage, warn=partial(forgetting, of_pairs=of_pairs))
    if config.loss not in WITHOUT_REFERENCE and not reference.logp:
        start = partial(
            compute_reference,
            stores,
            reference,
            made,
            micro_rows=config.micro_rows,
            quiet=config.quiet or not ranks.first,
        )
        stage = replace(stage, at_start=start)
    return stage if z is None else with_baseline(stage, config, stores, z, reference, ranks)


def with_reference(
    store: PackedStore, batch: Batch, *, reference: Reference, kind: str = ""
) -> Batch:
    """The batch with `reference` (B, S + 1), and with `pairs` where it has single labelled
    replies; of the kind MISMATCHED with each reply after another prompt."""
    extra = dict(batch.extra)
    if kind == MISMATCHED:
        read = Rows(*(x.numpy() for x in (batch.tokens, batch.loss_mask, batch.segments)))
        read = mismatched(read, 1 if store.kind == "labels" else 2)
        batch = make_batch(read, batch.rows, total=batch.total, epoch=batch.epoch)
    if store.kind == "labels":
        extra["pairs"] = (extra["labels"][:, 1:] != 0).float()
        count = extra["pairs"].shape[1]
    else:
        count = 2 * extra["pairs"].shape[1]
    extra["reference"] = torch.from_numpy(reference.rows(store, batch.rows, count, kind))
    return replace(batch, extra=extra)


def replies_of(model: nn.Module, batch: Batch) -> tuple[Replies, Tensor]:
    """The log-probabilities of the documents of a batch, each (B, S + 1); and -ln p (B, T)."""
    found = run_batch(model, batch, per_token=True)
    reference = batch.extra["reference"]
    count = reference.shape[1] - 1
    logp = per_document(-found.nll.double() * batch.weight, batch.segments, count)
    tokens = per_document(batch.weight, batch.segments, count)
    return Replies(logp, reference, tokens), found.nll.detach()


def judge_replies(
    model: nn.Module,
    batch: Batch,
    *,
    objective: Objective,
    z: "Baseline | None" = None,
) -> Judged:
    """The loss of the pairs, or of the labelled replies, of a batch."""
    both, nll = replies_of(model, batch)
    kind, baseline = objective.kind, z.value if z is not None else 0.0
    if "labels" in batch.extra:
        return _judge_labelled(both, nll, batch.extra["labels"][:, 1:], objective, baseline)
    parts = [sides(x) for x in (both.logp, both.reference, both.tokens)]
    chosen, rejected = (Replies(*(part[i] for part in parts)) for i in (0, 1))
    loss = preference_loss(chosen, rejected, **vars(objective), z=baseline)
    numbers = {"chosen_logp": chosen.logp.detach(), "rejected_logp": rejected.logp.detach()}
    if kind not in WITHOUT_REFERENCE:
        numbers |= _changes(chosen)
    better, worse = (implicit_reward(side, kind, objective.beta) for side in (chosen, rejected))
    return Judged(loss, better, worse, nll, numbers)


def _judge_labelled(
    both: Replies, nll: Tensor, labels: Tensor, objective: Objective, z: float
) -> Judged:
    """KTO of single replies: a good one, or the model against a bad one, stands as chosen."""
    replies = Replies(*(x[:, 1:] for x in (both.logp, both.reference, both.tokens)))
    good, beta = labels > 0, objective.beta
    loss = kto_loss(replies, good, beta, z) - objective.sft_weight * replies.mean * good
    reward = implicit_reward(replies, "kto", beta) * labels
    numbers = _changes(replies, torch.where(good, 0.0, torch.nan))
    return Judged(loss, reward, torch.zeros_like(reward), nll, numbers)


def _changes(replies: Replies, left_out: Tensor | float = 0.0) -> dict[str, Tensor]:
    """How the chosen replies have changed; NaN, added to some, leaves these out."""
    return {
        "chosen_less_likely": (replies.change < 0).double() + left_out,
        "chosen_change_a_token": replies.mean_change.detach() + left_out,
    }


def compute_reference(
    stores: Mapping[str, PackedStore],
    reference: Reference,
    path: Path,
    model: nn.Module,
    ranks: Ranks,
    *,
    micro_rows: int,
    quiet: bool,
) -> None:
    """Fill `reference` with the numbers of `model` as it is, and write the file.

    All ranks call it, each with its rows; all do the same number of forward passes.
    """
    inner: Any = unwrap(model)
    rows = len(reference.kinds) * sum(len(store) for store in stores.values()) // ranks.size
    with track("Reference log-probabilities", rows, "rows", quiet) as progress:
        for store, kind in product(stores.values(), reference.kinds):
            empty = partial(with_reference, reference=Reference(""), kind=kind)
            logp = np.zeros(len(store.document_rows))
            for share in shares_of(len(store), ranks.rank, ranks.size, micro_rows):
                batch = batch_of_rows(store, share, micro_rows, empty, ranks.device)
                with torch.no_grad(), evaluating(inner):
                    found = replies_of(inner, batch)[0].logp.cpu().numpy()
                row, segment, number = store.documents_in(share)
                logp[number] = found[row, segment]
                progress.advance(len(share))
            summed = sum_over_ranks(logp.tolist(), ranks)
            reference.logp[store.fingerprint + kind] = np.array(summed)
    if ranks.first:
        reference.save(path)


@dataclass
class Baseline:
    """KTO's z of the step or the dev file at hand: the divergence from the reference that any reply
    has, by which a good one must be better and a bad one worse (arXiv:2402.01306, section 4.2)."""

    value: float = 0.0

    def measure(self, model: nn.Module, batches: Iterable[Batch], ranks: Ranks) -> None:
        """max(0, mean of ln p - ln p_reference) over replies to other prompts, the documents of all
        ranks' `batches`, which are equally many on each. No gradient."""
        inner: Any = unwrap(model)
        total, count = 0.0, 0.0
        with torch.no_grad(), evaluating(inner):
            for batch in batches:
                replies = replies_of(inner, batch.to(ranks.device))[0]
                there = replies.tokens > 0
                total += float(replies.change[there].sum())
                count += float(there.sum())
        total, count = sum_over_ranks([total, count], ranks)
        self.value = max(0.0, total / count) if count else 0.0


def with_baseline(
    stage: Stage,
    config: Config,
    stores: Mapping[str, PackedStore],
    z: Baseline,
    reference: Reference,
    ranks: Ranks,
) -> Stage:
    """The stage with `z` measured over the whole global batch before each step, and over the whole
    dev file before it is evaluated: so it depends on neither micro-batches nor ranks."""
    store, dev, micro_rows = stores["--data"], stores.get("--dev"), config.micro_rows
    complete = partial(with_reference, reference=reference, kind=MISMATCHED)
    of_data = partial(complete, store)

    def before_step(step: int, model: nn.Module, ranks: Ranks, stop: Stop) -> dict[str, float]:
        batches = batches_of_step(step, config=config, store=store, ranks=ranks, complete=of_data)
        z.measure(model, batches, ranks)
        return {"kl": z.value}

    def evaluate(model: nn.Module, ranks: Ranks, stop: Stop) -> Evaluation:
        assert dev is not None, "a stage without it evaluates nothing"
        assert stage.evaluate is not None
        shares = shares_of(len(dev), ranks.rank, ranks.size, micro_rows)
        each = (batch_of_rows(dev, s, micro_rows, complete, ranks.device) for s in shares)
        z.measure(model, each, ranks)
        return stage.evaluate(model, ranks, stop)

    alone = "no row holds replies to other prompts, so KTO's baseline stays 0; prepare longer rows"
    notes = [("note", alone)] if units_of(store).max() <= 1 else []
    header = [*stage.header, *notes]
    measured = evaluate if stage.evaluate is not None else None
    return replace(stage, before_step=before_step, evaluate=measured, header=header)


def model_fingerprint(model: nn.Module) -> str:
    """Of the model as it computes: an adapter that changes nothing yet does not count."""
    idle = [f"{name}." for name, layer in adapters(model) if not bool(layer.b.any())]
    own = (".a", ".b", ".magnitude")
    return weights_fingerprint(
        {
            name.replace(".base.", "."): weight
            for name, weight in model.named_parameters()
            if weight.is_floating_point()
            and not (name.endswith(own) and name.startswith(tuple(idle)))
        }
    )


def main(config: Config) -> int:
    """`whet dpo`."""
    return run_tuned(config, "dpo", build)
