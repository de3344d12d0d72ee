"""The decoder-only Transformer, for every family that `ModelConfig` describes.

Inside, tokens are packed: `x` is (M, D), the M tokens that are computed at all, document after
document. What is not needed (padding; in training the tokens after a document's last trained one)
is left out by the plan of `attention.py`, which also knows where documents begin and end.

`forward` is the only way in, for training, evaluation and generation: wrappers such as DDP and
FSDP2 hang their work on it.

Shape letters: B batch, T tokens, D width, N heads, K key/value heads, H head size, V vocabulary,
M packed tokens.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.model.attention import AttentionPlan, CachedPlan, KVCache, plan_documents, share_prefixes
from whet.model.config import ModelConfig
from whet.model.loss import Head, TokenLoss, compiles_each_shape, product_type, spread, token_loss
from whet.model.recompute import Recompute, run_layer
from whet.model.rope import cos_sin, rotate

if TYPE_CHECKING:
    from whet.data.batches import Batch

Rotary = tuple[Tensor, Tensor] | None
Plan = AttentionPlan | CachedPlan

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def run_batch(model: nn.Module, batch: "Batch", **asked: Any) -> Any:
    """`Transformer.forward` over the documents of a batch, with its targets, weights and plan;
    `asked` are further arguments, or others in the place of these.

    Positions are the plan's: with given ones, common beginnings could not be computed once.
    """
    fields = {"targets": batch.targets, "weight": batch.weight, "plan": batch.plan}
    return model(batch.tokens, None, batch.segments, **{**fields, **asked})


class RMSNorm(nn.Module):
    """Divides by the root mean square and multiplies by (offset + weight); computed in float32
    (arXiv:1910.07467).

    Under autocast it gives the type of the products that follow: each of them would otherwise keep
    a converted copy of its own for the backward pass.
    """

    def __init__(self, width: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., D) -> the same shape, in the dtype of products."""
        weight = self.weight.float() + self.offset if self.offset else self.weight.float()
        y = F.rms_norm(x.float(), weight.shape, weight, self.eps)
        return y.to(product_type(x))


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm of `config` over `width` numbers."""
    if config.norm == "layer":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, config.norm_eps, config.norm_offset)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
        self.q = nn.Linear(config.width, heads, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, kv_heads, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, kv_heads, bias=config.qkv_bias)
        self.o = nn.Linear(heads, config.width, bias=config.out_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            over_all = config.qk_norm == "full"
            self.q_norm = make_norm(config, heads if over_all else config.head_size)
            self.k_norm = make_norm(config, kv_heads if over_all else config.head_size)
        self.head_size = config.head_size
        self.layer = layer
        self.scale = config.scale
        self.window = config.window(layer)
        self.softcap = config.attention_softcap

    def forward(self, x: Tensor, rotary: Rotary, plan: Plan, keep: Tensor | None) -> Tensor:
        """`x` (M, D) -> (M, D), or only the rows `keep` of it."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(len(x), -1, self.head_size) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = self._attend(q, k, v, plan).flatten(1)
        return self.o(y if keep is None else y[keep])

    @torch.compiler.disable  # compiled, it would be recompiled for each batch's plan
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        return plan.attend(
            q, k, v, layer=self.layer, scale=self.scale, window=self.window, softcap=self.softcap
        )


