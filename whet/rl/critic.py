"""The critic of PPO: what reward a policy may expect from each place on, and what it is used for.

Policy and critic are two models in one module, so that one optimizer, one state and one wrapper
hold both. No weight is shared: the critic's gradient does not touch the policy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet.data.batches import Batch, make_batch, micro_batches, shares_of
from whet.data.layout import Rows
from whet.flags.ppo import Config
from whet.generate.engine import evaluating
from whet.model.attention import planned
from whet.model.decoder import Transformer, run_batch
from whet.model.loss import TokenLoss
from whet.rl.advantages import gae, whitened
from whet.rl.rollout_file import Layout
from whet.train.distributed import Ranks, gather, unwrap

Completed = tuple[dict[str, np.ndarray], dict[str, float]]
Reference = Callable[[nn.Module, Batch], Tensor]
"""(model in training, batch) -> -ln p (B, T) of the model that training begins with."""


class ActorCritic(nn.Module):
    """A policy and its critic, a model with a score."""

    def __init__(self, policy: Transformer, critic: Transformer) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        weight: Tensor,
        plan: Any = None,
        **options: Any,
    ) -> tuple[TokenLoss, Tensor]:
        """The policy's `TokenLoss`, and the critic's values (B, T), 0 where the weight is 0."""
        places = (tokens, positions, segments)
        found = self.policy(*places, weight=weight, plan=plan, **options)
        return found, self.critic(*places, weight=weight, plan=plan)

    @property
    def layers(self) -> list[nn.Module]:
        """Those of both, for what is done layer by layer."""
        return [*self.policy.layers, *self.critic.layers]


def judged_places(
    layout: Layout,
    model: nn.Module,
    ranks: Ranks,
    *,
    config: Config,
    reference: Reference | None,
) -> Completed:
    """What PPO needs of each reply token of a rollout, and numbers for the log.

    The reward of a token is -kl (ln p - ln p_reference), kl being the flag; the reply's own comes
    to that of its last token. Gives, as they stand in the file, `values`, `returns` and
    `token_advantages` (rows, T): the critic's values, and what `gae` makes of rewards and values,
    the advantages with mean 0 and variance 1 over the rollout's trained tokens. All ranks call it.
    """
    values, reference_nll = _read_places(layout, model, ranks, reference, config.micro_rows)
    # A value stands at the place before its token, where the model predicts the token.
    old, nll = (torch.from_numpy(np.roll(x, 1, 1)).double() for x in (values, reference_nll))
    weight = torch.from_numpy(layout.mask)
    inside, change = weight != 0, torch.zeros_like(old)
    if reference is not None:
        change = torch.where(inside, torch.from_numpy(layout.logp) + nll, 0.0)
    rewards = -config.kl * change
    for document in layout.documents:
        if document.weight:
            rewards[document.row, document.end - 1] += document.sample.reward
    advantages, returns = gae(rewards, old, inside, gamma=config.gamma, lam=config.gae_lambda)
    old = torch.where(inside, old, 0.0)
    made = {"values": old, "returns": returns, "token_advantages": whitened(advantages, weight)}
    places = {name: x.numpy().astype(np.float32) for name, x in made.items()}
    if not inside.any():  # all replies were cut, and `--truncated mask` trains none of them
        return places, {}
    numbers = {
        "explained_variance": _explained(returns[inside], old[inside]),
        "value": float(old[inside].mean()),
    }
    if reference is not None:
        numbers["kl"] = float(change[inside].mean())
    return places, numbers


def _explained(returns: Tensor, values: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    spread = float(returns.var(correction=0))
    return 1.0 - float((returns - values).var(correction=0)) / spread if spread else 0.0


def _read_places(
    layout: Layout,
    model: nn.Module,
    ranks: Ranks,
    reference: Reference | None,
    micro_batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The critic's values, and -ln p under the reference, (rows, T) each, at the place before each
    token; every rank runs its rows and gets all."""
    inner: Any = unwrap(model)
    shares = shares_of(len(layout.tokens), ranks.rank, ranks.size, micro_batch_size)
    found = list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
    with torch.no_grad(), evaluating(inner):
        for rows in shares:
            read = Rows(layout.tokens[rows], layout.mask[rows], layout.segments[rows])
            whole = micro_batches(make_batch(read, rows, total=1.0), micro_batch_size, 1)[0]
            batch = planned(whole).to(ranks.device)
            values = run_batch(inner.critic, batch)
            nll = torch.zeros_like(values) if reference is None else reference(model, batch)
            n = len(rows)
            found.append((rows, values[:n].float().cpu().numpy(), nll[:n].float().cpu().numpy()))
    values_of, nll_of = (np.zeros(layout.tokens.shape, np.float32) for _ in range(2))
    for part in gather(found, ranks):
        for rows, values, nll in part:
            values_of[rows], nll_of[rows] = values, nll
    return values_of, nll_of
