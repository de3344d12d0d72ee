"""The flags of `whet reward`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import from_0
from whet.flags.dpo import Pairs
from whet.flags.training import Memory, Model, TrainSettings, Tuning, tuning_flaws


@dataclass(kw_only=True)
class Judging:
    """Loss."""

    margin: Annotated[float, from_0] = 0.0
    """How much of a pair's stored margin the chosen reply's reward must lie above the other's."""
    centre: Annotated[float, from_0] = 0.0
    """Weight of the term that holds the rewards' mean at 0; 0.01 is usual."""


@dataclass(kw_only=True)
class Config(Memory, TrainSettings, Tuning, Judging, Pairs, Model):
    """Train a reward model on pairs of a better and a worse reply.

    whet reward --model runs/sft --data data/preferences.h5 --dev data/preferences_dev.h5 \\
                --out runs/reward
    """


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    found = tuning_flaws(config)
    if config.lora_4bit:
        found.append("--lora_4bit: a reward model is saved whole, and 4 bits are not its weights")
    return found
