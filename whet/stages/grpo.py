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
