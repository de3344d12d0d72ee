"""The flags of `whet dpo`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from whet.config import FIRST, InputFile, PackedFile, above_0, from_0
from whet.flags.training import Memory, Model, TrainSettings, Tuning, tuning_flaws

Loss = Literal["dpo", "ipo", "simpo", "orpo", "kto"]
SMOOTHED = ("dpo", "simpo")
WITHOUT_REFERENCE = ("simpo", "orpo")


def below_half(value: float) -> str:
    """A share of wrong labels: with half of them wrong there is nothing to learn."""
    return "" if 0 <= value < 0.5 else "expected a number from 0 to below 0.5"


@dataclass(kw_only=True)
class Pairs:
    """Data."""

    data: Annotated[PackedFile, FIRST]
    """Packed file of preferences to train on, made by `whet prepare`."""
    dev: Annotated[PackedFile | None, FIRST] = None
    """Packed file of preferences to evaluate on."""


@dataclass(kw_only=True)
class Preference:
    """Loss."""

    loss: Annotated[Loss, FIRST] = "dpo"
    """Loss of a pair, see docs/dpo.md; kto also learns from single labelled replies."""
    beta: Annotated[float | None, FIRST, above_0] = None
    """How strongly the margin counts; larger stays nearer to the reference. Default: 0.1, of simpo
    2."""
    gamma: Annotated[float | None, from_0] = None
    """Margin that simpo asks for. Default: half of beta."""
    label_smoothing: Annotated[float, below_half] = 0.0
    """Share of pairs that are assumed to be the wrong way round (dpo, simpo)."""
    sft_weight: Annotated[float, from_0] = 0.0
    """Weight of the chosen reply's own loss a token, which keeps it likely; 1 is usual."""
    reference: InputFile | None = None
    """Reference log-probabilities that an earlier run has computed (its reference.safetensors)."""


@dataclass(kw_only=True)
class Config(Memory, TrainSettings, Tuning, Preference, Pairs, Model):
    """Train a model on pairs of a better and a worse reply (DPO and its relatives).

    whet dpo --model runs/sft --data data/preferences.h5 --dev data/preferences_dev.h5 \\
             --out runs/dpo --beta 0.1
    """

    lr: Annotated[float, FIRST, above_0] = 1e-6
    """Peak learning rate; of an adapter about ten times that."""


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    found = tuning_flaws(config)
    if config.gamma is not None and config.loss != "simpo":
        found.append(f"--gamma: --loss {config.loss} has no such margin; only simpo has")
    if config.label_smoothing and config.loss not in SMOOTHED:
        found.append(f"--label_smoothing: only {' and '.join(SMOOTHED)} can be smoothed")
    if config.reference is not None and config.loss in WITHOUT_REFERENCE:
        found.append(f"--reference: --loss {config.loss} needs none; leave it out")
    return found
