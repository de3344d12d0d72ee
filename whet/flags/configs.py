"""The flags of `whet configs`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import POSITIONAL


@dataclass
class Config:
    """List the configurations that come with Whet, or print one.

    whet configs qwen3_0.6b_lora_1x24gb > mine.toml
    whet sft --config qwen3_0.6b_lora_1x24gb --data data/sft_packed.h5 --out runs/sft
    """

    name: Annotated[str | None, POSITIONAL] = None
    """Print this one."""
