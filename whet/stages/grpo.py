"""GRPO: reinforcement learning from rewards, without a critic (arXiv:2402.03300).

The model answers each prompt several times; replies that are better than the others of their group
become more likely, worse ones less. Nothing shows it how to answer: it must sometimes be right by
itself, and learns to be so more often. What `correct`, `format` or a function of yours rewards is
what it will do, so held-out accuracy is logged beside the reward.

With one update a rollout, the default, the policy that is trained is the one that sampled: then the
gradient is that of SFT with the advantage as each token's weight, and SFT's own fused loss computes
it. With more updates the ratio to the sampling policy is bounded by `--loss`.
"""

import dataclasses
import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from whet.chat.chat import Chat
from whet.config import as_toml, collected, problems
from whet.data.batches import Batch
from whet.model.hf.weights import saved_as
from whet.rl import rewards as rewards_
from whet.rl.advantages import Advantage
from whet.rl.evaluation import PolicyEvaluator
from whet.rl.policy_loss import USUAL_CLIP, Kind, Normalize, policy_term
from whet.rl.prompts import Prompts, load_prompts
from whet.rl.rewards import NEEDS_GOLD, open_rewards, parse_reward
from whet.rl.rollout_file import RolloutSettings
from whet.rl.rollouts import Rollouts
from whet.rl.sampling import SampleSettings, Truncated
from whet.stages.opening import open_for_training
from whet.stages.saving import ModelWriter
from whet.train.distributed import Ranks
from whet.train.session import run_stage, total_steps
from whet.train.settings import TrainSettings
from whet.train.stage import Documents, Stage, Sums


@dataclass(kw_only=True)
class PolicyInputs(Base):
    """What a policy in training is asked, and what its replies are worth."""

    prompts: Path
    """Prompts: JSON lines with prompt, messages or question, and a gold number where a reward
    needs one."""
    dev: Path | None = None
    """Held-out prompts, answered greedily at each evaluation."""
    dev_limit: int = 200
    """How many of them."""
    reward: tuple[str, ...] = ("correct",)
    """What replies are worth, NAME or NAME=WEIGHT each: correct, format, length, FILE.py:FUNCTION
    or a reward model's directory."""


@dataclass(kw_only=True)
class Sampling:
    """How replies are sampled and what becomes of them."""

    group_size: int = 8
    """Replies sampled for each prompt."""
    max_new_tokens: int = 256
    """Longest reply."""
    temperature: float = 1.0
    """Of the samples. There is no top-k or top-p: the trained distribution would be another."""
    truncated: Truncated = "penalty"
    """Replies cut at --max_new_tokens: penalty lowers their reward by 1, mask does not train them,
    score takes them as they are."""
    updates: int = 1
    """Optimizer steps of a rollout; each trains its own share of the groups. With 1 the trained
    policy is the one that sampled."""
    normalize: Normalize = "tokens"
    """What a loss is divided by: all trained tokens; or each reply's own length; or a constant."""
    cohort: int = 64
    """Replies generated together; part of the recipe, so that more ranks sample the same."""
    reward_seconds: float = 60.0
    """How long a reward function of yours may take for the replies of a cohort."""
    keep_rollouts: int = 2
    """Rollout files kept: the newest so many."""


@dataclass(kw_only=True)
class Config(TrainSettings, Tuning, Sampling, PolicyInputs):
    """Train a model on rewards for its own replies (GRPO)."""

    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "constant"
    """Shape of the learning rate after the warm-up; wsd holds it, then decays in the last fifth."""
    advantage: Advantage = "group"
    """How a reward becomes an advantage in its group; plain leaves out the division by its spread,
    leave_one_out compares with the others alone, batch divides by the spread of all replies."""
    loss: Kind = "clip"
    """Bound on the ratio to the sampling policy from the second update of a rollout on."""
    clip_low: float | None = None
    """How far below 1 the ratio counts; by default 0.2 (gspo: 0.0003)."""
    clip_high: float | None = None
    """How far above 1; by default 0.28 (gspo: 0.0004; cispo: 4)."""
    kl: float = 0.0
    """Weight of the divergence from the model that training began with; needs its copy in memory,
    but for an adapter."""
    refill: bool = False
    """Draw further prompts in place of groups whose replies are all worth the same."""


def build(config: Config, ranks: Ranks) -> Stage:
    """Open the prompts, the model and the rewards, and check that they fit together."""
    found = flaws(config)
    opened = open_for_training(config, ranks, found, {})
    chat = opened.chat
    if chat is None:
        problems([f"--model {config.model}: holds no tokenizer; add --tokenizer DIR"])
    assert chat is not None
    quiet = config.quiet or not ranks.first
    prompts, dev, notes = open_prompts(config, opened.model, chat, quiet)
    stack = ExitStack()
    rewards = open_rewards(
        config.reward,
        chat,
        stack,
        max_new_tokens=config.max_new_tokens,
        seconds=config.reward_seconds,
        device=ranks.device,
    )
    rollouts = make_rollouts(config, ranks, prompts, rewards, chat, quiet)
    ...
