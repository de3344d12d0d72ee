"""How a stage writes its model: whole, or its adapter, with its lineage; and a `.pt` if asked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whet.chat.chat import Chat
from whet.model.hf.checkpoint import save_model, save_pt
from whet.model.lora.lora import LoRA
from whet.model.lora.write import save_adapter
from whet.train.distributed import is_first, unwrap, whole_weights


@dataclass(frozen=True)
class ModelWriter:
    """Writes the trained model, or its adapter, with its lineage; and the `.pt` if asked for."""

    chat: Chat | None
    lineage: dict[str, Any] = field(default_factory=dict)
    out_ckpt: Path | None = None
    """A `.pt` file besides, of the final model."""
    out: Path | None = None
    """The run folder, where the final model goes."""
    lora: LoRA | None = None
    dtype: torch.dtype | None = None
    """What the weights are rounded to; None: as they are. An adapter stays in float32."""

    def __call__(self, model: nn.Module, directory: Path, metrics: dict[str, float]) -> None:
        """All ranks call it: a sharded model is gathered first. Only rank 0 writes."""
        state = whole_weights(model)
        if not is_first():
            return
        whole: Any = unwrap(model)
        lineage = {**self.lineage, "metrics": metrics}
        if self.lora is not None:
            base = str(self.lineage["base"])
            save_adapter(whole, directory, self.lora, base, self.chat, lineage, state=state)
            return
        save_model(whole, directory, self.chat, lineage, self.dtype, state=state)
        if self.out_ckpt is not None and directory == self.out:
            step, stage = int(metrics.get("step", 0)), self.lineage["stage"]
            save_pt(whole, self.out_ckpt, stage, step, metrics, self.dtype, state=state)
