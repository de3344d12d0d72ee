"""PPO: reinforcement learning from rewards, with a critic (arXiv:1707.06347).

Where GRPO compares the replies of a group, PPO asks a second model, the critic, what reward the
policy may expect from each token on; what a token brings beyond that is its advantage (GAE). A
reward of a whole reply thus becomes a signal for each of its tokens, at the price of a second model
that must first learn to judge: `explained_variance` says how well it does. The distance from the
model that training began with is paid for within the reward, token by token.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from whet.config import problems
from whet.data.batches import Batch
from whet.flags.ppo import Config
from whet.model.decoder import run_batch
from whet.rl.critic import ActorCritic, judged_places
from whet.rl.policy_loss import policy_term, value_loss
from whet.rl.sampling import policy_of
from whet.stages.grpo import frozen_reference
from whet.stages.model import ModelWriter, Opened, open_for_training, run_tuned
from whet.stages.policy import ADAPTER_LR, policy_stage
from whet.train.distributed import Ranks, unwrap
from whet.train.stage import Stage, Sums


def build(config: Config, ranks: Ranks) -> Stage:
    """Open prompts, policy, critic and rewards, and check that they fit together."""
    # Patterns of --lr_groups are those of both models, and are checked with the optimizer.
    bare = replace(config, lr_groups=())
    opened = open_for_training(bare, ranks, [], {}, adapter_lr=ADAPTER_LR)
    critic = _open_critic(config, ranks, opened)
    reference = None
    if config.kl:
        reference = frozen_reference(opened.model, config)
    model = ActorCritic(opened.model, critic.model)
    stage = policy_stage(
        config,
        ranks,
        opened,
        partial(ppo_loss, config=config),
        name="ppo",
        complete=partial(judged_places, config=config, reference=reference),
    )
    start = ("critic", f"{config.critic or config.model}, learning rate x {config.critic_lr:g}")
    write: Any = stage.save_model
    lineage = {"stage": "critic", "base": write.lineage["base"]}
    write_critic = ModelWriter(opened.chat, lineage, lora=critic.lora)

    def save(model: nn.Module, directory: Path, metrics: dict[str, float]) -> None:
        """The policy as the model, and the critic in `critic/` beside it."""
        inner: Any = unwrap(model)
        write(inner.policy, directory, metrics)
        write_critic(inner.critic, directory / "critic", metrics)

    return replace(
        stage,
        model=model,
        save_model=save,
        rehearse=lambda model: stage.rehearse and stage.rehearse(policy_of(model)),
        header=[*stage.header, start],
    )


def _open_critic(config: Config, ranks: Ranks, opened: Opened) -> Opened:
    """The critic: a model with a score and the policy's tokenizer."""
    wanted = replace(config, model=config.critic or config.model, lr_groups=())
    critic = open_for_training(wanted, ranks, [], {}, score=True)
    own, other = opened.chat, critic.chat
    if own and other and not other.tokenizer.knows_ids_of(own.tokenizer):
        problems([f"--critic {config.critic}: has another tokenizer than --model {config.model}"])
    return critic


def ppo_loss(model: nn.Module, batch: Batch, *, config: Config) -> Sums:
    """The losses of policy and critic of a micro-batch, see `whet.rl.policy_loss`."""
    found, values = run_batch(model, batch, per_token=True, temperature=config.temperature)
    names = ("sampled", "advantage", "values", "returns")
    sampled, advantage, old, returns = (batch.extra[name] for name in names)
    nll, low, high = found.nll.detach(), config.clip_low, config.clip_high
    part = policy_term(found.nll, sampled, advantage, "clip", low=low, high=high)
    errors = value_loss(values, old, returns, config.value_clip)
    count = (batch.weight != 0).sum().double()
    named = {
        "mismatch": ((sampled - nll).abs().sum().double(), count),
        "clipped": ((part.clipped * (batch.weight != 0)).sum().double(), count),
        "value_loss": (errors.detach().sum().double(), count),
    }
    loss = (batch.weight * (part.term + config.value_weight * errors)).sum()
    return Sums(loss, nll, named)


def main(config: Config) -> int:
    """`whet ppo`."""
    critic = f"re:^critic[.]={config.critic_lr:g}"
    if critic not in config.lr_groups:  # a resumed run's own flags have it
        config = replace(config, lr_groups=(*config.lr_groups, critic))
    return run_tuned(config, "ppo", build)
