"""Attention within documents, and over a cache.

A plan is made once per batch and shared by all layers. It says which tokens are computed at all and
what each of them sees. Both kinds of plan have the same two faces:

    positions (M,)                     of each computed token within its document
    reach                              a number above every position, known without asking a GPU
    attend(q, k, v, layer=..., ...)    (M, N, H), (M, K, H), (M, K, H) -> (M, N, H)

`AttentionPlan` is for packed rows: documents lie one after the other, and a token sees itself and
what stands before it in its own document. `CachedPlan` is for generation, see `KVCache`.

Shape letters: B batch, T tokens, N heads, K key/value heads, H head size, M packed tokens, S slots.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from whet.model import kernels
from whet.model.config import ModelConfig

if TYPE_CHECKING:
    from whet.data.batches import Batch


class KVCache(Protocol):
    """What the decoder asks of a cache; `whet/generate/cache.py` has the real one.

    Slot p of row b holds the key and value of the token at position p of sequence b, so that
    sequences of different lengths need no padding on the left and no mask is stored: a token at
    position p sees the slots j <= p (and, with a sliding window w, j > p - w).

    Prompts of different lengths are padded on the RIGHT, positions 0..T-1 for every row. What the
    padding writes lies beyond its row's length, and is overwritten by the token that comes to stand
    there before any token can see it. Then each step passes positions = each row's length, (B, 1),
    and adds one to it. Rows that have stopped may go on at a fixed position.
    """

    slots: int
    """Of a row; every position is below it."""

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k`, `v` (B, T, K, H) in slots `positions` (B, T) of `layer`.

        Returns keys and values (B, S, K, H) of slots 0..S-1; S must exceed every position so far.
        """
        ...