class MLP(nn.Module):
    """The feed-forward part, gated (arXiv:2002.05202) or not."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.gated_mlp:
            self.gate = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)
        self.gated = config.gated_mlp
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """`x` (M, D) -> (M, D)."""
        if self.gated:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        if config.pre_norm:
            self.attn_norm = make_norm(config, config.width)
            self.mlp_norm = make_norm(config, config.width)
        if config.post_norm:
            self.attn_post_norm = make_norm(config, config.width)
            self.mlp_post_norm = make_norm(config, config.width)
        self.pre_norm, self.post_norm = config.pre_norm, config.post_norm
        self.residual_scale = config.residual_scale

    def forward(self, x: Tensor, rotary: Rotary, plan: Plan, keep: Tensor | None = None) -> Tensor:
        """`x` (M, D) -> (M, D), or with `keep` only those rows; they see the others as ever."""
        y = self.attn(self.attn_norm(x) if self.pre_norm else x, rotary, plan, keep)
        y = self.attn_post_norm(y) if self.post_norm else y
        x = (x if keep is None else x[keep]) + self._scaled(y)
        y = self.mlp(self.mlp_norm(x) if self.pre_norm else x)
        y = self.mlp_post_norm(y) if self.post_norm else y
        return x + self._scaled(y)

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.residual_scale == 1.0 else y * self.residual_scale


class Transformer(nn.Module):
    """Embedding, layers, norm and head. Parameter names are Whet's own; see `families.py`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        if config.learned_positions:
            self.positions = nn.Embedding(config.max_positions, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config, config.width)
        if config.score:
            self.score = nn.Linear(config.width, 1, bias=False)
        elif not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=config.head_bias)
        self.recompute: Recompute = "none"

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        weight: Tensor | None = None,
        per_token: bool = False,
        temperature: float = 1.0,
        watch: int | None = None,
        cache: KVCache | None = None,
        logits_at: Tensor | None = None,
        plan: AttentionPlan | None = None,
    ) -> Tensor | TokenLoss:
        """Logits, or with `targets` the loss, or of a model with a score its numbers.

        tokens (B, T). `segments` (B, T): 0 is padding, each run of another number one document;
        None is one document a row. `positions` (B, T): None counts from 0 in each document.

        Without `targets`: logits (B, T, V), zero at padding; or (B, J, V) at the places `logits_at`
        (B, J) of each row. With `cache` the tokens follow what the cache holds, and `positions`
        tells where (see `KVCache`).

        With `targets` and `weight` (B, T): TokenLoss, made without the logits of untrained
        positions. Where nothing is trained, the loss is 0 with a gradient (of 0) to all parameters.
        With `per_token` its nll has a gradient, too, so that a loss may be any function of it. The
        distribution is softmax(logits / `temperature`): the one from which a policy has sampled.

        With `watch`, the id of a token, its probability at the same places is given, too; then
        nothing has a gradient.

        A model with a `score` (reward model, critic) gives with `weight` its number at each token
        that has one, (B, T) float32, and 0 elsewhere; it has no logits.

        `plan` is what `plan_documents` gives for these segments and weights. Passing one that was
        made on the CPU saves the GPU a synchronisation.
        """
        if cache is not None:
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            x = self._layers(tokens.flatten(), CachedPlan(cache, positions))
            return self._logits(x.view(*tokens.shape, -1), logits_at)
        if plan is None:
            plan = plan_documents(tokens.shape, tokens.device, segments, weight)
        if positions is not None:
            plan = plan.at(positions)
        filled = compiles_each_shape(next(self.parameters()))
        if targets is None and not self.config.score:
            plan = plan.filled() if filled else plan
            x = plan.unpack(self._layers(plan.pack(tokens), plan), tokens.shape)
            return self._logits(x, logits_at)
        assert weight is not None, "targets and scores need weights"
        if tokens.device.type == "cpu" and positions is None and self.prefixes_are_equal:
            plan = share_prefixes(plan, plan.pack(tokens))
        plan = plan.filled() if filled else plan
        keep = plan.trained if plan.kept is None else plan.kept
        head = None if self.config.score else self._head_in_training().at(temperature)
        x = self._layers(plan.pack(tokens), plan, keep, head)
        if head is None:
            with torch.autocast(x.device.type, enabled=False):  # one row: in float32 at no cost
                scores = F.linear(x.float(), self.score.weight.float())[:, 0]
                return spread(scores, plan.trained_index, weight)
        assert targets is not None
        return token_loss(
            x,
            head,
            targets,
            weight,
            plan.trained_index,
            per_token=per_token,
            watch=watch,
        )

    def _layers(
        self, tokens: Tensor, plan: Plan, keep: Tensor | None = None, head: Head | None = None
    ) -> Tensor:
        """tokens (M,) -> normed hidden states (M, D), in the last layer only of the rows `keep`."""
        if head is None or head.tied is None:
            x = self.embed(tokens)
        else:
            x = _TiedLookup.apply(head.matrix, tokens, head.tied)
        if self.config.embed_scale != 1.0:
            x = x * self.config.embed_scale
        if self.config.learned_positions:
            x = x + self.positions(plan.positions)
        rotary = {
            rope: cos_sin(rope, plan.positions, plan.lengths, plan.reach)
            for rope in set(self.config.ropes)
            if rope is not None
        }
        for i, layer in enumerate(self.layers):
            rope = self.config.rope(i)
            last = i == len(self.layers) - 1
            run = layer if self.recompute == "none" else partial(run_layer, layer, self.recompute)
            x = run(x, None if rope is None else rotary[rope], plan, keep if last else None)
        return self.norm(x)

    def _logits(self, x: Tensor, logits_at: Tensor | None) -> Tensor:
        """x (B, T, D) -> logits (B, T, V), or (B, J, V) at `logits_at` (B, J)."""
        if logits_at is not None:
            x = x.gather(1, logits_at[:, :, None].expand(-1, -1, x.shape[-1]))
        head = self.output_head
        return head.curved(F.linear(x, head.matrix, head.bias))

    @property
    def prefixes_are_equal(self) -> bool:
        """Whether equal beginnings of documents have equal hidden states, whatever follows."""
        ropes = [rope for rope in self.config.ropes if rope is not None]
        return all(rope.kind not in ("dynamic", "longrope") for rope in ropes)

    @property
    def output_head(self) -> Head:
        """How hidden states become logits: the head's own matrix (V, D), or the embedding's."""
        scale, cap = self.config.logit_scale, self.config.logit_softcap
        if self.config.tied:
            return Head(self.embed.weight, None, cap, scale)
        return Head(self.head.weight, self.head.bias, cap, scale)

    def _head_in_training(self) -> Head:
        """The head, with the lookup's gradient in its own where both are one trained matrix."""
        one = self.config.tied and isinstance(self.embed, nn.Embedding)
        shared = one and self.embed.weight.requires_grad and torch.is_grad_enabled()
        return replace(self.output_head, tied=[] if shared else None)


