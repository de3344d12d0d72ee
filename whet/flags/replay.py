"""The flags of `whet replay`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import POSITIONAL, InputDir, from_1


@dataclass
class Config:
    """Run one step of a run again and report what it did."""

    run: Annotated[InputDir, POSITIONAL]
    """The run folder."""
    step: Annotated[int, from_1]
    """The step, counted from 1 as in metrics.jsonl."""
    json: bool = False
    """Print the record as JSON."""
