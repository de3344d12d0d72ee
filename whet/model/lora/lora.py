"""LoRA: small trained matrices beside frozen ones.

y = W x + s B A x, with A (r, inputs) random and B (outputs, r) zero at first, so that training
starts from the base (Hu et al. 2021). s = alpha / r, or with rsLoRA alpha / sqrt(r), which keeps
the step's size when r grows (Kalajdzievski 2023). DoRA trains the length of each row of W + s B A
apart from its direction (Liu et al. 2024). The adapter's numbers are float32, the base may be
bfloat16 or 4-bit.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.errors import UserError
from whet.model.decoder import Transformer
from whet.model.embedding import merge_rows, train_rows

_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_MAMBAS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LoRA:
    """The settings of an adapter."""

    rank: int = 16
    alpha: float = 32.0
    targets: str = "all-linear"
    """`all-linear`, or some of q,k,v,o,gate,up,down (of another architecture: the last names of
    its linear modules) joined by commas."""
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """A frozen linear layer with its adapter."""

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, dropout: float, dora: bool
    ) -> None:
        super().__init__()
        if dora and type(base) is not nn.Linear:
            raise UserError("--lora_4bit: DoRA needs the rows of the base; 4-bit ones have none")
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.dropout = dropout
        self.off = False
        """Whether the layer gives what its base alone gives, see `without_adapters`."""
        device = base.weight.device
        self.a = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.magnitude: nn.Parameter | None = None
        if dora:
            self.magnitude = nn.Parameter(base.weight.detach().float().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        y = self.base(x)
        if self.off:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        low = F.linear(dropped.to(self.a.dtype), self.a)
        change = F.linear(low, self.b) * self.scale
        if self.magnitude is not None:
            ratio = self.magnitude / self._row_norms()
            straight = y if self.base.bias is None else y - self.base.bias
            if self.dropout:
                straight = F.linear(dropped, self.base.weight)
            change = (ratio - 1.0) * straight + ratio * change
        return y + change.to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one matrix (outputs, inputs) that does the same, in float32."""
        weight = self.base.weight.float() + self.scale * (self.b @ self.a)
        if self.magnitude is not None:
            weight = weight * (self.magnitude / self._row_norms())[:, None]
        return weight

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Lengths of the rows of W + s B A. No gradient flows through them, as DoRA's section 4.3
        proposes."""
        return (self.base.weight.float() + self.scale * (self.b @ self.a)).norm(dim=1)


def apply_lora(model: Transformer, lora: LoRA, new_rows: Sequence[int] = (), seed: int = 0) -> None:
    """Freeze `model` and put adapters on its `lora.targets`, ready for training.

    `new_rows` are ids whose rows of embedding and head are trained as well: those of tokens that
    the base has never seen. Raises UserError for unknown targets, a rank below 1, and where another
    architecture does not run with adapters.
    """
    if lora.rank < 1:
        raise UserError(f"--lora_rank {lora.rank}: expected at least 1")
    if new_rows and not isinstance(model, Transformer):
        raise UserError("--chat_template: new tokens under LoRA need one of Whet's own families")
    found = linears(model)
    if not found:
        raise UserError("--lora_rank: this architecture has no linear modules; it is trained whole")
    kinds = _chosen_kinds(model, lora.targets, found)
    freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for name, base in found.items():
        if kind_of(name) not in kinds:
            continue
        layer = LoRALinear(base, lora.rank, lora.scale, lora.dropout, lora.dora)
        bound = 1.0 / math.sqrt(layer.a.shape[1])  # as nn.Linear begins
        values = torch.empty(layer.a.shape).uniform_(-bound, bound, generator=generator)
        layer.a.data.copy_(values)
        set_module(model, name, layer)
    if isinstance(model, Transformer):
        train_rows(model, new_rows)
    else:
        refuse_unfit(model)


def freeze(model: nn.Module) -> None:
    """Train nothing but a score, which starts from zeros or small."""
    model.requires_grad_(False)
    if isinstance(model, Transformer) and model.config.score:
        model.score.requires_grad_(True)


def _chosen_kinds(
    model: Transformer, targets: str, found: Mapping[str, nn.Linear]
) -> tuple[str, ...]:
    """The kinds of modules that `targets` names, of the linear modules `found`."""
    known = LINEARS if isinstance(model, Transformer) else sorted(set(map(kind_of, found)))
    refused = _refused_by_peft(model)
    possible = tuple(kind for kind in known if kind not in refused)
    kinds = possible if targets == "all-linear" else tuple(targets.split(","))
    unknown = sorted(set(kinds) - set(known))
    if unknown:
        raise UserError(
            f"--lora_targets {targets}: unknown {', '.join(unknown)}; "
            f"expected all-linear, or some of {','.join(possible)}"
        )
    others = [kind for kind in kinds if kind in refused]
    if others:
        raise UserError(
            f"--lora_targets {targets}: PEFT would not open an adapter on {','.join(others)} of "
            "this architecture, or as another one (it takes such names for those of fused experts, "
            "and has no adapters for Mamba's out_proj); leave them out: "
            f"--lora_targets {','.join(kind for kind in kinds if kind in possible) or 'all-linear'}"
        )
    return kinds


def _refused_by_peft(model: nn.Module) -> tuple[str, ...]:
    """Names of linear modules on which PEFT opens no adapter, or another one.

    Where the matrices of all experts are one tensor, it maps names of an expert's matrices onto
    that tensor, wherever they stand; for Mamba's kinds it refuses `out_proj`.
    """
    if isinstance(model, Transformer):
        return ()
    fused = any(
        p.dim() == 3 and name.rpartition(".")[2] in ("gate_up_proj", "down_proj")
        for name, p in model.named_parameters()
    )
    config: Any = model.get_submodule("inner").config
    return (*(_EXPERTS if fused else ()), *(["out_proj"] * (config.model_type in _MAMBAS)))


def refuse_unfit(model: Any) -> None:
    """Raise UserError, naming them, if another architecture does not use some modules that have
    adapters now as plain linear ones: it reads their matrices, or they return more than a product.
    """
    if model.runs():
        return
    layers = list(adapters(model))
    for name, layer in layers:
        set_module(model, name, layer.base)
    unfit, fine = list[str](), list[str]()
    for kind in dict.fromkeys(kind_of(name) for name, _ in layers):
        mine = [(name, layer) for name, layer in layers if kind_of(name) == kind]
        for name, layer in mine:
            set_module(model, name, layer)
        (fine if model.runs() else unfit).append(kind)
        for name, layer in mine:
            set_module(model, name, layer.base)
    instead = f": --lora_targets {','.join(fine)}" if fine else "; train the model whole"
    raise UserError(
        f"--lora_targets: {type(model.inner).__name__} does not use {', '.join(unfit)} as plain "
        f"linear modules, so no adapter can stand there; leave them out{instead}"
    )


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules by name that may get an adapter and have none.

    Of another architecture (`foreign.py`) these are all but the head, as PEFT's `all-linear`.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if isinstance(model, Transformer):
        return {name: m for name, m in found.items() if kind_of(name) in LINEARS}
    inner: Any = model.get_submodule("inner")
    taken = {id(inner.get_output_embeddings()), *(id(layer.base) for _, layer in adapters(model))}
    return {name: m for name, m in found.items() if id(m) not in taken}


def kind_of(name: str) -> str:
    """The last part of a module's name; of a numbered one with its parent: `mlp.0`."""
    parts = name.split(".")
    words = [at for at, part in enumerate(parts) if not part.isdigit()]
    return ".".join(parts[words[-1] if words else 0 :])


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every adapted layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """In the block the model is its base: the reference of what the adapter has changed."""
    layers = [layer for _, layer in adapters(model)]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


