"""The flags of `whet sft`."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whet.config import FIRST, InputFile, PackedFile, above_0
from whet.files import PT, unwritable
from whet.flags.training import Memory, Model, TrainSettings, Tuning
from whet.hub import is_adapter


@dataclass(kw_only=True)
class Data:
    """Data."""

    data: Annotated[PackedFile, FIRST]
    """Packed file to train on, made by `whet prepare`."""
    dev: Annotated[PackedFile | None, FIRST] = None
    """Packed file to evaluate on."""
    gsm8k_dev: InputFile | None = None
    """GSM8K-like problems to answer at each evaluation."""
    gsm8k_limit: Annotated[int, above_0] = 100
    """How many of them."""


@dataclass(kw_only=True)
class Config(Memory, TrainSettings, Tuning, Data, Model):
    """Fine-tune a base model on packed rows.

    whet sft --model runs/base --data data/sft_packed.h5 --dev data/sft_dev_packed.h5 \\
             --out runs/sft --lr 1e-5 --epochs 3
    """


def flaws(config: Config) -> list[str]:
    """What speaks against flags and files before anything is opened."""
    found: list[str] = []
    path = Path(config.model)
    if path.exists():
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        found += unfit_flags(config, ranks, path if is_adapter(path) else None)
    if config.out_ckpt is not None:
        others = [config.data, config.dev, config.gsm8k_dev, config.tokenizer, config.out]
        found += unwritable("--out_ckpt", config.out_ckpt, [config.model, *others], PT)
    return found


def unfit_flags(config: Config, ranks: int, adapter: Path | None) -> list[str]:
    """Flags of an adapter that would not do anything, or say otherwise than the adapter itself."""
    found = []
    if config.lora_4bit and config.shard and ranks > 1:
        found.append("--lora_4bit and --shard exclude each other: packed weights can't be sharded")
    fields = [f for f in dataclasses.fields(Config) if f.name.startswith("lora_")]
    given = [f.name for f in fields if getattr(config, f.name) != f.default]
    given = [name for name in given if name != "lora_4bit"]
    trains_adapter = adapter is not None or config.lora_rank is not None
    if config.lora_4bit and not trains_adapter:
        found.append("--lora_4bit: needs an adapter to train; add --lora_rank 16")
    if config.train != "all" and trains_adapter:
        found.append("--train and an adapter exclude each other: the base is frozen")
    if adapter is not None:
        found += [
            f"--{name}: {adapter} is trained further, with its own settings; leave this out"
            for name in given
        ]
    elif config.lora_rank is None:
        found += [f"--{name}: there is no adapter; add --lora_rank 16" for name in given]
    return found
