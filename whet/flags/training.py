"""The flags that every training stage shares; a stage's `Config` adds its own to them.

Flags are the one place where dataclasses extend each other: those of a command must be flat, and
the same flag must mean the same everywhere. Each class is a group of the help, under the first line
of its docstring. Nothing but data is inherited.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from whet.config import (
    FIRST,
    FREE,
    PLACE,
    READ,
    InputDir,
    Place,
    With,
    Written,
    above_0,
    below_1,
    from_0,
    share,
    writable_folder,
)
from whet.files import PT
from whet.flags.choices import Device, Precision, Recompute, Schedule
from whet.hub import is_adapter, known_model


def parameters(pattern: str) -> str:
    """`all`, or `re:` and a regular expression that names parameters."""
    if pattern != "all" and not pattern.startswith("re:"):
        return "expected all, or re: and a regular expression"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"not a regular expression: {error}"
    return ""


@dataclass(kw_only=True)
class Model:
    """The model that is trained."""

    model: Annotated[Place, FIRST, known_model]
    """Model to start from: a directory, a `.pt` file, OWNER/NAME on the Hugging Face Hub, or an
    adapter's directory, to train that adapter further."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    tokenizer: InputDir | None = None
    """Tokenizer directory; by default --model's own."""
    chat_template: Annotated[str | None, PLACE] = None
    """chatml, plain or a file, for a base without chat tokens; the data must be made with it."""


@dataclass(kw_only=True)
class Tuning:
    """What of the model is trained."""

    train: Annotated[str, parameters] = "all"
    """What is trained: all, or re:EXPRESSION on parameter names, such as 're:layers[.]1[.]'."""
    lora_rank: Annotated[int | None, above_0] = None
    """Train a LoRA adapter of this rank instead of the model."""
    lora_alpha: Annotated[float, above_0] = 32.0
    """Scale of the adapter: alpha / rank (rsLoRA's alpha / sqrt(rank) is a larger alpha)."""
    lora_targets: str = "all-linear"
    """all-linear, or some of q,k,v,o,gate,up,down (other architectures: their modules' names)."""
    lora_dropout: Annotated[float, below_1] = 0.0
    """Dropout before the adapter."""
    lora_dora: bool = False
    """DoRA: train the lengths of the rows apart from their directions."""
    lora_4bit: bool = False
    """QLoRA: hold the frozen base in 4 bits (NF4), through bitsandbytes."""


@dataclass(kw_only=True)
class Optimizer:
    """Optimizer and batches."""

    lr: Annotated[float, FIRST, above_0] = 1e-5
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after the warm-up; wsd holds it, then decays in the last fifth."""
    warmup: Annotated[float, from_0] = 0.03
    """Warm-up: a fraction of the run if below 1, else a number of steps."""
    final_lr: Annotated[float, share] = 0.1
    """Learning rate at the end, as a fraction of --lr (constant ignores it)."""
    lr_groups: tuple[str, ...] = ()
    """Other learning rates by parameter name, as PATTERN=FACTOR, e.g. 're:^embed=0.1'."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """muon: Muon for the matrices, AdamW for the rest. adamw8bit: 8-bit moments."""
    beta2: Annotated[float, below_1] = 0.95
    """AdamW's decay of the squared-gradient average."""
    weight_decay: Annotated[float, from_0] = 0.0
    """Decoupled weight decay; norms, biases and embeddings have none."""
    clip: Annotated[float, from_0] = 1.0
    """Largest gradient norm over all parameters and ranks; 0 does not clip."""
    epochs: Annotated[float, FIRST, above_0] = 1.0
    """Passes over the data."""
    max_steps: Annotated[int | None, above_0] = None
    """Stop after so many optimizer steps, whatever --epochs says; the schedule ends there, too."""
    batch_size: Annotated[int, FIRST, above_0] = 16
    """Rows of an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: Annotated[int | None, above_0, FREE] = None
    """Rows of one forward pass; fewer need less memory and give the same numbers. Default: 4."""
    precision: Precision = "auto"
    """bf16: autocast over float32 weights. auto: bf16 where the hardware multiplies it natively."""
    seed: Annotated[int, from_0] = 0
    """Seed of the data order and of everything random."""

    @property
    def micro_rows(self) -> int:
        """--micro_batch_size, which has a value from the start of training on."""
        assert self.micro_batch_size is not None, "resolved before"
        return self.micro_batch_size


@dataclass(kw_only=True)
class Run:
    """Run folder, evaluation and saves."""

    out: Annotated[Path, FIRST, FREE, READ, writable_folder]
    """Run folder to write: metrics, resume state and, at the end, the model directory."""
    out_ckpt: Annotated[Path | None, FREE, Written(PT)] = None
    """Also write the final model as one `.pt` file here."""
    resume: Annotated[bool, FREE] = False
    """Continue the run in --out from its newest valid state, or start it if there is none."""
    eval_every: Annotated[int, from_0] = 200
    """Evaluate each so many steps, besides the start and the end; 0: only then."""
    samples: Annotated[int, from_0] = 3
    """Replies generated at each evaluation, into samples.jsonl."""
    save_every: Annotated[int, from_0, FREE] = 200
    """Save the resume state each so many steps; 0: only when interrupted."""
    keep: Annotated[int, above_0, FREE] = 2
    """Resume states kept: the newest so many."""
    save_async: Annotated[bool, FREE] = True
    """Write resume states while training goes on; needs a second copy of the state in memory."""
    on_spike: Annotated[Literal["skip", "stop"], FREE] = "skip"
    """What to do when a loss or gradient is not finite or its norm far outside its recent range."""
    overfit_rows: Annotated[int | None, above_0] = None
    """Train on the first so many rows only: the mechanics check, whose loss must fall to near 0."""
    wandb_project: Annotated[str | None, FREE] = None
    """Also log to this Weights & Biases project."""
    profile: Annotated[bool, FREE] = False
    """Write a trace of a few steps, for Perfetto, and report what took the most time."""
    quiet: Annotated[bool, FREE] = False
    """Print nothing but problems."""


@dataclass(kw_only=True)
class Machine:
    """Machine."""

    device: Annotated[Device, FREE] = "auto"
    """Where to train."""
    shard: Annotated[bool, FREE] = False
    """Shard weights, gradients and optimizer over the ranks (FSDP2); the default is DDP."""
    rank_timeout: Annotated[float, above_0, FREE] = 600.0
    """Seconds after which a rank that waits for a dead or stuck one gives up."""
    grace_seconds: Annotated[float, from_0, FREE] = 25.0
    """After SIGTERM or SIGINT: time to save and leave before leaving without saving."""
    compile: Annotated[bool, FREE] = False
    """Compile each layer with torch.compile."""
    float8: bool = False
    """Multiply the layers' matrices in float8: on Hopper GPUs and newer, with torchao."""


