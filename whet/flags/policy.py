"""The flags that stages share which train a policy on rewards for its own replies."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from whet.config import FIRST, FREE, InputFile, With, above_0, from_1
from whet.errors import UserError
from whet.flags.choices import Advantage, Normalize, Truncated
from whet.flags.training import tuning_flaws

BUILT_IN = ("correct", "format", "length")


def parse_reward(text: str) -> tuple[str, float]:
    """(name, weight) of `NAME` or `NAME=WEIGHT`, as `--reward` takes them.

    Raises UserError if the weight is no finite number.
    """
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise UserError("expected NAME or NAME=WEIGHT, such as format=0.2")
    return name, value


def known_reward(text: str) -> str:
    """A check of one of `--reward`."""
    try:
        name, _ = parse_reward(text)
    except UserError as error:
        return str(error)
    file, _, function = name.rpartition(":")
    if file.endswith(".py") and function.isidentifier():
        return "" if Path(file).is_file() else f"{file} is no file"
    models = ("config.json", "adapter_config.json")
    if name in BUILT_IN or any((Path(name) / config).is_file() for config in models):
        return ""
    return f"expected {', '.join(BUILT_IN)}, FILE.py:FUNCTION or the directory of a reward model"


def named_twice(texts: Sequence[str]) -> list[str]:
    """Rewards that are in `--reward` more than once."""
    names = [parse_reward(text)[0] for text in texts if not known_reward(text)]
    return [
        f"--reward {name}: is named more than once; give it one weight, as in {name}=2"
        for name in dict.fromkeys(name for name in names if names.count(name) > 1)
    ]


def server_root(url: str) -> str:
    """A check of --rollout_url."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:  # a port that is none
        fine = False
    if not fine or "@" in parts.netloc or parts.query or parts.path.rstrip("/").endswith("/v1"):
        return "expected the root of a server, http://HOST:PORT, without /v1"
    return ""


@dataclass(kw_only=True)
class Prompts:
    """Prompts and rewards."""

    prompts: Annotated[InputFile, FIRST]
    """JSON lines with prompt, messages or question, and a gold number where a reward needs one."""
    dev: Annotated[InputFile | None, FIRST] = None
    """Held-out prompts, answered greedily at each evaluation."""
    dev_limit: Annotated[int, from_1, With("dev")] = 200
    """How many of them."""
    reward: Annotated[tuple[str, ...], FIRST, known_reward] = ("correct",)
    """What replies are worth: the sum of NAME or NAME=WEIGHT, each correct, format, length,
    FILE.py:FUNCTION or a reward model's directory."""
    reward_seconds: Annotated[float, above_0, FREE] = 60.0
    """How long a function of yours may take for one call: at most 64 replies."""


@dataclass(kw_only=True)
class Sampling:
    """Rollouts."""

    # Of the stages that have no such flags.
    advantage: ClassVar[Advantage] = "plain"
    refill: ClassVar[bool] = False
    passes: ClassVar[int] = 1
    group_size: Annotated[int, FIRST, from_1] = 8
    """Replies sampled for each prompt; --batch_size is the number of prompts."""
    max_new_tokens: Annotated[int, FIRST, from_1] = 256
    """Longest reply."""
    temperature: Annotated[float, above_0] = 1.0
    """Of the samples. There is no top-k or top-p: they would sample from another distribution than
    the one that is trained."""
    truncated: Truncated = "penalty"
    """Replies cut at --max_new_tokens: penalty lowers their reward by 1, mask does not train them,
    score takes them as they are."""
    updates: Annotated[int, from_1] = 1
    """Optimizer steps of a rollout; each trains its own share of the prompts. With 1 the policy
    that is trained is the one that sampled."""
    normalize: Normalize = "tokens"
    """What a loss is divided by: the step's trained tokens, each reply's own length (sequences), or
    a constant."""
    cohort: Annotated[int, from_1] = 64
    """Replies generated together; part of the recipe, so that any number of ranks samples the
    same."""
    keep_rollouts: Annotated[int, from_1, FREE] = 2
    """Rollout files kept: so many of the newest."""
    rollout_url: Annotated[str | None, server_root, FREE] = None
    """A running vLLM or SGLang server that samples instead, such as http://127.0.0.1:8000; it must
    see --out under the same path."""
    rollout_seconds: Annotated[float, above_0, FREE, With("rollout_url")] = 600.0
    """How long that server may be silent on the replies to one prompt."""


def policy_flaws(config: Any) -> list[str]:
    """Flags that do not go together."""
    found = named_twice(config.reward)
    if config.updates > config.batch_size:
        found.append(
            f"--updates {config.updates}: each trains its own share of the rollout's prompts, and "
            f"--batch_size {config.batch_size} are too few"
        )
    if config.reward_seconds >= config.rank_timeout and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        found.append(
            f"--reward_seconds {config.reward_seconds:g}: the other ranks wait no longer than "
            f"--rank_timeout {config.rank_timeout:g}; raise that above it"
        )
    return found + tuning_flaws(config)