class _TiedLookup(torch.autograd.Function):
    """Rows of an embedding that is the head, too. Its backward runs after the head's, and adds to
    that gradient in place: a second matrix of its size is what a step would peak with."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, tokens: Tensor, tied: list[Tensor]) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.tied = len(matrix), tied
        return F.embedding(tokens, matrix)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        if not ctx.tied:  # nothing was asked of the head
            dense = torch.ops.aten.embedding_dense_backward
            return dense(gradient, tokens, ctx.rows, -1, False), None, None
        total = ctx.tied.pop()
        gradient = gradient.to(total.dtype)
        # Each adds in the same order each time on its device; there the other one's threads race.
        if total.device.type == "cpu":
            return total.index_add_(0, tokens, gradient), None, None
        return total.index_put_((tokens,), gradient, accumulate=True), None, None


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Initial values, the one table of them.

    ======================================  ==========================================
    embedding, positions, q k v, gate up     normal, std = config.init_std
    o and down (write to the residual)       normal, std = init_std / sqrt(2 n_layers)
    untied head                              normal, std = init_std
    biases, score                            0
    norms                                    the identity
    ======================================  ==========================================

    The residual stream is a sum of 2 n_layers parts, hence the root (GPT-2, section 2.3).
    The same seed gives the same weights on any device.
    """
    std = model.config.init_std
    residual_std = std / math.sqrt(2 * model.config.n_layers)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        *_, module, kind = name.split(".")
        if "norm" in module:
            offset = model.config.norm_offset if model.config.norm == "rms" else 0.0
            parameter.fill_(0.0 if kind == "bias" else 1.0 - offset)
        elif kind == "bias" or module == "score":
            parameter.zero_()
        else:
            values = torch.empty(parameter.shape, dtype=torch.float32)
            values.normal_(
                0.0, residual_std if module in ("o", "down") else std, generator=generator
            )
            parameter.copy_(values)
