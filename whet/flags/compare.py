"""The flags of `whet compare`."""

import os
from dataclasses import dataclass
from typing import Annotated

from whet.config import (
    POSITIONAL,
    OutputFile,
    PackedFile,
    Place,
    With,
    above_0,
    from_0,
    in_folder,
)
from whet.flags.policy import known_reward, named_twice
from whet.flags.use import GSM8K, Problems, Where
from whet.hub import known_model


@dataclass(kw_only=True)
class Config(Where, Problems):
    """What each stage has changed: several models on the same problems, pairs and data.

    whet compare runs/base runs/sft runs/dpo --gsm8k test.jsonl --samples 8 --html page.html
    """

    models: Annotated[tuple[Place, ...], POSITIONAL, known_model]
    """Run folders, model directories or Hub names, in the order in which they were made."""
    samples: Annotated[int, from_0, GSM8K] = 0
    """Also sample each problem so often: pass@1 to pass@samples, and how far a model has moved."""
    temperature: Annotated[float, above_0, With("samples")] = 1.0
    """Of the samples."""
    dev: PackedFile | None = None
    """Packed file to measure the loss on."""
    pairs: PackedFile | None = None
    """Packed file of preference pairs: how often the chosen reply is preferred."""
    reward: Annotated[tuple[str, ...], known_reward, GSM8K] = ()
    """Mean rewards of the greedy replies, as in `whet grpo`; a reward model's directory, too."""
    reward_seconds: Annotated[float, above_0] = 600.0
    """How long a reward function of yours may take for one call: at most 64 replies."""
    seed: Annotated[int, from_0] = 0
    """Seed of the samples."""
    json: Annotated[OutputFile | None, in_folder] = None
    """Write the numbers and replies here."""
    html: Annotated[OutputFile | None, in_folder] = None
    """Write a page with the curve over the stages, and replies side by side, here."""


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    found = named_twice(config.reward)
    if not config.models:
        found.append("no models: give run folders, as in whet compare runs/base runs/sft")
    if not (config.gsm8k or config.dev or config.pairs):
        found.append("nothing to compare: give --gsm8k FILE, --dev FILE or --pairs FILE")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        found.append("whet compare runs in one process; start it without torchrun")
    return found
