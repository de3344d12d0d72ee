"""The flags of `whet push`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import POSITIONAL, InputDir
from whet.hub import hub_name


@dataclass
class Config:
    """Put a model on the Hugging Face Hub, with a card that says where it comes from."""

    run: Annotated[InputDir, POSITIONAL]
    """Run folder, model directory, adapter, or what `whet export --to gguf` wrote."""
    name: Annotated[str, POSITIONAL, hub_name]
    """OWNER/NAME on the Hub; made if it is not there."""
    public: bool = False
    """Let everybody see a repository that is made now; else only its owner does."""
    revision: str | None = None
    """Branch to write to; default: main."""
