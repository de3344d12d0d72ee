"""From logits to the next token: pure functions of (logits, one uniform number per row).

Each prompt draws its own uniform numbers, from a key of its own alone, so what is sampled for it
does not depend on which other prompts share its batch.
"""

import numpy as np
import torch
from torch import Tensor


def uniforms(key: tuple[int, ...], count: int) -> Tensor:
    """The `count` numbers in [0, 1), float32, of the prompt with this key, such as (seed, index);
    its token t uses number t."""
    return torch.from_numpy(np.random.default_rng(key).random(count, dtype=np.float32))


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
    is drawn by inverting the cumulative distribution over the candidates: the `top_k` likeliest,
    and of those the smallest set that holds `top_p` of their probability (at least one token;
    nucleus sampling, arXiv:1904.09751), in order of falling probability. Without either these are
    all tokens in the order of their ids, as sorting a vocabulary takes longer than a small model.
    """
    if temperature == 0:
        return logits.float().argmax(dim=-1)  # in bf16 a CPU takes ten times as long
    if uniform is None:
        raise ValueError("sampling at a temperature needs one uniform number per row")
    if top_k is None and (top_p is None or top_p >= 1):
        return _invert(_softmax(logits.float(), temperature), uniform)
    probabilities, ids = candidates(logits, temperature, top_k, top_p)
    return ids.gather(-1, _invert(probabilities, uniform)[:, None])[:, 0]


def candidates(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """(probabilities, ids), each (B, C), by falling probability; C is `top_k`, or V without it.

    Probabilities are float32 and sum to 1 in each row; an excluded token's is 0.
    """
    size = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    largest, ids = logits.float().topk(size, dim=-1)
    probabilities = _softmax(largest, temperature)
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # the mass of all likelier tokens
        excluded = before >= top_p
        excluded[:, 0] = False
        probabilities = probabilities.masked_fill(excluded, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities, ids


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature), float32, for any temperature above 0."""
    # What is less than the largest may become -inf; a temperature that float32 rounds to 0 is none.
    below = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    return below.softmax(-1)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Row by row the first place (B,) whose cumulative probability exceeds `uniform`."""
    cumulative = probabilities.cumsum(dim=-1)
    # Rounding can leave the last sum below 1, or the draw at it: nothing exceeds that. Below it,
    # the place where it is reached does, and has a probability that is not 0.
    total = cumulative[:, -1:]
    target = torch.minimum(uniform.to(total)[:, None] * total, total.nextafter(total.new_zeros(())))
    return torch.searchsorted(cumulative, target.contiguous(), right=True)[:, 0]
