"""The masked loss of supervised fine-tuning: its definition, and the fast way to the same number.

`sft_loss` is the definition: readable, from full logits. Training goes through
`linear_cross_entropy`, which makes logits only where something is trained, a chunk at a time, and
forms the gradient while it has them. The tests hold the two equal in value and gradient.

Shape letters: B batch, T tokens, D width, V vocabulary, M trained tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sft_loss(logits: Tensor, tokens: Tensor, loss_mask: Tensor) -> Tensor:
    """The loss of supervised fine-tuning, a float32 scalar.

        sum of loss_mask[t + 1] * -ln p(tokens[t + 1] | tokens[..t])  /  sum of loss_mask[t + 1]

    logits (B, T, V), tokens (B, T), loss_mask (B, T): 1 or any other weight >= 0 for a token that
    is trained, 0 for one that is only read. The first token of a row is never a target. Where
    nothing is trained the loss is 0, with a gradient of 0, and not NaN.
    """
    weight = loss_mask[:, 1:].to(torch.float32)
    nll = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().long(), reduction="none"
    )
    # Not `weight * nll`: at an untrained position an infinite nll would give NaN.
    nll = nll.view_as(weight).masked_fill(weight == 0, 0.0)
    total = weight.sum()
    return (weight * nll).sum() / torch.where(total == 0, 1.0, total)


CHUNK_BYTES = 2**26
"""Size of a chunk's float32 logits: large enough for efficient matrix products, small beside the
weights. Measured in docs/performance.md."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(scale * (hidden @ weight.T + bias)) without ever holding all logits.

    hidden (M, D), weight (V, D), targets (M,) int64, token_weight (M,), bias (V,). With `softcap`
    the logits z become cap * tanh(z / cap). `chunk` is the number of tokens whose logits exist at a
    time.

    Returns the sum of token_weight * nll (float32, with gradients to hidden, weight and bias) and
    nll (M,) float32, detached. Under autocast the products are done in its type; sums, softmax and
    the accumulated gradient of `weight` stay float32. M may be 0: the sum is 0 with a gradient of
    0.
    """
    if chunk is None:
        chunk = max(64, CHUNK_BYTES // (4 * weight.shape[0]))
    loss, nll = _LinearCrossEntropy.apply(
        hidden, weight, bias, targets, token_weight, softcap, logit_scale, chunk
    )
    return loss, nll


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients of the summed loss in the forward pass; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weight: Tensor,
        softcap: float | None,
        logit_scale: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        )
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(dtype)
        token_weight = token_weight.float()
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)

        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                x = hidden[part].to(dtype)
                logits = (x @ matrix.t()).float()
                if bias is not None:
                    logits += bias.float()
                nll[part], gradient = _softmax_gradient(
                    logits, targets[part], token_weight[part], softcap, logit_scale
                )
                if grad_bias is not None:
                    grad_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ matrix
                if grad_weight is not None:
                    grad_weight += gradient.t() @ x
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        loss = (nll.masked_fill(token_weight == 0, 0.0) * token_weight).sum()
        return loss, nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (
            g if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors
        )
        weight = weight if weight is None else weight.to(ctx.weight_dtype)
        return hidden, weight, bias, None, None, None, None, None


def _softmax_gradient(
    logits: Tensor, targets: Tensor, token_weight: Tensor, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """nll (m,) and the gradient of sum(token_weight * nll) in the raw `logits` (m, V), in place."""
    if logit_scale != 1.0:
        logits *= logit_scale
    slope = None
    if softcap is not None:
        logits = torch.tanh(logits / softcap)
        slope = 1 - logits * logits
        logits *= softcap
    normaliser = logits.logsumexp(-1)
    rows = torch.arange(len(targets), device=logits.device)
    nll = normaliser - logits[rows, targets]
    gradient = logits.sub_(normaliser[:, None]).exp_()
    gradient[rows, targets] -= 1.0
    gradient *= (token_weight * logit_scale)[:, None]
    if slope is not None:
        gradient *= slope
    return nll, gradient
