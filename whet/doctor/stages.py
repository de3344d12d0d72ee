"""What preferences and rewards build on: token losses with a gradient, DPO's start, the sampler.

`sampler` is the number that predicts GRPO's health: by so much a policy in training differs from
the one that sampled before a single step is taken.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whet.data.batches import Batch
from whet.data.reference import Reference, read_reference
from whet.data.store import PackedStore, new_store
from whet.doctor.numbers import NEW_TOKENS, compare, judge_both
from whet.doctor.subject import (
    Document,
    Finding,
    Setting,
    Subject,
    alone,
    first_layers,
    judge,
    prompt_of,
    skipped,
    worse,
)
from whet.flags import grpo as flags
from whet.flags.choices import PolicyLoss
from whet.flags.dpo import Loss
from whet.generate.engine import Reply, sample
from whet.model.decoder import Transformer, run_batch
from whet.model.embedding import add_score
from whet.rl.preference_loss import Objective
from whet.rl.prompts import Prompt, Prompts
from whet.rl.rollout_file import Rollout, lay_out, write_rollout
from whet.rl.sampling import Sample
from whet.stages.dpo import compute_reference, judge_replies, replies_of, with_reference
from whet.stages.grpo import grpo_loss
from whet.stages.pairs import batch_of_rows
from whet.stages.reward import last_tokens
from whet.train.distributed import Ranks, gradient_norm
from whet.train.step import autocast

PROMPTS = 4
GROUP = 2
PADDING = 37
BETA = 0.1
STARTS: tuple[tuple[Loss, float], ...] = (("dpo", math.log(2)), ("ipo", 1 / (4 * BETA**2)))
"""The loss of a pair where the model is its own reference."""


def losses_and_samples(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """All of it, in float32 on the CPU and as the user trains."""
    for setting in subject.settings:
        model = subject.model.to(setting.device)
        yield from _token_losses(model, subject.trained[0], setting)
        yield from _rewards(model, subject, setting)
        yield from _pairs(model, subject, setting)
        tell(f"sampling, {setting.name}")
        yield from _policy(model, subject, setting)


def _token_losses(model: Transformer, document: Document, setting: Setting) -> Iterator[Finding]:
    """A function of each token's -ln p, from the fused head and from all logits."""
    tokens, targets, weight = alone(document, setting.device)

    def fused() -> Tensor:
        return model(tokens, targets=targets, weight=weight, per_token=True).nll

    def whole() -> Tensor:
        logp = model(tokens).float().log_softmax(-1)
        return -logp.gather(-1, targets[..., None])[..., 0]

    def half(nll: Callable[[], Tensor]) -> float:
        with autocast(setting.device, setting.dtype):
            loss = ((nll() / 10).tanh() * weight).sum()
        loss.backward()
        return float(loss.detach())

    found = compare(model, partial(half, fused), partial(half, whole))
    yield from judge_both("token losses equal full logits", found, setting, setting.name)


