"""The flags of `whet demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whet.config import from_0


@dataclass
class Config:
    """A tiny base model becomes an assistant: data, pretraining, SFT, both measured."""

    out: Path = Path("runs/demo")
    """Folder to write; an earlier demo in it is replaced when the new one is complete."""
    all: bool = False
    """Go on to reward model, DPO and GRPO, and compare them: about 9 minutes."""
    seed: Annotated[int, from_0] = 0
    """Of the world, the weights and the order of the data."""
