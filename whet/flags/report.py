"""The flags of `whet report`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import POSITIONAL, InputDir, OutputFile


@dataclass
class Config:
    """Write one page of a run, or of several side by side: curves, samples, incidents, lineage.

    whet report runs/sft
    whet report runs/sft runs/lora --html both.html
    """

    runs: Annotated[tuple[InputDir, ...], POSITIONAL]
    """Run folders; a run that still trains is shown as far as it is."""
    html: OutputFile | None = None
    """The page; by default report.html in the first run's folder."""
    watch: bool = False
    """Write it again every few seconds, until the runs are finished or Ctrl-C."""
