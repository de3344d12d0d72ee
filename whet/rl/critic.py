"""The critic of PPO: what reward a policy may expect from each place on, and what it is used for.

Policy and critic are two models in one module, so that one optimizer, one state and one wrapper
hold both. No weight is shared: the critic's gradient does not touch the policy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet.data.batches import Batch, make_batch, micro_batch_count, micro_batches
from whet.data.layout import Rows
from whet.generate.engine import evaluating
from whet.model.attention import planned
from whet.model.decoder import Transformer, run_batch
from whet.model.loss import TokenLoss
from whet.rl.advantages import gae, whitened
from whet.rl.rollout_file import Layout
from whet.train.distributed import Ranks, gather, unwrap

Completed = tuple[dict[str, np.ndarray], dict[str, float]]


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


def policy_of(model: nn.Module) -> Any:
    """The policy alone, without wrapper and critic."""
    inner: Any = unwrap(model)
    return inner.policy if isinstance(inner, ActorCritic) else inner


def judged_places(
    layout: Layout,
    model: nn.Module,
    ranks: Ranks,
    *,
    reference: Callable[[nn.Module, Batch], Tensor] | None,
    kl: float,
    gamma: float,
    lam: float,
    micro_batch_size: int,
) -> Completed:
    """What PPO needs of each reply token of a rollout, and numbers for the log.

    The reward of a token is -kl (ln p - ln p_reference), that of a reply's last token the reply's
    own besides. Gives, as they stand in the file, `values`, `returns` and `token_advantages`
    (rows, T): the critic's values, and what `gae` makes of rewards and values, the advantages with
    mean 0 and variance 1 over the rollout's trained tokens. All ranks call it.
    """
    values, reference_nll = _read_places(layout, model, ranks, reference, micro_batch_size)
    names = ("values", "returns", "token_advantages")
    made = {name: np.zeros(layout.tokens.shape, np.float32) for name in names}
    kept = [d for d in layout.documents if d.weight]
    if not kept:  # all replies were cut, and `--truncated mask` trains none of them
        return made, {}
    lengths = torch.tensor([len(d.reply) for d in kept])
    shape = (len(kept), int(lengths.max()))
    rewards = torch.zeros(shape, dtype=torch.float64)
    old, weight, change = (torch.zeros_like(rewards) for _ in range(3))
    for i, document in enumerate(kept):
        n, before = len(document.reply), range(document.reply.start - 1, document.reply.stop - 1)
        places = (document.row, before)
        old[i, :n] = torch.from_numpy(values[places])
        weight[i, :n] = document.weight
        if reference is not None:
            logp = layout.logp[document.row, document.reply]
            change[i, :n] = torch.from_numpy(logp + reference_nll[places])
        rewards[i, :n] = -kl * change[i, :n]
        rewards[i, n - 1] += document.sample.reward
    advantages, returns = gae(rewards, old, lengths, gamma=gamma, lam=lam)
    for i, document in enumerate(kept):
        n, here = len(document.reply), (document.row, document.reply)
        parts = (old, returns, whitened(advantages, weight))
        for name, part in zip(names, parts, strict=True):
            made[name][here] = part[i, :n].numpy()
    inside = weight != 0
    numbers = {
        "explained_variance": _explained(returns[inside], old[inside]),
        "value": float(old[inside].mean()),
    }
    if reference is not None:
        numbers["kl"] = float(change[inside].mean())
    return made, numbers


def _explained(returns: Tensor, values: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    spread = float(returns.var(correction=0))
    return 1.0 - float((returns - values).var(correction=0)) / spread if spread else 0.0


def _read_places(
    layout: Layout,
    model: nn.Module,
    ranks: Ranks,
    reference: Callable[[nn.Module, Batch], Tensor] | None,
    micro_batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The critic's values, and -ln p under the reference, (rows, T) each, at the place before each
    token; every rank runs its rows and gets all."""
    inner: Any = unwrap(model)
    n_rows = len(layout.tokens)
    mine = np.arange(ranks.rank, n_rows, ranks.size)
    found = list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
    with torch.no_grad(), evaluating(inner):
        for i in range(micro_batch_count(n_rows, ranks.size, micro_batch_size)):
            rows = mine[i * micro_batch_size : (i + 1) * micro_batch_size]
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
