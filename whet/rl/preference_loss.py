"""Losses of preference pairs: plain functions of the replies' log-probabilities.

With c and r the chosen and the rejected reply, n their trained tokens, p = sum of ln p(token) under
the model in training, q the same under the reference model, and s the logistic function:

=======  ==============================================================  ======================
name     loss of a pair                                                  source
=======  ==============================================================  ======================
dpo      -ln s(beta h),  h = (p_c - q_c) - (p_r - q_r)                   arXiv:2305.18290 eq. 7
ipo      (h - 1/(2 beta))^2,  h of means: each p - q divided by its n    arXiv:2310.12036 eq. 17
simpo    -ln s(beta (p_c/n_c - p_r/n_r) - gamma)                         arXiv:2405.14734
orpo     -p_c/n_c - beta ln s(o(p_c/n_c) - o(p_r/n_r)),                  arXiv:2403.07691
         o(m) = m - ln(1 - e^m)
kto      1 - s(beta (p_c - q_c - z)) + 1 - s(beta (z - p_r + q_r))       arXiv:2402.01306 eq. 7
=======  ==============================================================  ======================

`label_smoothing` e mixes in the loss of the swapped pair, (1 - e) L(h) + e L(-h): for labels of
which a share e is wrong (cDPO, ericmitchell.ai/cdpo.pdf eq. 3). `sft_weight` a adds a times
-p_c/n_c, which holds the chosen reply's probability up (RPO, arXiv:2404.19733).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from whet.flags.dpo import WITHOUT_REFERENCE, Loss

NEAREST_TO_0 = -1e-6
"""ORPO's odds are infinite for a reply that is certain, so its mean ln p stays below this."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, by the table above."""

    kind: Loss
    beta: float
    gamma: float = 0.0
    label_smoothing: float = 0.0
    sft_weight: float = 0.0


@dataclass(frozen=True)
class Replies:
    """One side of P pairs."""

    logp: Tensor
    """(P,) sum of ln p(token) over the reply, with a gradient."""
    reference: Tensor
    """(P,) the same under the reference model; 0 for losses without one."""
    tokens: Tensor
    """(P,) trained tokens of the reply, its stop token included."""

    @property
    def mean(self) -> Tensor:
        """(P,) ln p a token; 0 for a reply without tokens."""
        return self.logp / self.tokens.clamp(min=1)

    @property
    def change(self) -> Tensor:
        """(P,) how much likelier than under the reference, in nats."""
        return self.logp - self.reference

    @property
    def mean_change(self) -> Tensor:
        """(P,) the same a token."""
        return self.change / self.tokens.clamp(min=1)


def preference_loss(
    chosen: Replies,
    rejected: Replies,
    kind: Loss,
    *,
    beta: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    z: Tensor | float = 0.0,
) -> Tensor:
    """(P,) the loss of each pair, by the table above. `z` is KTO's baseline, see `kto_loss`."""
    if kind == "kto":
        loss = kto_loss(chosen, True, beta, z) + kto_loss(rejected, False, beta, z)
    elif kind == "ipo":
        loss = (chosen.mean_change - rejected.mean_change - 1 / (2 * beta)).square()
    elif kind == "orpo":
        loss = -chosen.mean - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    else:
        if kind == "dpo":
            margin = beta * (chosen.change - rejected.change)
        else:
            margin = beta * (chosen.mean - rejected.mean) - gamma
        loss = -(1 - label_smoothing) * F.logsigmoid(margin)
        if label_smoothing:
            loss = loss - label_smoothing * F.logsigmoid(-margin)
    return loss - sft_weight * chosen.mean if sft_weight else loss


def kto_loss(replies: Replies, desirable: Tensor | bool, beta: float, z: Tensor | float) -> Tensor:
    """(P,) the loss of single replies, each good (`desirable`) or bad.

    `z` is the divergence from the reference that any reply has, max(0, mean of `change` over
    replies to other prompts), without a gradient.
    """
    above = beta * (replies.change - z)
    good = torch.as_tensor(desirable, device=above.device)
    return 1 - torch.sigmoid(torch.where(good, above, -above))


def implicit_reward(replies: Replies, kind: Loss, beta: float) -> Tensor:
    """(P,) what the loss takes for the reward of each reply; its order decides pair accuracy."""
    return beta * (replies.mean if kind in WITHOUT_REFERENCE else replies.change).detach()


def reward_model_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, centre: float = 0.0
) -> Tensor:
    """(P,) Bradley-Terry: -ln s(chosen - rejected - margin), from the rewards (P,) of both sides.

    `margin` (P,): by how much better the chosen reply was judged (arXiv:2307.09288, section 3.2.2).
    `centre` adds centre x (chosen + rejected)^2: the rewards' mean, which the first term leaves
    free, goes to 0 (arXiv:2312.09244).
    """
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss + centre * (chosen + rejected).square() if centre else loss


def _log_odds(replies: Replies) -> Tensor:
    """ln(p / (1 - p)) of the mean probability of a token; `expm1` keeps it exact near p = 1."""
    mean = replies.mean.clamp(max=NEAREST_TO_0)
    return mean - torch.log(-torch.expm1(mean))
