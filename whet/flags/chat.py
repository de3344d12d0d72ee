"""The flags of `whet chat`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import POSITIONAL, Place, With, above_0, from_0, from_1, share
from whet.flags.use import Asked
from whet.hub import known_model


@dataclass(kw_only=True)
class Config(Asked):
    """Talk to a model."""

    run: Annotated[Place, POSITIONAL, known_model]
    """Run folder, model directory or `.pt` file."""
    prompt: str | None = None
    """Answer this once and leave; only the reply is printed."""
    raw: bool = False
    """Continue the text as it is, without a chat template, and show control tokens, too."""
    system: str | None = None
    """System message before the conversation."""
    temperature: Annotated[float, from_0] = 0.0
    """0 always takes the likeliest token; 1 samples from the model's own probabilities."""
    top_k: Annotated[int | None, from_1, With("temperature")] = None
    """Sample among the so many likeliest tokens only."""
    top_p: Annotated[float | None, above_0, share, With("temperature")] = None
    """Sample among the likeliest tokens that together have this probability only."""
    seed: Annotated[int, from_0] = 0
    """Seed of the sampling."""
    max_new_tokens: Annotated[int, from_1] = 512
    """Longest reply."""


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    if config.raw and config.system:
        return ["--system belongs to a conversation; --raw has none"]
    return []