@torch.no_grad()
def _rewards(model: Transformer, subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Scores of random weights in the place of the head, read at the end of each document: packed
    with others, followed by padding, and alone."""
    claim = "a reward is the same packed, padded and alone"
    if not isinstance(model, Transformer):
        yield from skipped("scores need one of Whet's own families", claim)
        return
    scored = first_layers(model, model.config.n_layers)
    add_score(scored)
    torch.nn.init.normal_(scored.score.weight, generator=torch.Generator().manual_seed(0))
    scored.to(setting.device)
    batch = subject.batch().to(setting.device)
    ends = last_tokens(batch.segments)
    worst, largest = 0.0, 0.0
    with autocast(setting.device, setting.dtype):
        packed = run_batch(scored, replace(batch, weight=ends.float(), plan=None))[ends]
        for found, document in zip(packed.tolist(), subject.documents, strict=True):
            ids = torch.from_numpy(document.ids).to(setting.device)[None]
            for padding in (0, PADDING):
                tokens = torch.nn.functional.pad(ids, (0, padding))
                segments = (torch.arange(tokens.shape[1], device=ids.device) < ids.shape[1]).long()
                weight = last_tokens(segments[None]).float()
                reward = float(scored(tokens, None, segments[None], weight=weight).sum())
                worst = worse(worst, abs(found - reward))
                largest = max(largest, abs(reward))
    note = f"{len(subject.documents)} documents, {setting.name}"
    yield judge(claim, worst / (largest or 1.0), setting.bounds.loss, note)


@torch.no_grad()
def _pairs(model: Transformer, subject: Subject, setting: Setting) -> Iterator[Finding]:
    """The first two documents of each row are a pair, the model is its own reference: from a file
    as a run has it, which is made row by row."""
    store, path = _pairs_file(subject), subject.scratch / "reference.safetensors"
    ranks, stores = Ranks(device=setting.device), {"--data": store}
    with autocast(setting.device, setting.dtype):
        wanted = Reference("it")
        compute_reference(stores, wanted, path, model, ranks, micro_rows=1, quiet=True)
        complete = partial(with_reference, reference=read_reference(path, wanted, stores))
        rows = np.arange(len(store))
        batch = batch_of_rows(store, rows, len(rows), complete, setting.device)
        now = replies_of(model, batch)[0]
        losses = {
            kind: judge_replies(model, batch, objective=Objective(kind, BETA)).loss
            for kind, _ in STARTS
        }
    bound, note = setting.bounds.loss, f"{len(store)} pairs, {setting.name}"
    gap = float(now.change.abs().max() / now.logp.abs().max())
    yield judge("cached reference log-probs are those on the fly", gap, bound, note)
    worst = max(float((losses[kind] / start - 1).abs().max()) for kind, start in STARTS)
    yield judge("DPO begins at ln 2, IPO at 1/(4 beta^2)", worst, bound, note)


def _pairs_file(subject: Subject) -> PackedStore:
    """The rows that are trained, with their first two documents each."""
    path = subject.scratch / "pairs.h5"
    if not path.exists():
        read = subject.arrays()
        segments = np.where(read.segment_ids > 2, 0, read.segment_ids)[:-1]
        mask, shape = read.loss_mask[:-1] * (segments > 0), segments.shape
        attrs = {"kind": "preferences"}
        with new_store(path, *shape, weighted=True, attrs=attrs) as writer:
            writer.write_rows(read.tokens[:-1], mask, segments)
    return PackedStore(path, ("preferences",))


def _policy(model: Transformer, subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Replies of the batched engine as a rollout's file, and what the loss makes of them before the
    first step."""
    room = max(1, model.config.max_positions - NEW_TOKENS)
    asked = [prompt_of(document)[:room] for document in subject.trained[:PROMPTS]]
    each = [(i, k) for i in range(len(asked)) for k in range(GROUP)]
    with autocast(setting.device, setting.dtype):
        prompts = [asked[i] for i, _ in each]
        replies = sample(model, prompts, keys=each, max_new_tokens=NEW_TOKENS, stop_ids=())
    batch = _rollout(asked, replies, lambda k: float(k), subject.scratch).to(setting.device)
    gaps = list[tuple[Tensor, Tensor]]()

    def loss(kind: PolicyLoss | None, batch: Batch) -> float:
        with autocast(setting.device, setting.dtype):
            sums = grpo_loss(model, batch, kind=kind, low=0.2, high=0.28, temperature=1.0)
        gaps.append(sums.named["mismatch"])
        sums.loss.backward()
        return float(sums.loss.detach())

    found = compare(model, partial(loss, "clip", batch), partial(loss, None, batch))
    total, count = gaps[0]
    bound, note = setting.bounds.gradient, f"{int(count)} tokens, {setting.name}"
    yield judge("the sampler's log-probs are the trainer's", float(total / count), bound, note)
    claim = "the first policy step: ratio 1, SFT's gradient"
    yield judge(claim, found.gradient, bound, setting.name)
    model.zero_grad(set_to_none=True)
    loss(None, _rollout(asked, replies, lambda k: 0.3, subject.scratch).to(setting.device))
    norm = float(gradient_norm(list(model.parameters())))
    model.zero_grad(set_to_none=True)
    yield judge("replies of equal reward have no gradient", norm, 0.0, setting.name)


def _rollout(
    asked: list[list[int]], replies: list[Reply], reward: Callable[[int], float], folder: Path
) -> Batch:
    """GROUP replies to each prompt, the k-th worth `reward(k)`, as the batch of a step."""
    lines = [Prompt(ids, [], None, {}, line) for line, ids in enumerate(asked, 1)]
    prompts, path = Prompts(folder, lines), folder / "rollout.h5"
    groups = [
        [Sample(i, replies[GROUP * i + k], reward(k), {}) for k in range(GROUP)]
        for i in range(len(asked))
    ]
    config = flags.Config(model="", prompts=path, out=folder, advantage="plain")
    write_rollout(path, lay_out(groups, prompts, config, 0), prompts, {}, {})
    (batch,) = Rollout(path, 0).batches(0, Ranks(), len(replies), 0)
    return batch