@torch.no_grad()
def merge_lora(model: Transformer) -> None:
    """Fold every adapter and trained row into its matrix: the plain model that does the same.

    In bfloat16 the sum is rounded; merge in float32 and round once, on saving.
    """
    for name, layer in list(adapters(model)):
        layer.base.weight.copy_(layer.merged_weight())
        set_module(model, name, layer.base)
    merge_rows(model)
    model.requires_grad_(True)


def quantize_base(model: Transformer, device: torch.device) -> None:
    """Turn the layers' matrices into 4-bit NF4 on `device` (QLoRA, Dettmers et al. 2023).

    One scale for each 64 numbers, the scales themselves in 8 bits. Products are computed in the
    precision that the matrices had. Call it before adapters are put on: only these can be trained
    then. The rest of the model moves to `device` as it is. Raises UserError without bitsandbytes.
    """
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise UserError(
            "--lora_4bit: bitsandbytes is not installed; pip install 'whet[cuda]'"
        ) from None
    for name in list(linears(model)):  # names only: each matrix is let go when it is packed
        linear: Any = model.get_submodule(name)
        quantized = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        # Its other layout for CPUs with AVX-512 is for inference only: after an evaluation no
        # gradient would pass any more.
        quantized.support_avx512bf16_for_cpu = False
        weight = linear.weight.detach().cpu().contiguous()
        quantized.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        if linear.bias is not None:
            quantized.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        set_module(model, name, quantized.to(device))  # the move is what packs it
    model.to(device)
