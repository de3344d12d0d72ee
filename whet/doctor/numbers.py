"""Losses, gradients and logits: packed or alone, fused or plain, whole or in micro-batches.

Two gradients are compared without holding both: the first is negated where it lies, the second
added to it. What remains is their difference.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from whet.data.batches import Batch
from whet.data.store import PackedStore
from whet.doctor.finding import BOUNDS, Finding, judge, worse
from whet.doctor.subject import DOCUMENTS_PER_ROW, Document, Setting, Subject, alone
from whet.model.decoder import Transformer
from whet.model.loss import sft_loss
from whet.stages import packed, sft
from whet.train.ahead import to_device
from whet.train.distributed import Ranks, gradient_norm
from whet.train.signals import Stop
from whet.train.stage import Stage
from whet.train.step import autocast, forward_backward

Tell = Callable[[str], None]
Half = Callable[[], float]
"""Adds its gradient to the parameters' and returns its loss."""


@dataclass(frozen=True)
class Difference:
    """Relative differences of two ways to the same loss."""

    loss: float
    gradient: float


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
        bounds, where = (
            BOUNDS[setting.precision],
            f"{DOCUMENTS_PER_ROW} documents a row, {setting.name}",
        )
        yield judge("packed equals separate: loss", found.loss, bounds.loss, where)
        yield judge("packed equals separate: gradient", found.gradient, bounds.gradient, where)
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
        return Finding(
            claim, "fail", note=f"changing a document moves nothing at all, {setting.name}"
        )
    return judge(claim, leak, 0.0, f"its own move by up to {moved:.2g}, {setting.name}")


def _first_row_logits(model: Transformer, batch: Batch) -> Tensor:
    """(1, T, V): all logits of all rows would be too many for a large vocabulary."""
    return model(batch.tokens[:1], None, batch.segments[:1]).float()


def fused_equals_plain(subject: Subject, tell: Tell) -> Iterator[Finding]:
    """Promise 3: the loss that training uses is the one that `sft_loss` defines."""
    documents = subject.trained[:4]
    for setting in subject.settings:
        model = subject.model.to(setting.device)
        found = compare(
            model,
            partial(_fused_half, model, documents, setting),
            partial(_plain_half, model, documents, setting),
        )
        bounds = BOUNDS[setting.precision]
        yield judge("fused loss equals sft_loss: value", found.loss, bounds.loss, setting.name)
        yield judge(
            "fused loss equals sft_loss: gradient", found.gradient, bounds.gradient, setting.name
        )
        yield _nothing_trained(model, subject.batch().to(setting.device), setting)


def _fused_half(model: Transformer, documents: Sequence[Document], setting: Setting) -> float:
    loss = 0.0
    for document in documents:
        tokens, targets, weight = alone(document, setting.device)
        with autocast(setting.device, setting.dtype):
            found = model(tokens, targets=targets, weight=weight).loss / weight.sum()
        found.backward()
        loss += float(found.detach())
    return loss


def _plain_half(model: Transformer, documents: Sequence[Document], setting: Setting) -> float:
    loss = 0.0
    for document in documents:
        ids = torch.from_numpy(document.ids).to(setting.device)[None]
        mask = torch.from_numpy(document.loss_mask).to(setting.device)[None]
        with autocast(setting.device, setting.dtype):
            logits = model(ids)
        found = sft_loss(logits, ids, mask)
        found.backward()
        loss += float(found.detach())
    return loss


def _nothing_trained(model: Transformer, batch: Batch, setting: Setting) -> Finding:
    """Promise 7: no NaN, and a gradient of 0 for every parameter."""
    claim = "where nothing is trained, loss and gradient are 0"
    model.zero_grad(set_to_none=True)
    untrained = replace(batch, weight=torch.zeros_like(batch.weight))
    with autocast(setting.device, setting.dtype):
        loss = packed.token_loss(model, untrained).loss
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    size = abs(float(loss.detach())) + float(gradient_norm(list(model.parameters())))
    model.zero_grad(set_to_none=True)
    if without:
        return Finding(claim, "fail", note=f"no gradient reaches {without[0]}, {setting.name}")
    return judge(claim, size, 0.0, setting.name)


def micro_batches_agree(subject: Subject, tell: Tell) -> Iterator[Finding]:
    """Promise 1: the real optimizer loop, in micro-batches, against the documents alone."""
    setting = subject.settings[0]
    model, total = subject.model.to(setting.device), subject.batch().total
    bounds = BOUNDS[setting.precision]
    for micro in (1, 2, 4):
        tell(f"micro-batches of {micro}")
        found = compare(
            model,
            partial(_step_half, subject, micro, setting),
            partial(_alone_half, model, subject.trained, total, setting),
        )
        where = f"{len(subject.rows)} rows, micro-batches of {micro}, {setting.name}"
        yield judge("a step's loss does not depend on the layout", found.loss, bounds.loss, where)
        yield judge(
            "a step's gradient does not depend on the layout",
            found.gradient,
            bounds.gradient,
            where,
        )


def _step_half(subject: Subject, micro: int, setting: Setting) -> float:
    """Forward and backward pass of a step as `whet sft` takes it."""
    store = PackedStore(subject.packed_file())
    settings = sft.Config(
        model=str(subject.scratch),
        data=store.path,
        out=subject.scratch,
        batch_size=len(subject.rows),
        micro_batch_size=micro,
    )
    ranks = Ranks(device=setting.device)
    inputs = (subject.model, None, store, None)
    stage: Stage = packed.packed_stage(settings, ranks, *inputs, lineage={}, header=[])
    stop = Stop(grace_s=0.0)
    micros = to_device(stage.batches(0), ranks.device)
    result = forward_backward(stage, 0, micros, settings, ranks, stop, setting.dtype)
    return float(result.sums[0])
