"""The flags of `whet export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from whet.config import POSITIONAL, InputDir, Place
from whet.flags.choices import SaveDtype
from whet.hub import known_model


@dataclass
class Config:
    """Write a model for other tools."""

    run: Annotated[Place, POSITIONAL, known_model]
    """Run folder, model directory, adapter, `.pt` file or Hub name."""
    out: Path
    """What to write: a directory, or for `--to pt` a file."""
    to: Literal["hf", "pt", "gguf", "gguf-ready"] = "hf"
    """hf: a model directory; pt: one file; gguf: a directory with a file for llama.cpp and a
    Modelfile for Ollama; gguf-ready: a directory that llama.cpp's own converter takes."""
    merge: bool = False
    """Fold an adapter into its base; the result is a whole model."""
    dtype: SaveDtype | Literal["q8_0"] = "same"
    """Precision of the written weights; same: that of the model, of an adapter its base's. q8_0: 8
    bits and a scale for each 32 numbers, with --to gguf."""
    tokenizer: InputDir | None = None
    """Tokenizer directory; default: the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a Hub name."""


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    if config.dtype == "q8_0" and config.to != "gguf":
        return [
            f"--dtype q8_0: a precision of GGUF files, --to {config.to} has none; add --to gguf"
        ]
    return []
