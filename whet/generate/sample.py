"""From logits to the next token: pure functions of (logits, one uniform number per row).

Each prompt draws its own uniform numbers, from a key of its own alone, so what is sampled for it
does not depend on which other prompts share its batch.
"""

import numpy as np
import torch
from torch import Tensor


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """The `count` numbers in [0, 1), float32, of the prompt with this key, such as (seed, index);
    its token t uses number t."""
    return np.random.default_rng(key).random(count, dtype=np.float32)


def log_probabilities(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """ln p of tokens (B,) under softmax(logits / temperature), logits (B, V) -> (B,) float32.

    Of the whole vocabulary, as a loss sees it; temperature 0 counts as 1.
    """
    scaled = logits.float() / (temperature or 1.0)
    return torch.log_softmax(scaled, -1).gather(-1, tokens[:, None])[:, 0]


def likeliest(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens and their ln p, each (B, count), likeliest first."""
    if not count:
        return logits.new_empty(len(logits), 0, dtype=torch.long), logits.new_empty(len(logits), 0)
    logp, ids = torch.log_softmax(logits.float() / temperature, -1).topk(count, dim=-1)
    return ids, logp


def next_tokens(
    logits: Tensor,
    uniform: Tensor | None = None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The next token of each row: logits (B, V), uniform (B,) in [0, 1) -> ids (B,) int64.

    Temperature 0 is greedy and needs no `uniform`; ties go to the smaller id. Otherwise the token
    is drawn by inverting the cumulative distribution over the candidates, in order of falling
    probability: the `top_k` likeliest, and of those the smallest set that holds `top_p` of their
    probability (at least one token; nucleus sampling, arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if uniform is None:
        raise ValueError("sampling at a temperature needs one uniform number per row")
    return _invert(*candidates(logits, temperature, top_k, top_p), uniform)


def candidates(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """(probabilities, ids), each (B, C), by falling probability; C is `top_k`, or V without it.

    Probabilities are float32 and sum to 1 in each row; an excluded token's is 0.
    """
    size = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    largest, ids = logits.float().topk(size, dim=-1)
    # Less than the largest, in float64: no temperature, however small, makes an infinite number.
    below = (largest - largest[:, :1]).double() / temperature
    probabilities = below.softmax(dim=-1).float()
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # the mass of all likelier tokens
        excluded = before >= top_p
        excluded[:, 0] = False
        probabilities = probabilities.masked_fill(excluded, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities, ids


def _invert(probabilities: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """Row by row the first candidate whose cumulative probability exceeds `uniform`."""
    cumulative = probabilities.cumsum(dim=-1)
    # Rounding can leave the last sum below 1, or the draw on a token of probability 0 behind it.
    target = (uniform.to(cumulative)[:, None] * cumulative[:, -1:]).contiguous()
    place = torch.searchsorted(cumulative, target, right=True)
    last_possible = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(-1, torch.minimum(place, last_possible)).squeeze(-1)
