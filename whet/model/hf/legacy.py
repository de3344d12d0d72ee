"""Older checkpoints of this pipeline: a `.pt` with one small matrix per attention head.

The layout: `token_embed`, `position_embed`, `attn_blocks.{i}.ln1|ln2`,
`attn_blocks.{i}.attn.heads.{j}.key|query|value` (no bias), `attn_blocks.{i}.attn.proj`,
`attn_blocks.{i}.mlp.hidden|proj` with ReLU between, `layer_norm`, `lm_head` with a bias. Saved
again, it has Whet's own names; no family of transformers has learned positions together with a
bias on the head, so its model directory is in Whet's own layout (see `checkpoint.py`).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.config import problems
from whet.errors import UserError
from whet.model.config import ModelConfig

_SIZES = ("n_embed", "n_head", "n_blocks", "context_length", "vocab_size")
_MODULES = {
    "token_embed": "embed",
    "position_embed": "positions",
    "layer_norm": "norm",
    "lm_head": "head",
    "ln1": "attn_norm",
    "ln2": "mlp_norm",
    "attn.proj": "attn.o",
    "mlp.hidden": "mlp.up",
    "mlp.proj": "mlp.down",
}
_HEAD = re.compile(r"attn_blocks\.(\d+)\.attn\.heads\.(\d+)\.(query|key|value)\.weight")
_BLOCK = re.compile(r"attn_blocks\.(\d+)\.(.+)\.(weight|bias)")


def is_legacy(state: Mapping[str, Tensor]) -> bool:
    """Whether the (stripped) names are those of the older layout."""
    return "token_embed.weight" in state


def legacy_config(cfg: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """The configuration in `cfg`. Raises UserError if it lacks a size."""
    problems(
        [
            f"{path}: its cfg has {key} = {cfg.get(key)!r}; expected a whole number of at least 1"
            for key in _SIZES
            if type(cfg.get(key)) is not int or cfg[key] < 1
        ]
    )
    width, heads = cfg["n_embed"], cfg["n_head"]
    if width % heads:
        raise UserError(f"{path}: its cfg has n_embed = {width}, no multiple of n_head = {heads}")
    hidden = state.get("attn_blocks.0.mlp.hidden.weight")
    return ModelConfig(
        vocab_size=cfg["vocab_size"],
        width=width,
        n_layers=cfg["n_blocks"],
        n_heads=heads,
        n_kv_heads=heads,
        head_size=width // heads,
        mlp_width=hidden.shape[0] if hidden is not None and hidden.dim() else 4 * width,
        max_positions=cfg["context_length"],
        learned_positions=True,
        norm="layer",
        activation="relu",
        gated_mlp=False,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
    )


def legacy_state(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Whet's names; the heads' matrices are stacked. Names that are not of the layout stay as they
    are, for the caller to refuse."""
    found: dict[str, Tensor] = {}
    heads: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if match := _HEAD.fullmatch(name):
            layer, head, kind = match.groups()
            heads.setdefault((layer, kind[0]), {})[int(head)] = tensor
        elif (match := _BLOCK.fullmatch(name)) and match[2] in _MODULES:
            found[f"layers.{match[1]}.{_MODULES[match[2]]}.{match[3]}"] = tensor
        else:
            module, _, kind = name.rpartition(".")
            found[f"{_MODULES[module]}.{kind}" if module in _MODULES else name] = tensor
    for (layer, kind), parts in heads.items():
        if sorted(parts) != list(range(len(parts))):
            raise UserError(f"{path}: attn_blocks.{layer}.attn.heads lacks some of its heads")
        shapes = {tuple(part.shape) for part in parts.values()}
        if len(shapes) > 1 or () in shapes:
            raise UserError(
                f"{path}: the matrices {kind} of attn_blocks.{layer}.attn.heads have the shapes "
                f"{', '.join(str(list(shape)) for shape in sorted(shapes))}; expected the same"
            )
        found[f"layers.{layer}.attn.{kind}.weight"] = torch.cat([parts[j] for j in sorted(parts)])
    return found
