"""The flags of `whet sft`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import FIRST, InputFile, PackedFile, With, above_0
from whet.flags.training import Memory, Model, TrainSettings, Tuning, tuning_flaws


@dataclass(kw_only=True)
class Data:
    """Data."""

    data: Annotated[PackedFile, FIRST]
    """Packed file to train on, made by `whet prepare`."""
    dev: Annotated[PackedFile | None, FIRST] = None
    """Packed file to evaluate on."""
    gsm8k_dev: InputFile | None = None
    """GSM8K-like problems to answer at each evaluation."""
    gsm8k_limit: Annotated[int, above_0, With("gsm8k_dev")] = 100
    """How many of them."""


@dataclass(kw_only=True)
class Config(Memory, TrainSettings, Tuning, Data, Model):
    """Fine-tune a base model on packed rows.

    whet sft --model runs/base --data data/sft_packed.h5 --dev data/sft_dev_packed.h5 \\
             --out runs/sft --lr 1e-5 --epochs 3
    """


flaws = tuning_flaws
