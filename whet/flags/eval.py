"""The flags of `whet eval`."""

import os
from dataclasses import dataclass
from typing import Annotated

from whet.config import (
    POSITIONAL,
    InputDir,
    InputFile,
    OutputFile,
    PackedFile,
    Place,
    from_1,
    in_folder,
)
from whet.flags.choices import Device, Precision
from whet.hub import known_model


@dataclass
class Config:
    """Measure a model: loss on packed rows, accuracy on word problems."""

    run: Annotated[Place, POSITIONAL, known_model]
    """Run folder, model directory or `.pt` file."""
    gsm8k: InputFile | None = None
    """Problems to answer: GSM8K's test.jsonl, or SVAMP."""
    dev: PackedFile | None = None
    """Packed file to measure the loss on, made by `whet prepare`."""
    limit: Annotated[int | None, from_1] = None
    """Only the first so many problems."""
    json: Annotated[OutputFile | None, in_folder] = None
    """Write the numbers here."""
    samples: Annotated[OutputFile | None, in_folder] = None
    """Write every question, reply, extracted and gold answer here, one JSON object a line."""
    max_new_tokens: Annotated[int, from_1] = 256
    """Longest reply."""
    batch_size: Annotated[int, from_1] = 32
    """Problems that are answered at once."""
    micro_rows: Annotated[int, from_1] = 4
    """Rows of the packed file in one forward."""
    template_kwargs: str | None = None
    """Variables of the chat template as a JSON object; default: those of the training data."""
    tokenizer: InputDir | None = None
    """Tokenizer directory; default: the model's own."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Precision of the weights; auto: bf16 on CUDA."""


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    found = []
    if config.gsm8k is None and config.dev is None:
        found.append("nothing to measure: give --gsm8k FILE, --dev FILE, or both")
    if config.samples and config.gsm8k is None:
        found.append("--samples: there are samples with --gsm8k only")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        found.append("whet eval runs in one process; start it without torchrun")
    return found
