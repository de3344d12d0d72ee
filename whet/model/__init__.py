"""Models: what they are made of, how they are opened, and how their loss is computed.

On import each of MKL's vector functions is called once, in this thread. MKL (2024.2, which torch
2.13 brings) looks for a function's kernel in the first call. Where that call is made by several
threads at once, one of them can get the kernel of low accuracy: `exp` was wrong by up to 2e-3 and
`cos` by 1.5e-4, in that call alone, so that a run of many gave other weights
(https://github.com/pytorch/pytorch/issues/188792). Every command, worker and library user comes
through here before it computes.
"""

import torch

_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "exp", "expm1", "log", "log10", "log1p"),
    *("log2", "sin", "sqrt", "tan", "tanh"),
)
for _dtype in (torch.float32, torch.float64):
    for _name in _FUNCTIONS:
        getattr(torch, _name)(torch.ones(8, dtype=_dtype))
