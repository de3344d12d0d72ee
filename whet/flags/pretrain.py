"""The flags of `whet pretrain`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import FIRST, InputDir, above_0, from_0
from whet.flags.training import TrainSettings


@dataclass(kw_only=True)
class Text:
    """Text and tokenizer."""

    data: Annotated[tuple[str, ...], FIRST]
    """Text files (.txt, or .jsonl with `text`; also .gz and .zst); FILE:WEIGHT repeats or thins."""
    tokenizer: InputDir | None = None
    """Tokenizer directory; by default a new byte-level BPE is learnt from the text."""


@dataclass(kw_only=True)
class Config(TrainSettings, Text):
    """Train a small base model on plain text."""

    vocab_size: int = 4096
    """Size of a new tokenizer."""
    dev_fraction: float = 0.02
    """Share of the rows that is held out for the dev loss; 0 for a text of a single row."""
    context_length: int = 512
    """Tokens of a row, and the positions of the model."""
    width: Annotated[int, above_0] = 256
    """Width of the model."""
    layers: Annotated[int, above_0] = 6
    """Number of layers."""
    heads: Annotated[int, above_0] = 4
    """Attention heads."""
    kv_heads: int | None = None
    """Key/value heads; by default as many as heads."""
    mlp_width: int | None = None
    """Width of the MLP; by default 8/3 of the width."""
    tied: bool = True
    """Use the embedding as the output head, too."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions."""
    lr: Annotated[float, FIRST, above_0] = 3e-3
    """Peak learning rate; small models bear more than large ones."""
    weight_decay: Annotated[float, from_0] = 0.1
    """Decoupled weight decay; norms, biases and embeddings have none."""
