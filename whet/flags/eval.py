"""The flags of `whet eval`."""

import os
from dataclasses import dataclass
from typing import Annotated

from whet.config import (
    POSITIONAL,
    OutputFile,
    PackedFile,
    Place,
    With,
    from_1,
    in_folder,
)
from whet.flags.use import GSM8K, Asked, Problems
from whet.hub import known_model


@dataclass(kw_only=True)
class Config(Asked, Problems):
    """Measure a model: loss on packed rows, accuracy on word problems."""

    run: Annotated[Place, POSITIONAL, known_model]
    """Run folder, model directory or `.pt` file."""
    dev: PackedFile | None = None
    """Packed file to measure the loss on, made by `whet prepare`."""
    json: Annotated[OutputFile | None, in_folder] = None
    """Write the numbers here."""
    samples: Annotated[OutputFile | None, in_folder, GSM8K] = None
    """Write every question, reply, extracted and gold answer here, one JSON object a line."""
    micro_rows: Annotated[int, from_1, With("dev")] = 4
    """Rows of the packed file in one forward."""


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    found = []
    if config.gsm8k is None and config.dev is None:
        found.append("nothing to measure: give --gsm8k FILE, --dev FILE, or both")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        found.append("whet eval runs in one process; start it without torchrun")
    return found
