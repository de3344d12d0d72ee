"""The flags of `whet compare`."""

import os
from dataclasses import dataclass
from typing import Annotated

from whet.config import (
    POSITIONAL,
    InputFile,
    OutputFile,
    PackedFile,
    Place,
    above_0,
    from_0,
    from_1,
    in_folder,
)
from whet.flags.choices import Device, Precision
from whet.flags.policy import known_reward, named_twice
from whet.hub import known_model


@dataclass
class Config:
    """What each stage has changed: several models on the same problems, pairs and data.

    whet compare runs/base runs/sft runs/dpo --gsm8k test.jsonl --samples 8 --html page.html
    """

    models: Annotated[tuple[Place, ...], POSITIONAL, known_model]
    """Run folders, model directories or Hub names, in the order in which they were made."""
    gsm8k: InputFile | None = None
    """Problems to answer: GSM8K's test.jsonl, SVAMP, or prompts with a gold number."""
    limit: Annotated[int | None, from_1] = None
    """Only the first so many problems."""
    samples: Annotated[int, from_0] = 0
    """Also sample each problem so often: pass@1 to pass@samples, and how far a model has moved."""
    temperature: Annotated[float, above_0] = 1.0
    """Of the samples."""
    dev: PackedFile | None = None
    """Packed file to measure the loss on."""
    pairs: PackedFile | None = None
    """Packed file of preference pairs: how often the chosen reply is preferred."""
    reward: Annotated[tuple[str, ...], known_reward] = ()
    """Mean rewards of the greedy replies, as in `whet grpo`; a reward model's directory, too."""
    max_new_tokens: Annotated[int, from_1] = 256
    """Longest reply."""
    batch_size: Annotated[int, from_1] = 32
    """Problems that are answered at once."""
    seed: Annotated[int, from_0] = 0
    """Seed of the samples."""
    json: Annotated[OutputFile | None, in_folder] = None
    """Write the numbers and replies here."""
    html: Annotated[OutputFile | None, in_folder] = None
    """Write a page with the curve over the stages, and replies side by side, here."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Precision of the weights; auto: bf16 on CUDA."""


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    found = named_twice(config.reward)
    if not config.models:
        found.append("no models: give run folders, as in whet compare runs/base runs/sft")
    if not (config.gsm8k or config.dev or config.pairs):
        found.append("nothing to compare: give --gsm8k FILE, --dev FILE or --pairs FILE")
    for name in ("samples", "reward"):
        if getattr(config, name) and config.gsm8k is None:
            found.append(f"--{name}: needs the problems of --gsm8k FILE")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        found.append("whet compare runs in one process; start it without torchrun")
    return found
