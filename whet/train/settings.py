"""The settings of a training run that every stage shares; a stage's `Config` adds its own to them.

This is the one place where dataclasses extend each other: flags of all stages must be flat, and the
same flag must mean the same everywhere. What a stage reads stands in its `Inputs`, a second base,
so that its help begins with it. Nothing but data is inherited.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Schedule = Literal["cosine", "linear", "constant", "wsd"]


@dataclass(kw_only=True)
class TrainSettings:
    """Flags of the optimizer loop, the run folder and the machine."""

    out: Path
    """Run folder to write: metrics, resume state and, at the end, the model directory."""
    out_ckpt: Path | None = None
    """Also write the final model as one `.pt` file here."""
    save_dtype: Literal["same", "bfloat16", "float16", "float32"] = "same"
    """Precision of the written model; same: its base's own. Training itself holds float32."""
    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after the warm-up; wsd holds it, then decays in the last fifth."""
    warmup: float = 0.03
    """Warm-up: a fraction of the run if below 1, else a number of steps."""
    final_lr: float = 0.1
    """Learning rate at the end, as a fraction of --lr (constant ignores it)."""
    lr_groups: tuple[str, ...] = ()
    """Other learning rates by parameter name, as PATTERN=FACTOR, e.g. 're:^embed=0.1'."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """muon: Muon for the matrices, AdamW for the rest. adamw8bit: 8-bit moments."""
    beta1: float = 0.9
    """AdamW's decay of the gradient average (and Muon's AdamW part)."""
    beta2: float = 0.95
    """AdamW's decay of the squared-gradient average."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms, biases and embeddings have none."""
    clip: float = 1.0
    """Largest gradient norm over all parameters and ranks; 0 does not clip."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, whatever --epochs says; the schedule ends there, too."""
    batch_size: int = 16
    """Rows of an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int | None = None
    """Rows of one forward pass; fewer need less memory and give the same numbers. Default: 4."""
    overfit_rows: int | None = None
    """Train on the first so many rows only: the mechanics check, whose loss must fall to near 0."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16: autocast over float32 weights. auto: bf16 where the hardware multiplies it natively."""
    seed: int = 0
    """Seed of the data order and of everything random."""
    eval_every: int = 200
    """Evaluate each so many steps, besides the start and the end; 0: only then."""
    samples: int = 3
    """Replies generated at each evaluation, into samples.jsonl."""
    save_every: int = 200
    """Save the resume state each so many steps; 0: only when interrupted."""
    keep: int = 2
    """Resume states kept: the newest so many."""
    save_async: bool = True
    """Write resume states while training goes on; needs a second copy of the state in memory."""
    resume: bool = False
    """Continue the run in --out from its newest valid state, or start it if there is none."""
    on_spike: Literal["skip", "stop"] = "skip"
    """What to do when a loss or gradient is not finite or its norm far outside its recent range."""
    grace_seconds: float = 25.0
    """After SIGTERM or SIGINT: time to save and leave before leaving without saving."""
    shard: bool = False
    """Shard weights, gradients and optimizer over the ranks (FSDP2); the default is DDP."""
    rank_timeout: float = 600.0
    """Seconds after which a rank that waits for a dead or stuck one gives up."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    float8: bool = False
    """Multiply the layers' matrices in float8: on Hopper GPUs and newer, with torchao."""
    profile: bool = False
    """Write a trace of a few steps, for Perfetto, and tell what took the most time."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""
    quiet: bool = False
    """Print nothing but problems."""


# What may differ between a run and its continuation, because the numbers do not depend on it.
FREE_ON_RESUME = frozenset(
    {
        "resume",
        "out",
        "out_ckpt",
        "micro_batch_size",
        "keep",
        "save_every",
        "save_async",
        "shard",
        "save_dtype",
    }
    | {"grace_seconds", "rank_timeout", "device", "compile", "wandb_project", "quiet", "on_spike"}
    | {"auto", "memory_gb", "recompute", "profile"}
)
