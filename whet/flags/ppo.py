"""The flags of `whet ppo`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import FIRST, Place, above_0, from_0, from_1, share
from whet.flags.choices import Schedule
from whet.flags.policy import Prompts, Sampling, policy_flaws
from whet.flags.training import Memory, Model, TrainSettings, Tuning
from whet.hub import known_model


@dataclass(kw_only=True)
class Critic:
    """Policy and critic."""

    critic: Annotated[Place | None, known_model] = None
    """What the critic starts from: a reward model is the best start; default: --model."""
    critic_lr: Annotated[float, above_0] = 10.0
    """The critic's learning rate, as a multiple of --lr."""
    passes: Annotated[int, from_1] = 1
    """How often each rollout is trained."""
    gamma: Annotated[float, share] = 1.0
    """Discount of later rewards."""
    gae_lambda: Annotated[float, share] = 0.95
    """1 trusts the rewards alone, 0 the critic alone."""
    kl: Annotated[float, from_0] = 0.02
    """What a nat of distance from the model that training began with costs, within the reward;
    above 0 it needs a copy of that model in memory, but for a new adapter."""
    clip_low: Annotated[float, from_0] = 0.2
    """How far below 1 the ratio to the sampling policy counts."""
    clip_high: Annotated[float, from_0] = 0.2
    """How far above 1."""
    value_clip: Annotated[float, above_0] = 0.5
    """By how much a value may move in a rollout."""
    value_weight: Annotated[float, above_0] = 1.0
    """Weight of the critic's loss beside the policy's."""


@dataclass(kw_only=True)
class Config(Memory, TrainSettings, Tuning, Critic, Sampling, Prompts, Model):
    """Train a model on rewards for its own replies, with a critic (PPO).

    whet ppo --model runs/sft --critic runs/reward --prompts train.jsonl --reward runs/reward \\
             --out runs/ppo
    """

    lr: Annotated[float, FIRST, above_0] = 1e-6
    """Peak learning rate of the policy."""
    schedule: Schedule = "constant"
    """Shape of the learning rate after the warm-up; wsd holds it, then decays in the last fifth."""
    group_size: Annotated[int, FIRST, from_1] = 1
    """Replies sampled for each prompt; --batch_size is the number of prompts."""
    updates: Annotated[int, from_1] = 4
    """Optimizer steps of a rollout; each trains its own share of the prompts."""


flaws = policy_flaws