@dataclass
class AttentionPlan:
    """Documents of a batch of packed rows, laid end to end in M tokens."""

    index: Tensor | None
    """(M,) where each computed token stands in the flattened (B * T); None if all are, in order."""
    positions: Tensor
    """(M,) position within the document."""
    lengths: Tensor
    """(M,) length of the document, with the tokens that are not computed."""
    sizes: list[int]
    """How many of the M tokens each document has, in order; with `after` each block of tokens."""
    ends: Tensor
    """(documents + 1,) int32: 0, then where each document ends among the M tokens."""
    longest: int
    reach: int
    trained: Tensor | None
    """(S,) which of the M tokens have a target that counts; None if nothing is known of targets."""
    after: list[int | None] | None = None
    """For each block the one whose tokens, after those of the block before that one, come before
    its own, see `share_prefixes`; None: none."""
    filling: int = 0
    """How many of the M tokens, the last ones, are there for the sake of M alone."""
    kept: Tensor | None = None
    """(S',) what the last layer computes, if that is more than `trained`, which it begins with."""
    flex_masks: dict[int | None, Any] = field(default_factory=dict)

    @property
    def trained_index(self) -> Tensor:
        """(S,) where the trained tokens stand in the flattened (B * T)."""
        assert self.trained is not None, "the plan was made without weights"
        return self.trained if self.index is None else self.index[self.trained]

    def pack(self, x: Tensor) -> Tensor:
        """(B, T) -> (M,): the tokens that are computed."""
        return x.flatten() if self.index is None else x.flatten()[self.index]

    def unpack(self, x: Tensor, shape: torch.Size) -> Tensor:
        """(M, D) -> (B, T, D), zero where nothing is computed."""
        if self.index is not None:
            kept = len(x) - self.filling
            x = x.new_zeros(shape.numel(), x.shape[-1]).index_put((self.index[:kept],), x[:kept])
        return x.view(*shape, -1)

    def filled(self) -> "AttentionPlan":
        """The same plan with M and the number of trained tokens each a `repeated_size`: copies of
        the first token, on which nothing depends, are added as a document at the end."""
        count = len(self.positions)
        filling = repeated_size(count) - count
        kept = self.trained
        if kept is not None:
            kept = F.pad(kept, (0, repeated_size(len(kept)) - len(kept)))
        if not filling:
            return replace(self, kept=kept)
        index = torch.arange(count) if self.index is None else self.index
        first = torch.zeros(filling, dtype=torch.long, device=index.device)
        return replace(
            self,
            index=torch.cat((index, index[:1] + first)),
            positions=torch.cat((self.positions, first)),
            lengths=torch.cat((self.lengths, first + filling)),
            sizes=[*self.sizes, filling],
            ends=torch.cat((self.ends, self.ends[-1:] + filling)),
            longest=max(self.longest, filling),
            after=None if self.after is None else [*self.after, None],
            filling=filling,
            kept=kept,
        )

    def at(self, positions: Tensor) -> "AttentionPlan":
        """The same plan with the caller's `positions` (B, T)."""
        packed = self.pack(positions)
        return replace(self, positions=packed, reach=int(packed.max()) + 1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention within each document; returns (M, N, H)."""
        if q.device.type == "cpu" or q.dtype == torch.float32:
            return kernels.documents(
                q, k, v, self.sizes, self.after, scale=scale, window=window, softcap=softcap
            )
        if softcap is None and q.shape[-1] <= 256:
            return kernels.varlen(q, k, v, self.ends, self.longest, scale=scale, window=window)
        if window not in self.flex_masks:
            self.flex_masks[window] = kernels.flex_mask(self.ends, len(q), window)
        return kernels.flex(q, k, v, self.flex_masks[window], scale=scale, softcap=softcap)


def repeated_size(count: int) -> int:
    """`count` rounded up to one of few sizes: multiples of 64, from 2,048 on 16 for each doubling.

    oneDNN, which multiplies bf16 on a CPU, compiles and keeps a product for each shape that it
    meets. Where each batch has its own number of tokens, that takes time and memory without end.
    """
    step = max(64, (1 << count.bit_length()) >> 5)
    return -(-count // step) * step


SHARED = 32
"""Tokens from which on it pays to compute a common beginning once: many questions of pairs and
groups have no 64, and 16 find hardly more."""


def share_prefixes(plan: AttentionPlan, tokens: Tensor) -> AttentionPlan:
    """The same plan with what documents have in common at their beginnings computed once.

    `tokens` (M,) are the plan's, on the CPU. A system prompt in front of many documents is the
    same for all of them: same tokens, same positions, and nothing before it. So its hidden states
    are, too. The first document keeps it as a block of its own, and what follows in each of the
    documents becomes a block `after` it. What some of these have in common next, as the replies of
    a group or a pair have their prompt, becomes a block in the same way, to any depth.

    Only what lies before a document's first trained token is shared: the target there is each
    document's own. For training alone, as logits of the shared places exist once.
    """
    if plan.trained is None or plan.after is not None:
        return plan
    ids, trained = tokens.numpy(), plan.trained.numpy()
    starts = np.cumsum(plan.sizes) - plan.sizes
    firsts = np.append(trained, len(ids))[np.searchsorted(trained, starts)]
    # Of each document, from its start: the document that keeps a part of it, and its length.
    parts: list[list[tuple[int, int]]] = [[] for _ in plan.sizes]

    def share(documents: Iterable[int], begin: int) -> None:
        """Find what some of `documents` share after their first `begin` tokens, equal in all."""
        groups: dict[bytes, list[int]] = defaultdict(list)
        for i in documents:
            if firsts[i] - starts[i] - begin >= SHARED:
                groups[ids[starts[i] + begin :][:SHARED].tobytes()].append(i)
        for group in groups.values():
            if len(group) > 1:
                longest = min(firsts[i] - starts[i] for i in group)
                texts = np.stack([ids[starts[i] + begin : starts[i] + longest] for i in group])
                length = int((texts == texts[0]).all(axis=0).cumprod().sum())
                for i in group:
                    parts[i].append((group[0], length))
                share(group, begin + length)

    share(range(len(plan.sizes)), 0)
    if not any(parts):
        return plan
    sizes, after, kept = list[int](), list[int | None](), np.ones(len(ids), bool)
    block_of = dict[tuple[int, int], int]()
    for i, size in enumerate(plan.sizes):
        block, done = None, 0
        for owner, length in parts[i]:
            if owner == i:
                block_of[i, done] = len(sizes)
                sizes.append(length)
                after.append(block)
            else:
                kept[starts[i] + done : starts[i] + done + length] = False
            block = block_of[owner, done]
            done += length
        sizes.append(size - done)
        after.append(block)
    keep = torch.from_numpy(kept.nonzero()[0])
    place = torch.from_numpy(kept.cumsum() - 1)
    return replace(
        plan,
        index=keep if plan.index is None else plan.index[keep],
        positions=plan.positions[keep],
        lengths=plan.lengths[keep],
        sizes=sizes,
        ends=F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).to(torch.int32),
        longest=max(sizes),
        trained=place[plan.trained],
        after=after,
    )


@dataclass
class CachedPlan:
    """New tokens (B, T) of sequences whose earlier keys and values are in a cache."""

    cache: KVCache
    new_positions: Tensor
    """(B, T) position of each new token in its sequence, and so its slot."""
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    @property
    def reach(self) -> int:
        return self.cache.slots

    @property
    def positions(self) -> Tensor:
        """(M,) with M = B * T."""
        return self.new_positions.flatten()

    @property
    def lengths(self) -> Tensor:
        """(M,) length of each token's sequence so far."""
        longest = self.new_positions.amax(1, keepdim=True) + 1
        return longest.expand_as(self.new_positions).flatten()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Write `k`, `v` to the cache and attend over it; returns (M, N, H)."""
        shape = (*self.new_positions.shape, -1, q.shape[-1])
        dtype = v.dtype
        if q.device.type == "cpu":  # the cache then holds float32, too
            q, k, v = kernels.wide(q, k, v)
        keys, values = self.cache.write(layer, k.view(shape), v.view(shape), self.new_positions)
        mask = self._mask(keys.shape[1], window)
        y = kernels.sdpa(q.view(shape), keys, values, mask=mask, scale=scale, softcap=softcap)
        return y.flatten(0, 1).to(dtype)

    def _mask(self, slots: int, window: int | None) -> Tensor:
        """(B, 1, T, S), True where a token sees a slot. The same for all layers of a kind."""
        if (slots, window) not in self.masks:
            slot = torch.arange(slots, device=self.new_positions.device)
            position = self.new_positions[:, None, :, None]
            seen = slot <= position
            if window is not None:
                seen &= slot > position - window
            self.masks[slots, window] = seen
        return self.masks[slots, window]


def plan_documents(
    shape: tuple[int, int] | torch.Size,
    device: torch.device,
    segments: Tensor | None = None,
    weight: Tensor | None = None,
) -> AttentionPlan:
    """The plan of packed rows of `shape` (B, T).

    `segments` (B, T): 0 is padding, each run of another number a document; None is one document a
    row. `weight` (B, T): where it is given, tokens after a document's last weighted one are left
    out, as nothing that counts depends on them. At least one token is always kept, so that a batch
    in which nothing is trained still runs through every layer (and every collective of FSDP2).
    """
    rows, length = shape
    place = torch.arange(rows * length, device=device)
    if segments is None:
        segments = torch.ones(rows, length, dtype=torch.long, device=device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    document = begins.flatten().cumsum(0) - 1  # of each place; stretches of padding count, too
    start = begins.flatten().nonzero().flatten()
    full = torch.diff(start, append=start.new_tensor([rows * length]))
    used = full
    if weight is not None:
        after_trained = torch.where(weight.flatten() != 0, place + 1, 0)
        last = torch.zeros_like(start).scatter_reduce(0, document, after_trained, "amax")
        used = (last - start).clamp(min=0)
    used = used * (segments.flatten()[start] != 0)
    if not bool(used.any()):
        used[0] = 1
    index = (place - start[document] < used[document]).nonzero().flatten()
    document = document[index]
    sizes = used[used > 0]
    trained = None if weight is None else weight.flatten()[index].nonzero().flatten()
    longest = int(sizes.max())
    return AttentionPlan(
        index=None if len(index) == rows * length else index,
        positions=index - start[document],
        lengths=full[document],
        sizes=sizes.tolist(),
        ends=F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32),
        longest=longest,
        reach=longest,
        trained=trained,
    )


def planned(batch: "Batch") -> "Batch":
    """A batch on the CPU with the plan that the model would make of it: on a GPU, making it there
    would wait for the device."""
    plan = plan_documents(batch.tokens.shape, batch.tokens.device, batch.segments, batch.weight)
    return replace(batch, plan=plan)


def attention_flops(config: ModelConfig, sizes: Sequence[int], *, again: bool) -> float:
    """Floating-point operations of attention itself, forward and backward, over documents of
    `sizes` tokens, all layers; 2 for each multiply-add.

    Two products in the forward pass (scores, and values by them) and four in the backward, each
    over the pairs of a token and one that it sees. `again`: the forward pass is recomputed.
    """
    products = 2 * (3 + again)
    pairs = sum(
        seen_pairs(size, config.window(layer)) for layer in range(config.n_layers) for size in sizes
    )
    return 2.0 * products * config.n_heads * config.head_size * pairs


def seen_pairs(size: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included, in a document of `size` tokens."""
    near = min(size, window or size)
    return near * (near + 1) // 2 + (size - near) * near
