"""The ways to compute attention within documents. All give the same numbers.

============  ==========================  ===================================================
`documents`   CPU; float32 anywhere       one call of torch's SDPA per document, in float32
`varlen`      CUDA, bfloat16 or float16   torch's flash attention over documents end to end
`flex`        CUDA, with a soft cap       torch's flex attention with a block mask
============  ==========================  ===================================================

None of them makes a (T, T) mask of a row. Which one runs is decided in `attention.py`.

Shape letters: B batch, T tokens, N heads, K key/value heads, H head size, M packed tokens, S slots.
"""

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether torch needs a flag for shared heads; 2.11 takes them without one."""


@torch.compiler.disable  # compiled, it would be recompiled for each batch's lengths
def documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    after: list[int | None] | None = None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """q (M, N, H), k and v (M, K, H), documents of `lengths` tokens end to end -> (M, N, H).

    With `after` they are blocks: block i also sees all of block `after[i]`, which lies before it,
    and all that this one sees.

    Computed in float32, as all attention on a CPU: in bf16 torch's kernel is three times as slow,
    and each new length of a document makes oneDNN compile, and keep, new products.

    `split`, because its gradient is one concatenation: that of a slice is a matrix of zeros each.
    """
    masks: dict[tuple[int, int], Tensor] = {}
    outputs, dtype = [], v.dtype
    q, k, v = wide(q, k, v)
    queries, keys, values = (t.split(lengths) for t in (q, k, v))
    for i, length in enumerate(lengths):
        one, chain = [queries[i], keys[i], values[i]], [i]
        while after is not None and (before := after[chain[0]]) is not None:
            chain.insert(0, before)
        if len(chain) > 1:
            one[1:] = (torch.cat([t[block] for block in chain]) for t in (keys, values))
        seen = len(one[1])
        mask = None
        if seen > length or softcap is not None or (window is not None and window < length):
            if (length, seen) not in masks:
                masks[length, seen] = causal_mask(seen, window, q.device)[-length:]
            mask = masks[length, seen]
        batched = (t[None] for t in one)
        outputs.append(sdpa(*batched, mask=mask, scale=scale, softcap=softcap)[0])
    return torch.cat(outputs).to(dtype)


def wide(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in float32, or in float64 if they are that."""
    return (t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """The same by flash attention. `ends` (documents + 1,) int32: 0, then where each one ends.

    H is at most 256. The signature of torch's function grew from 2.11 to 2.13.
    """
    before = -1 if window is None else window - 1
    options: dict[str, Any] = {"scale": scale, "window_size": (before, 0)}
    if ASKS_FOR_GQA:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, ends, ends, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out


def flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Any, *, scale: float, softcap: float | None
) -> Tensor:
    """The same by flex attention, with a `block_mask` of `flex_mask`."""

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    attend = _flex_attention(q.device.type)
    out = attend(q, k, v, score_mod=cap, block_mask=block_mask, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def flex_mask(ends: Tensor, tokens: int, window: int | None) -> Any:
    """The block mask of documents with `ends` as in `varlen`, over `tokens` tokens."""
    from torch.nn.attention.flex_attention import create_block_mask

    place = torch.arange(tokens, device=ends.device)
    document = torch.searchsorted(ends, place, right=True)

    def sees(_b: Tensor, _h: Tensor, token: Tensor, other: Tensor) -> Tensor:
        near = token - other < (window or tokens)
        return (document[token] == document[other]) & (token >= other) & near

    return create_block_mask(sees, None, None, tokens, tokens, device=str(ends.device))


@cache
def _flex_attention(device: str) -> Any:
    """Compiled for CUDA; as it is elsewhere, where only tests use it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, T), True where the row's token sees the column's."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < (window or length))


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """q (B, T, N, H), k and v (B, S, K, H) -> (B, T, N, H). `mask` None is causal, T = S.

    The products are in the type of `q`, under autocast, too. torch's SDPA has no soft cap; with one
    the scores are made in full.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if softcap is None:
            grouped = q.shape[1] != k.shape[1]
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
            return y.transpose(1, 2)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = softcap * torch.tanh((q @ k.transpose(2, 3)).float() * (scale / softcap))
        assert mask is not None
        probabilities = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (probabilities.to(v.dtype) @ v).transpose(1, 2)
