"""Activation checkpointing: activations are dropped in the forward pass and recomputed in the
backward.

`full` keeps only the input of each layer: the least memory, a third more work. `selective` keeps
the results of matrix products and attention and recomputes what lies between them (norms,
activations, rotations): a good part of the memory for little work.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from whet.flags.choices import Recompute

# Products and attention kernels, by the names under which autograd's dispatcher sees them.
EXPENSIVE = (
    "mm",
    "addmm",
    "bmm",
    "scaled_dot_product",
    "flash_attention",
    "varlen_attn",
    "flex_attention",
)


def run_layer(layer: Callable[..., Tensor], recompute: Recompute, *args: Any) -> Tensor:
    """`layer(*args)` under the given setting."""
    if recompute == "none" or not torch.is_grad_enabled():
        return layer(*args)
    if recompute == "full":
        return checkpoint(layer, *args, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    return checkpoint(layer, *args, use_reentrant=False, context_fn=contexts)


def keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of `selective`: products and attention stay, the rest is recomputed."""
    name = op.name().split("::")[-1]
    expensive = any(part in name for part in EXPENSIVE)
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE
