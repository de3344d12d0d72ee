"""The flags of `whet pretrain`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import FIRST, InputDir, Place, above_0, at_least, below_1, collected, from_0
from whet.data.reader import parse_sources
from whet.flags.training import TrainSettings, sharding_flaws

SMALLEST_VOCABULARY = 257
"""Of a byte-level tokenizer: the bytes and the end of a text."""


@dataclass(kw_only=True)
class Text:
    """Text and tokenizer."""

    data: Annotated[tuple[Place, ...], FIRST]
    """Text files (.txt, or .jsonl with `text`; also .gz and .zst); FILE:WEIGHT repeats or thins."""
    tokenizer: InputDir | None = None
    """Tokenizer directory; by default a new byte-level BPE is learnt from the text."""


@dataclass(kw_only=True)
class Config(TrainSettings, Text):
    """Train a small base model on plain text."""

    vocab_size: int = 4096
    """Size of a new tokenizer."""
    dev_fraction: Annotated[float, below_1] = 0.02
    """Share of the rows that is held out for the dev loss; 0 for a text of a single row."""
    context_length: Annotated[int, at_least(2)] = 512
    """Tokens of a row, and the positions of the model."""
    width: Annotated[int, above_0] = 256
    """Width of the model."""
    layers: Annotated[int, above_0] = 6
    """Number of layers."""
    heads: Annotated[int, above_0] = 4
    """Attention heads."""
    kv_heads: Annotated[int | None, above_0] = None
    """Key/value heads; by default as many as heads."""
    tied: bool = True
    """Use the embedding as the output head, too."""
    lr: Annotated[float, FIRST, above_0] = 3e-3
    """Peak learning rate; small models bear more than large ones."""
    weight_decay: Annotated[float, from_0] = 0.1
    """Decoupled weight decay; norms, biases and embeddings have none."""


def flaws(config: Config) -> list[str]:
    """Sizes that make no model, and files that are not there."""
    found = sharding_flaws(config) if config.shard else []
    if config.heads > 0 and config.width % (2 * config.heads):
        found.append(f"--width {config.width}: must be a multiple of 2 x --heads {config.heads}")
    if config.kv_heads is not None and config.kv_heads > 0 and config.heads % config.kv_heads:
        found.append(f"--kv_heads {config.kv_heads}: must divide --heads {config.heads}")
    if config.tokenizer is None and config.vocab_size < SMALLEST_VOCABULARY:
        least = f"expected at least {SMALLEST_VOCABULARY}: the bytes and the end of a text"
        found.append(f"--vocab_size {config.vocab_size}: {least}")
    if not config.resume:  # a resumed run has packed its text already
        with collected(found):
            parse_sources(config.data)
    return found
