"""A stage that trains a policy on rewards for its own replies: what GRPO and PPO share."""

import hashlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from whet.chat.chat import Chat
from whet.config import as_toml, collected, problems
from whet.data.batches import Batch
from whet.errors import UserError
from whet.model.hf.weights import saved_as
from whet.rl import rewards
from whet.rl.advantages import Advantage
from whet.rl.evaluation import PolicyEvaluator
from whet.rl.policy_loss import Normalize
from whet.rl.prompts import Prompts, load_prompts
from whet.rl.rewards import NEEDS_GOLD, open_rewards, parse_reward
from whet.rl.rollout_file import RolloutSettings
from whet.rl.rollouts import Rollouts
from whet.rl.sampling import SampleSettings, Truncated
from whet.stages.opening import Opened
from whet.stages.saving import ModelWriter
from whet.stages.settings import Base
from whet.train.distributed import Ranks
from whet.train.session import total_steps
from whet.train.stage import Stage, Sums


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


def policy_flaws(config: Any) -> list[str]:
    """What can be said against the flags of a policy stage before anything is opened."""
    found = rewards.flaws(config.reward)
    for flag, path in (("--prompts", config.prompts), ("--dev", config.dev)):
        if path is not None and not path.is_file():
            found.append(f"{flag} {path}: no such file; expected JSON lines of prompts")
    for name in ("temperature", "max_new_tokens", "updates", "cohort", "dev_limit"):
        if not 0 < getattr(config, name) < math.inf:
            found.append(f"--{name} {getattr(config, name)}: expected a number above 0")
    return found


def policy_stage(
    config: Any,
    ranks: Ranks,
    opened: Opened,
    loss_fn: Callable[[nn.Module, Batch], Sums],
    *,
    name: str,
    advantage: Advantage,
    refill: bool = False,
    passes: int = 1,
) -> Stage:
    """The stage that samples replies to `config.prompts`, and trains them with `loss_fn`.

    Raises UserError for prompts and rewards that do not fit the model.
    """
    quiet = config.quiet or not ranks.first
    chat = opened.chat
    if chat is None:
        raise UserError(f"--model {config.model}: holds no tokenizer; add --tokenizer DIR")
    prompts, dev, notes = _open_prompts(config, opened.model.config.max_positions, chat, quiet)
    terms = open_rewards(
        config.reward,
        chat,
        ExitStack(),  # processes of the user's functions end with this one
        max_new_tokens=config.max_new_tokens,
        seconds=config.reward_seconds,
        device=ranks.device,
    )
    rollouts = Rollouts(
        prompts,
        SampleSettings(
            config.group_size,
            config.cohort,
            config.max_new_tokens,
            config.temperature,
            config.truncated,
            config.seed,
        ),
        RolloutSettings(
            advantage,
            config.normalize,
            config.truncated,
            config.max_new_tokens,
            config.updates,
            config.seed,
        ),
        terms,
        chat,
        config.out / "rollouts",
        config.batch_size,
        config.micro_batch_size,
        ranks,
        passes=passes,
        refill=refill,
        keep=config.keep_rollouts,
        quiet=quiet,
    )
    a_rollout = min(config.batch_size, len(prompts))
    return Stage(
        model=opened.model,
        documents=rollouts,
        dev=dev,
        total_steps=total_steps(config, rollouts.rollouts_per_epoch * rollouts.per_rollout),
        batches=rollouts.batches,
        loss_fn=loss_fn,
        evaluate=PolicyEvaluator(
            dev, chat, terms, config.max_new_tokens, n_samples=config.samples, quiet=quiet
        ),
        save_model=_writer(config, opened, prompts, name),
        before_step=rollouts.before_step,
        best="dev_reward",
        higher_is_better=True,
        header=[
            *opened.header,
            ("prompts", f"{prompts.path}: {len(prompts):,}, {len(dev) if dev else 0:,} held out"),
            (
                "rollout",
                f"{a_rollout} prompts x {config.group_size} replies of up to "
                f"{config.max_new_tokens} tokens, {rollouts.per_rollout} update(s)",
            ),
            ("reward", " + ".join(f"{term.weight:g} x {term.name}" for term in terms)),
            *(("note", note) for note in notes),
        ],
    )


def _open_prompts(
    config: Any, max_positions: int, chat: Chat, quiet: bool
) -> tuple[Prompts, Prompts | None, list[str]]:
    names = [parse_reward(text)[0] for text in config.reward]
    needs_gold = next((name for name in names if name in NEEDS_GOLD), "")
    options: dict[str, Any] = {
        "longest": max_positions - 1,
        "needs_gold": needs_gold,
        "quiet": quiet,
    }
    dev, found, notes = None, list[str](), list[str]()
    prompts = None
    with collected(found):
        prompts, notes = load_prompts(config.prompts, chat, **options)
    with collected(found):
        if config.dev is not None:
            limit = config.dev_limit
            dev, more = load_prompts(config.dev, chat, limit=limit, flag="--dev", **options)
            notes += more
    problems(found)
    assert prompts is not None
    return prompts, dev, notes


def _writer(config: Any, opened: Opened, prompts: Prompts, name: str) -> ModelWriter:
    assert opened.chat is not None
    lineage = {
        "stage": name,
        **opened.lineage,
        "prompts": str(config.prompts),
        "reward": list(config.reward),
        "data_hash": prompts.fingerprint,
        "tokenizer_hash": opened.chat.tokenizer.hash,
        "config_hash": hashlib.sha256(as_toml(config).encode()).hexdigest(),
    }
    dtype = saved_as(config.save_dtype, opened.model.config.hf)
    return ModelWriter(opened.chat, lineage, config.out_ckpt, config.out, opened.lora, dtype)