@dataclass(kw_only=True)
class Memory:
    """Memory."""

    recompute: Annotated[Recompute, FREE] = "none"
    """Recompute activations in the backward pass instead of keeping them: less memory, more
    work."""
    auto: Annotated[bool, FREE] = False
    """Measure first, as `whet plan` does, and take its --micro_batch_size and --recompute."""
    memory_gb: Annotated[float | None, above_0, FREE, With("auto")] = None
    """Memory that --auto may use on a rank; by default what there is."""


@dataclass(kw_only=True)
class TrainSettings(Machine, Run, Optimizer):
    """Flags of the optimizer loop, the run folder and the machine."""


def tuning_flaws(config: Any) -> list[str]:
    """What speaks against the flags of a stage that trains a model, before anything is opened; of a
    model on the Hub more is known when it is here."""
    found = sharding_flaws(config) if config.shard else []
    path = Path(config.model)
    if path.exists():
        found += unfit_flags(config, path if is_adapter(path) else None)
    return found


def sharding_flaws(config: Any) -> list[str]:
    """What of these flags speaks against `--shard`."""
    found = []
    if hasattr(config, "critic"):
        found.append("--shard: policy and critic are two models; leave it out, or use whet grpo")
    elif getattr(config, "kl", 0.0):
        found.append("--kl and --shard exclude each other: the reference is a model of each rank")
    if hasattr(config, "centre") and config.lora_rank is not None:
        found.append("--shard: a reward model's adapter is merged on saving; leave out one of both")
    if getattr(config, "lora_4bit", False):
        found.append("--lora_4bit and --shard exclude each other: packed weights can't be sharded")
    if config.optimizer == "adamw8bit":
        found.append("--optimizer adamw8bit: its blocks can't be sharded; leave out --shard")
    return found


def lighter(config: Any) -> list[str]:
    """By what a new run would need less memory than one with these flags, as far as it takes it."""
    found = [] if sharding_flaws(config) else ["--shard on more ranks"]
    if config.optimizer == "adamw" and not config.shard:
        found.append("--optimizer adamw8bit")
    if getattr(config, "lora_rank", 0) is None:
        adapted, path = dataclasses.replace(config, lora_rank=16), Path(config.model)
        flaws = unfit_flags(adapted, path if path.exists() and is_adapter(path) else None)
        if not flaws and not (config.shard and sharding_flaws(adapted)):
            found.append("--lora_rank 16")
    return found or ["a smaller model"]


def unfit_flags(config: Any, adapter: Path | None) -> list[str]:
    """Flags of an adapter that would do nothing, or contradict the adapter itself."""
    found = []
    fields = [f for f in dataclasses.fields(config) if f.name.startswith("lora_")]
    given = [f.name for f in fields if getattr(config, f.name) != f.default]
    given = [name for name in given if name != "lora_4bit"]
    trains_adapter = adapter is not None or config.lora_rank is not None
    if config.lora_4bit and not trains_adapter:
        found.append("--lora_4bit: needs an adapter to train; add --lora_rank 16")
    if config.train != "all" and trains_adapter:
        found.append("--train and an adapter exclude each other: the base is frozen")
    if config.out_ckpt is not None and trains_adapter:
        found.append(
            "--out_ckpt: an adapter is trained, which is saved as a directory; afterwards: whet "
            "export RUN --merge --to pt --out FILE"
        )
    if adapter is not None:
        found += [
            f"--{name}: {adapter} is trained further, with its own settings; leave this out"
            for name in given
        ]
    elif config.lora_rank is None:
        found += [f"--{name}: there is no adapter; add --lora_rank 16" for name in given]
    return found
