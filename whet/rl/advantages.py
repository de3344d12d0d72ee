"""From rewards to advantages: how much better a reply, or a token, was than expected.

For P prompts with G replies each, R the rewards and means over a group (all replies to one prompt):

==============  =======================================  ==========================================
name            advantage                                source
==============  =======================================  ==========================================
group           (R - mean) / (std of the group + 1e-4)   GRPO, arXiv:2402.03300 eq. 3
plain           R - mean                                 Dr. GRPO, arXiv:2503.20783
batch           (R - mean) / (std of all replies + 1e-4) arXiv:2508.08221
leave_one_out   R - mean of the others                   RLOO, arXiv:2402.14740
==============  =======================================  ==========================================

std divides by one less than the number of rewards. A group whose rewards are all equal says
nothing: its advantages are 0 exactly, decided by max == min and not by a quotient of two roundings.
"""

import torch
from torch import Tensor

from whet.flags.choices import Advantage

EPS = 1e-4


def group_advantages(rewards: Tensor, kind: Advantage = "group") -> Tensor:
    """rewards (P, G) float64 of whole groups -> advantages (P, G); those of a group sum to 0.

    `batch` must be given all groups of the step: its scale is theirs.
    """
    size = rewards.shape[1]
    above = rewards - rewards.mean(1, keepdim=True)
    above = above * informative(rewards)[:, None]
    if kind == "leave_one_out":
        return above * (size / max(1, size - 1))
    if kind == "group":
        return above / (rewards.std(1, keepdim=True, correction=1 if size > 1 else 0) + EPS)
    if kind == "batch":
        return above / (rewards.std(correction=1 if rewards.numel() > 1 else 0) + EPS)
    return above


def informative(rewards: Tensor) -> Tensor:
    """(P,) which groups of rewards (P, G) hold a better and a worse reply."""
    return rewards.amax(1) != rewards.amin(1)


def gae(
    rewards: Tensor, values: Tensor, inside: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438 eq. 16) of the replies in some rows.

    rewards and values (S, T) of the tokens that are `inside` (S, T) bool: runs of them are replies,
    and at least one other place stands between two; what lies there is not read. The value after
    the last token of a reply is 0: it has ended. Returns (advantages, returns), both (S, T) and 0
    outside, with

        delta_t = rewards_t + gamma values_(t+1) - values_t
        advantage_t = delta_t + gamma lam advantage_(t+1),  return_t = advantage_t + values_t
    """
    values = torch.where(inside, values, 0.0)
    delta = torch.where(inside, rewards, 0.0) - values
    delta[:, :-1] += gamma * values[:, 1:]
    delta = torch.where(inside, delta, 0.0)
    advantages = torch.zeros_like(delta)
    running = delta.new_zeros(len(delta))
    for t in reversed(range(delta.shape[1])):
        running = (delta[:, t] + gamma * lam * running) * inside[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def whitened(advantages: Tensor, weight: Tensor) -> Tensor:
    """advantages of all trained tokens of a step -> mean 0 and variance 1 over them.

    Both of one shape; tokens of `weight` 0 do not count and get 0. A single value, or all equal
    ones, give 0.
    """
    counts = (weight != 0).to(advantages.dtype)
    number = counts.sum().clamp(min=1)
    centred = (advantages - (advantages * counts).sum() / number) * counts
    spread = (centred.square().sum() / number).sqrt()
    return centred / torch.where(spread > 0, spread, 1.0)
