"""The masked loss of supervised fine-tuning: its definition, and the fast way to the same number.

`sft_loss` is the definition: readable, from full logits. SFT trains through `linear_cross_entropy`,
which makes logits only where something is trained, a chunk at a time, and forms the gradient while
it has them. The stages after SFT train through `linear_nll`: -ln p of each token, with a gradient,
for losses that are any other function of them. The tests hold all three equal in value and
gradient.

Shape letters: B batch, T tokens, D width, V vocabulary, M trained tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED_LOGITS = 2**20
"""Logits that are softmaxed at a time on a CPU: 4 MB of float32 stay in its cache."""


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


class TokenLoss(NamedTuple):
    """What a model gives for targets; each (B, T) float32 is 0 where the weight is 0."""

    loss: Tensor
    """Sum of weight x nll, a float32 scalar with a gradient."""
    nll: Tensor
    """-ln p(target) (B, T), detached unless `per_token`."""
    watched: Tensor | None = None
    """p(`watch`) (B, T)."""


def token_loss(
    hidden: Tensor,
    head: "Head",
    targets: Tensor,
    weight: Tensor,
    where: Tensor,
    *,
    per_token: bool,
    watch: int | None,
) -> TokenLoss:
    """The loss of targets (B, T) with a weight (B, T) != 0, which stand at `where` (S,) of (B * T).

    hidden (S', D): the first S rows are theirs, any others are there for the sake of the size.
    `per_token` and `watch` as in `Transformer.forward`.
    """
    wanted, factor = (_gathered(x, where, len(hidden)) for x in (targets, weight))
    if watch is not None:
        nll, watched = linear_probability(hidden, head, wanted, watch)
        each = spread(nll, where, weight)
        return TokenLoss((weight * each).sum(), each, spread(watched, where, weight))
    if per_token:
        each = spread(linear_nll(hidden, head, wanted), where, weight)
        return TokenLoss((weight * each).sum(), each)
    loss, nll = linear_cross_entropy(hidden, head, wanted, factor)
    return TokenLoss(loss, spread(nll, where, weight))


def _gathered(x: Tensor, where: Tensor, size: int) -> Tensor:
    """x (B, T) -> (size,): what stands at `where` (S,), then zeros."""
    return F.pad(x.flatten()[where], (0, size - len(where)))


def spread(values: Tensor, where: Tensor, like: Tensor) -> Tensor:
    """The first S of `values` -> a tensor of the shape of `like` (B, T), float32, with them at
    `where` (S,) of its B * T places and 0 elsewhere."""
    places = (where // like.shape[1], where % like.shape[1])  # a view would make FSDP2 warn
    return torch.zeros_like(like, dtype=torch.float32).index_put(
        places, values[: len(where)].float()
    )


def linear_cross_entropy(
    hidden: Tensor,
    head: "Head",
    targets: Tensor,
    token_weight: Tensor,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the softmax of `head`'s logits without ever holding all of them.

    hidden (M, D), targets (M,) int64, token_weight (M,). `chunk` is the number of tokens whose
    logits exist at a time.

    Returns the sum of token_weight * nll (float32, with gradients to hidden, matrix and bias) and
    nll (M,) float32, detached, 0 where token_weight is 0. Under autocast the products are done in
    its type; softmax, sums and the accumulated gradient of the matrix stay float32. M may be 0: the
    sum is 0 with a gradient of 0. The graph gives its gradient once (no `retain_graph`).
    """
    chunk = chunk or chunk_tokens(len(head.matrix), hidden.device, product_type(hidden))
    if not torch.is_grad_enabled():
        # To a Function a parameter needs its gradient even where none will be asked for; forming it
        # would make evaluation three times as slow.
        hidden, head = hidden.detach(), head.detached()
    loss, nll = _LinearCrossEntropy.apply(
        hidden, head.matrix, head.bias, targets, token_weight, *head.options, chunk
    )
    return loss, nll


def linear_nll(
    hidden: Tensor, head: "Head", targets: Tensor, *, chunk: int | None = None
) -> Tensor:
    """-ln p(target) of each token (M,), float32, with gradients to hidden, matrix and bias.

    Arguments as in `linear_cross_entropy`. Any function of the result may be differentiated. The
    backward pass makes the logits a second time, a chunk at a time: four products with the head
    instead of three, and still never all logits. A frozen head (a matrix without a gradient)
    saves one of them.
    """
    chunk = chunk or chunk_tokens(len(head.matrix), hidden.device, product_type(hidden))
    nll: Tensor = _LinearNll.apply(hidden, head.matrix, head.bias, targets, *head.options, chunk)
    return nll


@torch.no_grad()
def linear_probability(
    hidden: Tensor, head: "Head", targets: Tensor, watch: int, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """-ln p(target) and p(`watch`), a token id, of each token: (M,) float32 each, no gradients.

    Arguments as in `linear_cross_entropy`. Both come from one product with the head.
    """
    dtype = product_type(hidden)
    chunk = chunk or chunk_tokens(len(head.matrix), hidden.device, dtype)
    nll, watched = hidden.new_empty(2, len(hidden), dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, _, products in head.to(dtype).products(hidden, chunk):
            for rows, logits in head.few(products, part.start):
                log_p = torch.log_softmax(head.curved(logits), -1)
                nll[rows] = -log_p.gather(-1, targets[rows, None])[:, 0]
                watched[rows] = log_p[:, watch].exp()
    return nll, watched


def product_type(x: Tensor) -> torch.dtype:
    """The type in which a linear layer would multiply `x` here: autocast's, or its own."""
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def compiles_each_shape(weight: Tensor) -> bool:
    """Whether a product with `weight` is compiled, and kept, for each shape: bf16 on a CPU, where
    oneDNN multiplies. There sizes are to be few: see `attention.repeated_size`."""
    return weight.device.type == "cpu" and product_type(weight) == torch.bfloat16


def chunk_tokens(vocab_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many tokens' logits exist at a time: up to 64 MiB of them in `dtype`, the type of
    products, on a CPU; on a GPU, which softmaxes all of them at once, 256 MiB in float32.

    A multiple of 128, at least 128: fewer or odd numbers make the matrix products slow, more bring
    nothing (docs/performance.md).
    """
    size, each = (2**28, 4) if device.type == "cuda" else (2**26, dtype.itemsize)
    return max(1, size // (each * vocab_size) // 128) * 128


def head_bytes(vocab_size: int, trained: int, device: torch.device, halves: bool) -> int:
    """What `linear_cross_entropy` holds over `trained` tokens besides its results: the logits of a
    chunk, with `halves` in bf16. A GPU softmaxes all of them at once, in float32."""
    dtype = torch.bfloat16 if halves else torch.float32
    tokens = min(trained, chunk_tokens(vocab_size, device, dtype))
    at_once = tokens * vocab_size if device.type == "cuda" else max(vocab_size, CACHED_LOGITS)
    return tokens * vocab_size * dtype.itemsize + 4 * at_once * halves


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
        scale: float,
        tied: list[Tensor] | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = product_type(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(weight.to(dtype), bias, softcap, scale)
            token_weight = token_weight.float()
            nll = hidden.new_empty(len(hidden), dtype=torch.float32)
            gradients = _Gradients.of(ctx.needs_input_grad, hidden, weight, bias)
            for part, x, found, slope in head.passes(hidden, targets, chunk):
                nll[part] = found
                gradients.add(part, x, slope, token_weight[part], head)
        ctx.gradients, ctx.weight_dtype, ctx.tied = gradients, weight.dtype, tied
        nll.masked_fill_(token_weight == 0, 0.0)
        ctx.mark_non_differentiable(nll)
        return (nll * token_weight).sum(), nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy gives its gradient once: make the loss again")
        # In place, and so once: a second matrix of the head's size is what a step would peak with.
        gradients, ctx.gradients = ctx.gradients, None
        hidden, weight, bias = (
            g if g is None else g.mul_(grad_loss.to(g.dtype))
            for g in (gradients.hidden, gradients.weight, gradients.bias)
        )
        weight = _left(weight, ctx.weight_dtype, ctx.tied)
        return hidden, weight, bias, None, None, None, None, None, None


class _LinearNll(torch.autograd.Function):
    """Keeps the inputs alone; the backward makes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
        tied: list[Tensor] | None,
        chunk: int,
    ) -> Tensor:
        ctx.dtype, ctx.options, ctx.chunk = product_type(hidden), (softcap, scale), chunk
        ctx.tied = tied
        ctx.save_for_backward(hidden, weight, bias, targets)
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(weight.to(ctx.dtype), bias, *ctx.options)
            nll = hidden.new_empty(len(hidden), dtype=torch.float32)
            for part, _, found, _ in head.passes(hidden, targets, chunk):
                nll[part] = found
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(weight.to(ctx.dtype), bias, *ctx.options)
            gradients = _Gradients.of(ctx.needs_input_grad, hidden, weight, bias)
            for part, x, _, slope in head.passes(hidden, targets, ctx.chunk):
                gradients.add(part, x, slope, grad_nll[part].float(), head)
        found = _left(gradients.weight, weight.dtype, ctx.tied)
        return gradients.hidden, found, gradients.bias, None, None, None, None, None


def _left(gradient: Tensor | None, dtype: torch.dtype, tied: list[Tensor] | None) -> Tensor | None:
    """The gradient of the head's matrix in `dtype`; None where it is left in `tied` instead."""
    gradient = None if gradient is None else gradient.to(dtype)
    if gradient is None or tied is None:
        return gradient
    tied.append(gradient)
    return None


@dataclass(frozen=True)
class Head:
    """How hidden states (M, D) become logits (M, V): z = scale x (hidden @ matrix.T + bias), and
    with a `softcap` c these become c tanh(z / c)."""

    matrix: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    tied: list[Tensor] | None = None
    """Where the backward pass leaves the matrix's gradient; None: it returns it."""

    @property
    def options(self) -> tuple[float | None, float, list[Tensor] | None]:
        """All but the matrix and the bias."""
        return self.softcap, self.scale, self.tied

    def at(self, temperature: float) -> "Head":
        """The head whose logits are divided by `temperature`."""
        cap = None if self.softcap is None else self.softcap / temperature
        return replace(self, softcap=cap, scale=self.scale / temperature)

    def to(self, dtype: torch.dtype) -> "Head":
        """Its matrix in `dtype`, the type of products."""
        return replace(self, matrix=self.matrix.to(dtype))

    def detached(self) -> "Head":
        """The same without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, matrix=self.matrix.detach(), bias=bias)

    def curved(self, z: Tensor) -> Tensor:
        """Scale and softcap of products that have their bias."""
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def products(self, hidden: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each chunk of m tokens: where it lies, its hidden states (m, D) and their products
        with the matrix (m, V), both in the matrix's type."""
        # One buffer for all chunks: fresh pages cost the CPU more than the softmax.
        size = min(chunk, len(hidden))
        buffer = hidden.new_empty(size, len(self.matrix), dtype=self.matrix.dtype)
        for start in range(0, len(hidden), chunk):
            x = hidden[start : start + chunk].to(self.matrix.dtype)
            part = slice(start, start + len(x))
            yield part, x, torch.mm(x, self.matrix.t(), out=buffer[: len(x)])

    def few(self, products: Tensor, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of `products` (m, V) at a time, as many as a CPU's cache holds: where they lie,
        counted from `start`, and their logits in float32, before scale and softcap.

        The logits lie in the place of the products where these are float32.
        """
        on_cpu = products.device.type == "cpu"
        count = max(1, CACHED_LOGITS // products.shape[1]) if on_cpu else len(products)
        for first in range(0, len(products), count):
            logits = products[first : first + count].float()
            if self.bias is not None:
                logits += self.bias
            yield slice(start + first, start + first + len(logits)), logits

    def passes(
        self, hidden: Tensor, targets: Tensor, chunk: int
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """For each chunk: where it lies, its hidden states, nll (m,), and d nll / d logits up to
        `scale` (m, V) in the type of products, in the place of these."""
        for part, x, products in self.products(hidden, chunk):
            nll = hidden.new_empty(len(x), dtype=torch.float32)
            for rows, logits in self.few(products):
                wanted = targets[part][rows]
                nll[rows], slope = _softmax_minus_target(logits, wanted, self.softcap, self.scale)
                if slope.data_ptr() != products[rows].data_ptr():
                    products[rows] = slope
            yield part, x, nll, products


@dataclass
class _Gradients:
    """The gradients of a sum of f x nll, each None where nobody asks for it.

    With p the softmax and y the one-hot target, the gradient in the logits is f x logit_scale x
    (p - y). The factor, one number per token, is applied to the small matrices beside (p - y) and
    not to the (m, V) one.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(
        cls, needed: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> "_Gradients":
        """All of them 0; `needed` says which of hidden, weight and bias want one."""
        return cls(
            torch.empty_like(hidden) if needed[0] else None,  # each row is written once
            torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None,
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None,
        )

    def add(self, part: slice, x: Tensor, slope: Tensor, factor: Tensor, head: Head) -> None:
        """Add a chunk of m tokens: x (m, D), slope (m, V) of `passes`, factor (m,)."""
        dtype, factor = head.matrix.dtype, (factor * head.scale)[:, None]
        if self.hidden is not None:
            self.hidden[part] = (slope @ head.matrix) * factor
        if self.weight is not None:
            _add_product(self.weight, slope.t(), (x * factor).to(dtype))
        if self.bias is not None:
            self.bias += (slope.t() @ factor.to(dtype))[:, 0]


def _softmax_minus_target(
    logits: Tensor, targets: Tensor, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """nll (m,), and d nll / d logits up to `logit_scale`, written over `logits` (m, V) float32."""
    if logit_scale != 1.0:
        logits *= logit_scale
    curve = None
    if softcap is not None:
        logits = torch.tanh(logits / softcap)
        curve = 1 - logits * logits
        logits *= softcap
    target = targets[:, None]
    top, wanted = logits.amax(-1), logits.gather(-1, target)[:, 0]
    p = torch.softmax(logits, -1, out=logits)
    # ln(sum(exp(z))) = max(z) - ln(max(p)): the largest p never underflows, the target's may.
    nll = top - p.amax(-1).log() - wanted
    p.scatter_add_(-1, target, p.new_full(target.shape, -1.0))
    return nll, p if curve is None else p.mul_(curve)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place where the types agree, else 2^22 numbers at a time."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    rows = max(1, 2**22 // total.shape[1])
    for start in range(0, len(total), rows):
        total[start : start + rows] += a[start : start + rows] @ b
