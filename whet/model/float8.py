"""float8 products on Hopper and newer GPUs, through torchao.

The layers' matrix products, forward and backward, are done in 8-bit floating point with one scale a
tensor, found anew each time; weights stay float32. Embedding, norms, attention and head are left
alone. Faster only where matrices are large.
"""

import torch
from torch import nn

from whet.errors import UserError

HOPPER = (9, 0)
MULTIPLE = 16  # the sides of a float8 product must be multiples of it


def use_float8(model: nn.Module, device: torch.device, *, emulate: bool = False) -> None:
    """Replace the trained linear modules of the layers. `emulate` computes on any device, slowly,
    the numbers that float8 would give.

    Raises UserError where the device has no float8 products or torchao is not installed.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER):
        raise UserError(
            f"--float8: needs a CUDA device of compute capability 9.0 (Hopper) or newer, not "
            f"{device.type}; --precision bf16 runs everywhere"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError("--float8: torchao is not installed; pip install 'whet[cuda]'") from None

    def fits(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or not name.startswith("layers."):
            return False
        return module.weight.requires_grad and all(n % MULTIPLE == 0 for n in module.weight.shape)

    convert_to_float8_training(
        model, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulate)
    )
