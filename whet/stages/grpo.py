"""GRPO: reinforcement learning from rewards, without a critic (arXiv:2402.03300).

The model answers each prompt several times; replies that are better than the others of their group
become more likely, worse ones less. Nothing shows it how to answer: it must sometimes be right by
itself, and learns to be so more often. What `correct`, `format` or a function of yours rewards is
what it will do, so held-out accuracy is logged beside the reward.

With one update a rollout, the default, the policy that is trained is the one that sampled: then the
gradient is that of SFT with the advantage as each token's weight, and SFT's own fused loss computes
it. With more updates the ratio to the sampling policy is bounded by `--loss`.
"""

from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from whet.data.batches import Batch
from whet.flags.choices import PolicyLoss
from whet.flags.grpo import Config
from whet.generate.engine import evaluating
from whet.model.decoder import run_batch
from whet.model.lora.lora import without_adapters
from whet.rl.critic import Reference
from whet.rl.policy_loss import USUAL_CLIP, divergence, k3, policy_term, truncated_ratio
from whet.rl.sampling import policy_of
from whet.stages.model import open_for_training, run_tuned
from whet.stages.policy import ADAPTER_LR, policy_stage
from whet.train.distributed import Ranks
from whet.train.stage import Stage, Sums

RATIO_CAP = 2.0
"""The ratio of trainer's to sampler's probability counts up to this much (arXiv:2510.18855)."""


def build(config: Config, ranks: Ranks) -> Stage:
    """Open the prompts, the model and the rewards, and check that they fit together."""
    opened = open_for_training(config, ranks, [], {}, adapter_lr=ADAPTER_LR)
    reference = None
    if config.kl:
        reference = frozen_reference(opened.model, config)
    given = zip((config.clip_low, config.clip_high), USUAL_CLIP[config.loss], strict=True)
    low, high = (usual if own is None else own for own, usual in given)
    loss = partial(
        grpo_loss,
        kind=None if config.updates == 1 else config.loss,
        low=low,
        high=high,
        temperature=config.temperature,
        kl=config.kl,
        reference=reference,
        ratio_cap=None if config.rollout_url is None else RATIO_CAP,
    )
    return policy_stage(config, ranks, opened, loss, name="grpo")


def grpo_loss(
    model: nn.Module,
    batch: Batch,
    *,
    kind: PolicyLoss | None,
    low: float,
    high: float,
    temperature: float,
    kl: float = 0.0,
    reference: Reference | None = None,
    ratio_cap: float | None = None,
) -> Sums:
    """The policy loss of a micro-batch, see `whet.rl.policy_loss`; `kind` None is on-policy.

    With `kl` each token adds kl x (ln p - ln p_reference)^2 / 2. With `ratio_cap` the sampler was
    another program than the trainer: on-policy, the advantage of each token is multiplied by the
    truncated ratio of the two; a `kind` bounds that ratio itself.
    """
    advantage, sampled = batch.extra["advantage"], batch.extra["sampled"]
    on_policy = kind is None and reference is None and ratio_cap is None
    weight = batch.weight * advantage if on_policy else batch.weight
    found = run_batch(model, batch, weight=weight, per_token=not on_policy, temperature=temperature)
    nll = found.nll.detach()
    inside = batch.weight != 0
    count = inside.sum().double()
    named = {"mismatch": ((sampled - nll).abs().sum().double(), count)}
    if on_policy:
        return Sums(found.loss, nll, named)
    if kind is None:
        term = advantage * found.nll
        if ratio_cap is not None:
            ratio = truncated_ratio(nll, sampled, ratio_cap)
            named["sampler_ratio"] = ((ratio * inside).sum().double(), count)
            term = ratio * term
    else:
        part = policy_term(
            found.nll,
            sampled,
            advantage,
            kind,
            low=low,
            high=high,
            segments=batch.segments,
            weight=batch.weight,
        )
        term = part.term
        named["clipped"] = ((part.clipped * inside).sum().double(), count)
    if reference is not None:
        other = reference(model, batch)
        term = term + kl * divergence(found.nll, other)
        named["kl"] = (k3(nll, other).sum().double(), count)
    return Sums((batch.weight * term).sum(), nll, named)


def frozen_reference(model: nn.Module, config: Any) -> Reference:
    """The model as it is now: under a new adapter the base, with the adapter switched off; else, as
    where an adapter is trained further or token rows are new, a copy."""
    from_base = config.lora_rank is not None and config.chat_template is None
    copy = None if from_base else deepcopy(model).requires_grad_(False).eval()

    def reference(model: nn.Module, batch: Batch) -> Tensor:
        inner: Any = policy_of(model) if copy is None else copy.to(batch.tokens.device)
        off = without_adapters(inner) if copy is None else nullcontext()
        with torch.no_grad(), evaluating(inner), off:
            return run_batch(inner, batch, temperature=config.temperature).nll

    return reference


def main(config: Config) -> int:
    """`whet grpo`."""
    return run_tuned(config, "grpo", build)
