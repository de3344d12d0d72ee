"""What preferences and rewards build on: token losses with a gradient, DPO's start, the sampler.

`sampler` is the number that predicts GRPO's health: by so much a policy in training differs from
the one that sampled before a single step is taken.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from whet.data.batches import Batch, make_batch, per_document
from whet.data.rows import Rows
from whet.doctor.finding import BOUNDS, Finding, judge
from whet.doctor.numbers import compare
from whet.doctor.subject import Document, Setting, Subject, alone, prompt_of
from whet.generate.engine import Reply, evaluating, sample
from whet.model.decoder import Transformer, run_batch
from whet.rl.policy_loss import policy_term
from whet.rl.preference_loss import Replies, preference_loss
from whet.stages import packed
from whet.train.step import autocast

NEW_TOKENS = 16
PROMPTS = 4
MISMATCH = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Mean difference of ln p of a sampled token: rounding, in the precision of the products."""
START = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""By how much DPO's first loss may differ from ln 2."""


def losses_and_samples(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """All of it, in float32 on the CPU and as the user trains."""
    for setting in subject.settings:
        model = subject.model.to(setting.device)
        yield from _token_losses(model, subject.trained[0], setting)
        yield _start_of_dpo(model, subject.batch().to(setting.device), setting)
        tell(f"sampling, {setting.name}")
        yield from _sampler(model, subject.trained[:PROMPTS], setting)


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
    bounds = BOUNDS[setting.precision]
    yield judge("token losses equal full logits: loss", found.loss, bounds.loss, setting.name)
    yield judge(
        "token losses equal full logits: gradient", found.gradient, bounds.gradient, setting.name
    )


@torch.no_grad()
def _start_of_dpo(model: Transformer, batch: Batch, setting: Setting) -> Finding:
    """The first two documents of each row are a pair, the model is its own reference."""
    with autocast(setting.device, setting.dtype):
        with evaluating(model):
            nll = packed.token_loss(model, batch).nll
            reference = per_document(-nll.double() * batch.weight, batch.segments)
        found = run_batch(model, batch, per_token=True)
    logp = per_document(-found.nll.double() * batch.weight, batch.segments)
    tokens = per_document(batch.weight, batch.segments)
    chosen, rejected = (Replies(logp[:, s], reference[:, s], tokens[:, s]) for s in (1, 2))
    loss = preference_loss(chosen, rejected, "dpo", beta=0.1)
    worst = float((loss - math.log(2)).abs().max())
    note = f"{len(loss)} pairs, {setting.name}"
    return judge("DPO begins at ln 2", worst, START[setting.precision], note)


def _sampler(model: Transformer, documents: list[Document], setting: Setting) -> Iterator[Finding]:
    """Replies of the batched engine, and what the loss makes of them before the first step."""
    room = max(1, model.config.max_positions - NEW_TOKENS)
    prompts = [prompt_of(document)[:room] for document in documents]
    with autocast(setting.device, setting.dtype):
        keys = [(0, i) for i in range(len(prompts))]
        replies = sample(model, prompts, keys=keys, max_new_tokens=NEW_TOKENS, stop_ids=())
    batch, sampled = _rollout(prompts, replies, setting.device)
    inside = batch.weight != 0
    sign = 1 - 2 * (torch.arange(len(prompts), device=setting.device) % 2)
    advantage = sign[:, None] * inside.float()
    gaps = list[Tensor]()

    def policy() -> float:
        with autocast(setting.device, setting.dtype):
            nll = run_batch(model, batch, per_token=True).nll
        gaps.append((nll.detach() - sampled).abs()[inside])
        part = policy_term(nll, sampled, advantage, "clip", low=0.2, high=0.28)
        loss = (part.term * batch.weight).sum() / batch.total
        loss.backward()
        return float(loss.detach())

    def weighted() -> float:
        with autocast(setting.device, setting.dtype):
            loss = run_batch(model, batch, weight=batch.weight * advantage).loss / batch.total
        loss.backward()
        return float(loss.detach())

    found, gap = compare(model, policy, weighted), gaps[0]
    note = f"{len(gap)} tokens, at most {float(gap.max()):.2g}, {setting.name}"
    bound = MISMATCH[setting.precision]
    yield judge("the sampler's log-probs are the trainer's", float(gap.mean()), bound, note)
    bound = BOUNDS[setting.precision].gradient
    yield judge(
        "the first policy step: ratio 1, SFT's gradient", found.gradient, bound, setting.name
    )


def _rollout(
    prompts: list[list[int]], replies: list[Reply], device: torch.device
) -> tuple[Batch, Tensor]:
    """The replies after their prompts as a batch, a row each; and the sampler's -ln p (B, T) of
    each target."""
    texts = [prompt + reply.ids for prompt, reply in zip(prompts, replies, strict=True)]
    shape = (len(texts), max(map(len, texts)))
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask, logp = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for i, (text, reply) in enumerate(zip(texts, replies, strict=True)):
        there = slice(len(text) - len(reply.ids), len(text))
        tokens[i, : len(text)], segments[i, : len(text)] = text, 1
        mask[i, there], logp[i, there] = 1, reply.logp
    batch = make_batch(Rows(tokens, mask, segments), np.arange(len(texts)), total=mask.sum())
    return batch.to(device), -torch.from_numpy(logp).roll(-1, 1).to(device)
