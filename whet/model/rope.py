"""Rotary positions: from a `Rope` to the cosine and sine of each token.

The schemes that stretch a model to longer texts only change the frequencies:
linear (Chen et al. 2023), dynamic NTK, llama3 (Llama 3.1 model card), yarn (Peng et al. 2023,
arXiv 2309.00071) and longrope (Ding et al. 2024, arXiv 2402.13753).

Two of them, dynamic and longrope, look at how long the text is. Whet asks that of each document,
not of the batch: what a document gives must not depend on its neighbours.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from whet.model.config import Rope

BY_LENGTH = ("dynamic", "longrope")
"""Kinds whose frequencies depend on the length of the text."""


def cos_sin(rope: Rope, positions: Tensor, lengths: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine (M, 1, size), float32, for tokens at `positions` (M,).

    `lengths` (M,) is the length of the text each token stands in, as far as it is known; every
    position is below `reach`.
    """
    if rope.kind in BY_LENGTH:
        angles = positions.double()[:, None] * _frequencies(rope, lengths).double()
        half = torch.stack((angles.cos(), angles.sin())).mul_(rope.output_scale).float()
    else:
        rows = max(256, 1 << (reach - 1).bit_length())  # a few sizes, whatever the batches
        half = _table(rope, rows, positions.device)[:, positions]
    cos, sin = half[:, :, None, :]
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@lru_cache(maxsize=16)
def _table(rope: Rope, rows: int, device: torch.device) -> Tensor:
    """(2, rows, size / 2) float32: cosine and sine of each position, rounded from float64.

    Frequencies are the float32 numbers that transformers has, so that its angles are ours but for
    the rounding of its product. numpy's functions run in one thread: see `whet/model/__init__.py`.
    """
    frequencies = _frequencies(rope, torch.zeros(0, dtype=torch.long)).double().numpy()
    angles = np.arange(rows)[:, None] * frequencies
    half = np.stack((np.cos(angles), np.sin(angles))) * rope.output_scale
    with torch.inference_mode(False):  # what is kept must serve a training step, too
        return torch.from_numpy(half.astype(np.float32)).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `size` numbers of each head of `x` (M, heads, H).

    Number i is paired with number i + size / 2 ("rotate half"), as in all model directories of the
    transformers library. `roll` brings each number's partner to its place.
    """
    size = cos.shape[-1]
    if x.device.type == "cpu":  # its attention takes float32, as cosine and sine are
        x = x.to(torch.promote_types(x.dtype, cos.dtype))
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, rest = x[..., :size], x[..., size:]
    turned = turned * cos + turned.roll(size // 2, -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def frequency_factors(rope: Rope) -> Tensor:
    """(size / 2,): what the plain frequencies of `rope` are divided by."""
    positions = torch.zeros(0, dtype=torch.long)
    plain = Rope(theta=rope.theta, size=rope.size)
    return _frequencies(plain, positions) / _frequencies(rope, positions)


def _frequencies(rope: Rope, lengths: Tensor) -> Tensor:
    """Radians per position: (size / 2,), or (M, size / 2) where they depend on the text's
    length."""
    powers = torch.arange(0, rope.size, 2, device=lengths.device, dtype=torch.float32) / rope.size
    plain = 1.0 / rope.theta**powers
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    if rope.kind == "dynamic":
        longest = lengths.clamp(min=rope.original_positions).to(torch.float32)[:, None]
        stretch = rope.factor * longest / rope.original_positions - (rope.factor - 1)
        return 1.0 / (rope.theta * stretch ** (rope.size / (rope.size - 2))) ** powers
    if rope.kind == "longrope":
        short, long = (plain / plain.new_tensor(f) for f in (rope.short_factors, rope.long_factors))
        return torch.where(lengths[:, None] > rope.original_positions, long, short)
    return plain


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Slow waves are stretched by `factor`, fast ones kept, those between interpolated."""
    turns = rope.original_positions * plain / (2 * math.pi)  # in the text of the pretraining
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * plain / rope.factor + keep * plain


def _yarn(rope: Rope, plain: Tensor) -> Tensor:
    """As llama3, but the ramp between kept and stretched waves is linear in the index."""

    def index_of(turns: float) -> float:
        wavelength = rope.original_positions / (turns * 2 * math.pi)
        return rope.size * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    ramp = torch.arange(rope.size // 2, device=plain.device, dtype=torch.float32) - low
    stretch = (ramp / max(high - low, 0.001)).clamp(0, 1)
    return stretch * plain / rope.factor + (1 - stretch) * plain
