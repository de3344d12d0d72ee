"""The flags of `whet plan`."""

from dataclasses import dataclass
from pathlib import Path

from whet.flags import sft
from whet.flags.sft import flaws

__all__ = ["Config", "flaws"]


@dataclass(kw_only=True)
class Config(sft.Config):
    """Measure a few steps of `whet sft` with these flags, and propose settings that fit."""

    out: Path = Path("runs/sft")
    """Run folder of the run that is planned: it gets plan.json, for the report of the run."""
    json: bool = False
    """Print the plan as one JSON object."""
