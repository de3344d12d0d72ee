"""The precisions in which a device multiplies fast: bf16 and, on newer GPUs, float8.

float8 is through torchao: the layers' matrix products, forward and backward, are done in 8-bit
floating point with one scale a tensor, found for each product; weights stay float32. Embedding,
norms, attention and head are left alone. Faster only where matrices are large.
"""

import logging
import os
import warnings

import torch
from torch import nn

from whet.errors import UserError

BF16_SWITCH = "WHET_BF16"
"""Environment variable that answers `multiplies_bf16` for a CPU: yes or no.

Child processes inherit it, so the tests can show on any machine what another one does.
"""
HOPPER = (9, 0)
MULTIPLE = 16  # the sides of a float8 product must be multiples of it


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 products; elsewhere they are emulated, many times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if answer := os.environ.get(BF16_SWITCH):
        return answer == "yes"
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def quiet_torchao() -> None:
    """Keep torchao, when it is imported, from printing which of its kernels do not fit this machine
    and what of torch it uses that is to change: nothing that a user could mend."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")


def use_float8(model: nn.Module, device: torch.device) -> None:
    """Replace the trained linear modules of the layers.

    Raises UserError where the device has no float8 products or torchao is not installed.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        raise UserError(
            f"--float8: needs a CUDA device of compute capability 9.0 (Hopper) or newer, not "
            f"{device.type}; --precision bf16 runs everywhere"
        )
    quiet_torchao()
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise UserError("--float8: torchao is not installed; pip install 'whet[cuda]'") from None

    def fits(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or not name.startswith("layers."):
            return False
        return module.weight.requires_grad and all(n % MULTIPLE == 0 for n in module.weight.shape)

    convert_to_float8_training(model, module_filter_fn=fits)
