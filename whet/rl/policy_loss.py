"""What a policy is trained on: plain functions of each token's -ln p and its advantage A.

With rho = p(token) / p_old(token), where p_old is the policy that sampled the reply, the term of a
token (minimised; the stage multiplies it by the token's weight and divides by the step's total):

======  =====================================================  ====================================
name    term                                                   source
======  =====================================================  ====================================
clip    -min(rho A, clip(rho, 1 - low, 1 + high) A)            PPO, arXiv:1707.06347 eq. 7; high >
                                                               low: DAPO, arXiv:2503.14476
gspo    the same, rho the geometric mean over the reply        arXiv:2507.18071
cispo   -A ln p  min(rho, 1 + high), the factor fixed          arXiv:2506.13585
======  =====================================================  ====================================

Where p is p_old, rho is 1 and all of them have the gradient of -A ln p: that of SFT with the
advantage as the token's weight.

How tokens are weighted is no part of the loss but of `weight` and `total`, see `token_weights`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from whet.data.batches import per_document
from whet.flags.choices import Normalize, PolicyLoss

USUAL_CLIP: dict[PolicyLoss, tuple[float, float]] = {
    "clip": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
}
"""(low, high) of each kind, as the papers have it."""


@dataclass(frozen=True)
class PolicyTerm:
    """Of each token, (B, T)."""

    term: Tensor
    """What is minimised, with a gradient."""
    clipped: Tensor
    """1.0 where the clip leaves no gradient, else 0."""


def policy_term(
    nll: Tensor,
    old_nll: Tensor,
    advantage: Tensor,
    kind: PolicyLoss = "clip",
    *,
    low: float,
    high: float,
    segments: Tensor | None = None,
    weight: Tensor | None = None,
) -> PolicyTerm:
    """The table above. nll and old_nll (B, T): -ln p of each token under the policy in training,
    with a gradient, and under the one that sampled it; advantage (B, T).

    `gspo` needs `segments` and `weight` (B, T): a reply is the tokens of a segment that have a
    weight.
    """
    change = old_nll - nll
    if kind == "gspo":
        assert segments is not None, "gspo: which tokens are one reply?"
        assert weight is not None, "gspo: which tokens are one reply?"
        change = _mean_of_reply(change, segments, weight)
    rho = change.exp()
    if kind == "cispo":
        bounded = rho.detach().clamp(max=1 + high)
        return PolicyTerm(bounded * advantage * nll, torch.zeros_like(nll))
    free, held = rho * advantage, rho.clamp(1 - low, 1 + high) * advantage
    return PolicyTerm(-torch.minimum(free, held), (held < free).to(nll.dtype))


def token_weights(
    lengths: Tensor, normalize: Normalize, max_new_tokens: int
) -> tuple[Tensor, float]:
    """lengths (S,) of the replies of a whole step -> (weight of each token of reply s (S,), total).

    ==========  ==============  ==============================  ===================================
    name        weight          total                           source
    ==========  ==============  ==============================  ===================================
    tokens      1               all trained tokens              DAPO, arXiv:2503.14476
    sequences   1 / length      number of replies               GRPO, arXiv:2402.03300
    constant    1               replies x max_new_tokens        Dr. GRPO, arXiv:2503.20783
    ==========  ==============  ==============================  ===================================
    """
    ones = torch.ones_like(lengths, dtype=torch.float64)
    if normalize == "sequences":
        return ones / lengths.clamp(min=1), float(len(lengths))
    if normalize == "constant":
        return ones, float(len(lengths) * max_new_tokens)
    return ones, float(lengths.sum())


def divergence(nll: Tensor, reference_nll: Tensor) -> Tensor:
    """(ln p - ln q)^2 / 2 of each token: as a LOSS its gradient is that of KL(p || q) (k2).

    The two other estimators of the same number are wrong as losses: the expected gradient of
    k1 = ln p - ln q is 0, that of k3 is the gradient of KL(q || p) (arXiv:2512.21852).
    """
    return (nll - reference_nll).square() / 2


def k3(nll: Tensor, reference_nll: Tensor) -> Tensor:
    """q/p - ln(q/p) - 1 of each token: an estimate of KL(p || q) without a negative value, for logs
    (joschu.net/blog/kl-approx.html)."""
    change = nll - reference_nll
    return torch.expm1(change) - change


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((v - R)^2, (v_old + clip(v - v_old) - R)^2) / 2 of each token (PPO's reference code).

    A critic that has moved by more than `clip` since the rollout gains nothing by moving on.
    """
    held = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (held - returns).square()) / 2


def truncated_ratio(nll: Tensor, sampler_nll: Tensor, cap: float) -> Tensor:
    """min(p / p_sampler, cap) of each token, without a gradient: it corrects for a sampler whose
    numbers differ from the trainer's (arXiv:2510.18855)."""
    return (sampler_nll - nll).detach().exp().clamp(max=cap)


def _mean_of_reply(x: Tensor, segments: Tensor, weight: Tensor) -> Tensor:
    """x (B, T) -> the mean over the tokens of its reply, at each of them."""
    counted = (weight != 0).to(x.dtype)
    sums, numbers = per_document(x * counted, segments), per_document(counted, segments)
    means = sums / numbers.clamp(min=1)
    return means.gather(1, segments).to(x.dtype)
