"""What parts of a model cost that can be counted, not measured."""

from collections.abc import Sequence

import torch

from whet.model.config import ModelConfig
from whet.model.decoder import Transformer
from whet.model.loss import CACHED_LOGITS, chunk_tokens


def attention_flops(config: ModelConfig, sizes: Sequence[int], *, again: bool) -> float:
    """Floating-point operations of attention itself, forward and backward, over documents of
    `sizes` tokens, all layers; 2 for each multiply-add.

    Two products in the forward pass (scores, and values by them) and four in the backward, each
    over the pairs of a token and one that it sees. `again`: the forward pass is made twice.
    """
    products = 2 * (3 + again)
    pairs = sum(
        seen_pairs(size, config.window(layer)) for layer in range(config.n_layers) for size in sizes
    )
    return 2.0 * products * config.n_heads * config.head_size * pairs


def seen_pairs(size: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included, in a document of `size` tokens."""
    near = min(size, window or size)
    return near * (near + 1) // 2 + (size - near) * near


def head_bytes(model: Transformer, trained: int, device: torch.device, halves: bool) -> int:
    """What `linear_cross_entropy` holds over `trained` tokens besides its results: the logits of a
    chunk, with `halves` in bf16. A GPU softmaxes all of them at once, in float32."""
    dtype, vocab = torch.bfloat16 if halves else torch.float32, model.config.vocab_size
    tokens = min(trained, chunk_tokens(vocab, device, dtype))
    at_once = tokens * vocab if device.type == "cuda" else max(vocab, CACHED_LOGITS)
    return tokens * vocab * dtype.itemsize + 4 * at_once * halves
