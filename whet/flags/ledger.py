"""The flags of `whet ledger`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import POSITIONAL, InputDir


@dataclass
class Config:
    """Look up what a run trained on, and when."""

    run: Annotated[InputDir, POSITIONAL]
    """The run folder."""
    step: int | None = None
    """List the documents of this step, counted from 1 as in metrics.jsonl."""
    document: str | None = None
    """List the steps that saw this document, as FILE:LINE; the file's end of name is enough."""
