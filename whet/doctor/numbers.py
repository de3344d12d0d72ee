"""Losses, gradients and logits of this model on this device: packed, and each document alone; and
generation with the cache against a forward pass over the whole text.

Two gradients are compared without holding both: the first is negated where it lies, the second
added to it. What remains is their difference.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from whet.data.batches import Batch
from whet.doctor.subject import (
    DOCUMENTS_PER_ROW,
    Difference,
    Document,
    Finding,
    Setting,
    Subject,
    alone,
    failed,
    judge,
    prompt_of,
    worse,
)
from whet.generate.engine import evaluating, generate
from whet.model.decoder import Transformer
from whet.stages import packed
from whet.train.distributed import gradient_norm
from whet.train.step import autocast

Tell = Callable[[str], None]
Half = Callable[[], float]
"""Adds its gradient to the parameters' and returns its loss."""
NEW_TOKENS = 16
PROMPTS = 5
CHOSEN_BOUND = 1e-3
"""By how much, in natural logarithms, a chosen token may lie below the likeliest: where two are
equally likely, rounding chooses."""


def compare(model: Transformer, one: Half, other: Half) -> Difference:
    """How far `one` and `other` lie apart, relative to `other`."""
    model.zero_grad(set_to_none=True)
    first = one()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.neg_()
    before = float(gradient_norm(list(model.parameters())))
    second = other()
    left = float(gradient_norm(list(model.parameters())))
    model.zero_grad(set_to_none=True)
    return Difference(relative(first - second, second), relative(left, before))


def judge_both(claim: str, found: Difference, setting: Setting, note: str) -> Iterator[Finding]:
    """The findings of a loss and of its gradient."""
    yield judge(f"{claim}: loss", found.loss, setting.bounds.loss, note)
    yield judge(f"{claim}: gradient", found.gradient, setting.bounds.gradient, note)


def relative(difference: float, size: float) -> float:
    """|difference| / |size|, and 0 of 0 is 0."""
    return abs(difference) / abs(size) if size else (0.0 if difference == 0 else float("inf"))


def packed_equals_alone(subject: Subject, tell: Tell) -> Iterator[Finding]:
    """Promise 2: documents packed in one row do not see each other."""
    for setting in subject.settings:
        model, batch = subject.model.to(setting.device), subject.batch().to(setting.device)
        found = compare(
            model,
            partial(_packed_half, model, batch, setting),
            partial(_alone_half, model, subject.trained, batch.total, setting),
        )
        where = f"{DOCUMENTS_PER_ROW} documents a row, {setting.name}"
        yield from judge_both("packed equals separate", found, setting, where)
        yield _no_leak(model, batch, setting)


def _packed_half(model: Transformer, batch: Batch, setting: Setting) -> float:
    with autocast(setting.device, setting.dtype):
        found = packed.token_loss(model, batch)
    (found.loss / batch.total).backward()
    return float(found.loss.detach()) / batch.total


def _alone_half(
    model: Transformer, documents: Sequence[Document], total: float, setting: Setting
) -> float:
    loss = 0.0
    for document in documents:
        tokens, targets, weight = alone(document, setting.device)
        with autocast(setting.device, setting.dtype):
            found = model(tokens, targets=targets, weight=weight)
        (found.loss / total).backward()
        loss += float(found.loss.detach()) / total
    return loss


@torch.no_grad()
def _no_leak(model: Transformer, batch: Batch, setting: Setting) -> Finding:
    """Change one document of each row: the largest change of a logit of another one."""
    claim = "changing a document moves no logit of another"
    batch = replace(batch, weight=(batch.weight != 0).float())
    leak, moved = 0.0, 0.0
    with autocast(setting.device, setting.dtype):
        logits, nll = _first_row_logits(model, batch), packed.token_loss(model, batch).nll
        for number in range(1, DOCUMENTS_PER_ROW + 1):
            inside = batch.segments == number
            other = (batch.tokens + 1 + number) % model.config.vocab_size
            changed = replace(batch, tokens=torch.where(inside, other, batch.tokens))
            change = (_first_row_logits(model, changed) - logits).abs()
            outside = (batch.segments[:1] != number) & (batch.segments[:1] != 0)
            leak = worse(leak, float(change[outside].max()))
            moved = max(moved, float(change[inside[:1]].max()))
            # The training path leaves out what nothing depends on; it is another road.
            change = (packed.token_loss(model, changed).nll - nll).abs()
            leak = worse(leak, float(change[~inside].max()))
    if not moved > 0:
        return failed(claim, f"changing a document moves nothing at all, {setting.name}")
    return judge(claim, leak, 0.0, f"its own move by up to {moved:.2g}, {setting.name}")


def _first_row_logits(model: Transformer, batch: Batch) -> Tensor:
    """(1, T, V): all logits of all rows would be too many for a large vocabulary."""
    return model(batch.tokens[:1], None, batch.segments[:1]).float()


@torch.no_grad()
def cache_equals_none(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Greedy replies of the batched engine, judged by the logits of a forward without cache."""
    device = subject.settings[0].device
    model = subject.model.to(device)
    room = max(1, model.config.max_positions - NEW_TOKENS)
    prompts = [prompt_of(document)[:room] for document in subject.trained[:PROMPTS]]
    # Fewer rows than prompts: rows of the cache are used again.
    replies = generate(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=(), batch_size=2)
    worst = 0.0
    with evaluating(model):
        for prompt, reply in zip(prompts, replies, strict=True):
            text = torch.tensor([prompt + reply], device=device)
            logits = model(text)[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, text[0, len(prompt) :, None])[:, 0]
            worst = worse(worst, float((logits.amax(1) - chosen).max()))
    count = sum(map(len, replies))
    note = f"{count} tokens of {len(prompts)} replies, {subject.settings[0].name}"
    yield judge("the cache chooses the tokens that no cache would", worst, CHOSEN_BOUND, note)
