"""The flags of `whet grpo`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import FIRST, above_0, from_0
from whet.flags.choices import Advantage, PolicyLoss, Schedule
from whet.flags.policy import Prompts, Sampling, policy_flaws
from whet.flags.training import Memory, Model, TrainSettings, Tuning


@dataclass(kw_only=True)
class Policy:
    """The policy's loss."""

    advantage: Advantage = "group"
    """How a reward becomes an advantage in its group: group divides by its spread, plain does not,
    leave_one_out compares with the others alone, batch divides by the spread of all replies."""
    loss: PolicyLoss = "clip"
    """Bound on the ratio to the sampling policy, from the second update of a rollout on."""
    clip_low: Annotated[float | None, from_0] = None
    """How far below 1 the ratio counts; default: 0.2 (gspo: 0.0003)."""
    clip_high: Annotated[float | None, from_0] = None
    """How far above 1; default: 0.28 (gspo: 0.0004; cispo: 4)."""
    kl: Annotated[float, from_0] = 0.0
    """Weight of the divergence from the model that training began with; needs a copy of it in
    memory, but for a new adapter."""
    refill: bool = False
    """Draw further prompts in place of groups whose replies are all worth the same."""


@dataclass(kw_only=True)
class Config(Memory, TrainSettings, Tuning, Policy, Sampling, Prompts, Model):
    """Train a model on rewards for its own replies (GRPO).

    whet grpo --model runs/sft --prompts gsm8k/train.jsonl --dev gsm8k/test.jsonl --out runs/grpo
    """

    lr: Annotated[float, FIRST, above_0] = 1e-6
    """Peak learning rate; with an adapter 1e-5 to 5e-5 is usual."""
    schedule: Schedule = "constant"
    """Shape of the learning rate after the warm-up; wsd holds it, then decays in the last fifth."""


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    found = policy_flaws(config)
    if config.group_size < 2:
        found.append(f"--group_size {config.group_size}: a group needs at least 2 replies")
    bounds = {"loss": "clip", "clip_low": None, "clip_high": None}
    if config.updates == 1:
        found += [
            f"--{name}: bounds a rollout's later updates, and there is one; add --updates 2"
            for name, default in bounds.items()
            if getattr(config, name) != default
        ]
    elif config.loss == "cispo" and config.clip_low is not None:
        found.append("--clip_low: --loss cispo has no lower bound; leave it out")
    return found
