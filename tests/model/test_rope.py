"""Rotary tables: as exact as float32 holds, at any position."""

import math

import pytest
import torch

from whet.model.config import Rope
from whet.model.rope import cos_sin, rotate

SCALED = {"factor": 8.0, "original_positions": 8192}
ROPES = [
    Rope(10_000.0, 8),
    Rope(10_000.0, 6, kind="linear", factor=4.0),
    Rope(500_000.0, 16, kind="llama3", **SCALED),
    Rope(10_000.0, 16, kind="yarn", output_scale=1.2, **SCALED),
    Rope(10_000.0, 8, kind="dynamic", factor=2.0, original_positions=64),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
def test_far_positions_are_exact(rope):
    """Angles of hundred thousand radians in float32 would be wrong by 4e-3."""
    positions = torch.tensor([0, 1, 255, 256, 131_071, 7])
    lengths = torch.full_like(positions, 50)
    cos, sin = cos_sin(rope, positions, lengths, 131_072)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (6, 1, rope.size)
    first = 1.0 / rope.factor if rope.kind == "linear" else 1.0  # radians per position
    for row, position in enumerate(positions.tolist()):
        angle = position * first
        assert cos[row, 0, 0].item() == pytest.approx(math.cos(angle) * rope.output_scale, abs=2e-7)
        assert sin[row, 0, 0].item() == pytest.approx(
            -math.sin(angle) * rope.output_scale, abs=2e-7
        )
    near = cos_sin(rope, positions[:3], lengths[:3], 256)
    assert torch.equal(near[0], cos[:3]), "a table of another length holds the same numbers"


def test_a_rotation_turns_pairs_and_keeps_the_rest():
    rope = Rope(10_000.0, 4)
    cos, sin = cos_sin(rope, torch.tensor([3]), torch.tensor([4]), 4)
    x = torch.arange(1.0, 7.0).view(1, 1, 6)
    y = rotate(x, cos, sin)[0, 0]
    for i, frequency in enumerate((1.0, 0.01)):
        angle, (a, b) = 3 * frequency, (x[0, 0, i].item(), x[0, 0, i + 2].item())
        assert y[i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
        assert y[i + 2].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-5)
    assert y[4:].tolist() == [5.0, 6.0]
