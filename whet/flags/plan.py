"""The flags of `whet plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whet.config import above_0
from whet.flags import sft
from whet.flags.sft import flaws

__all__ = ["Config", "flaws"]


@dataclass(kw_only=True)
class Config(sft.Config):
    """Measure a few steps of `whet sft` with these flags, and propose settings that fit."""

    out: Path = Path("runs/sft")
    """Run folder of the run that is planned: it gets plan.json, for the report of the run."""
    memory_gb: Annotated[float | None, above_0] = None
    """Memory that a rank may use; by default what there is."""
    json: bool = False
    """Print the plan as one JSON object."""
