"""Flags of every stage that starts from a model: which one, and what of it is trained.

Beside `TrainSettings` these are the bases of the stages' `Config`s: flags are flat, and the same
flag means the same everywhere. Nothing but data is inherited.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Recompute = Literal["none", "selective", "full"]


@dataclass(kw_only=True)
class Base:
    """The model that a stage starts from."""

    model: str
    """Model to start from: a directory, a `.pt` file, OWNER/NAME on the Hugging Face Hub, or an
    adapter's directory, to train that adapter further."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    tokenizer: Path | None = None
    """Tokenizer directory; by default --model's own."""
    chat_template: str | None = None
    """chatml, plain or a file, for a base without chat tokens; the data must be made with it."""


@dataclass(kw_only=True)
class Tuning:
    """What of the model is trained, and at what price in memory."""

    train: str = "all"
    """What is trained: all, or re:EXPRESSION on parameter names, such as 're:layers[.]1[.]'."""
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank instead of the model."""
    lora_alpha: float = 32.0
    """Scale of the adapter: alpha / rank."""
    lora_targets: str = "all-linear"
    """all-linear, or some of q,k,v,o,gate,up,down (other architectures: their modules' names)."""
    lora_dropout: float = 0.0
    """Dropout before the adapter."""
    lora_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    lora_dora: bool = False
    """DoRA: train the lengths of the rows apart from their directions."""
    lora_4bit: bool = False
    """QLoRA: hold the frozen base in 4 bits (NF4), through bitsandbytes."""
    recompute: Recompute = "none"
    """Make activations again in the backward pass, not keep them: less memory, more work."""
