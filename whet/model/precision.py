"""In which precision matrix products run, and which one a device is fast in."""

import os

import torch

BF16_SWITCH = "WHET_BF16"
"""Environment variable that answers `multiplies_bf16` for a CPU: yes or no.

Child processes inherit it, so the tests can show on any machine what another one does.
"""


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 products; elsewhere they are emulated, many times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if answer := os.environ.get(BF16_SWITCH):
        return answer == "yes"
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def product_type(x: torch.Tensor) -> torch.dtype:
    """The type in which a linear layer would multiply `x` here: autocast's, or its own."""
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype
