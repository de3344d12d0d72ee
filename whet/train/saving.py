"""Writing the model of a run as a model directory, from any layout of ranks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from whet.chat.tokenizer import Tokenizer
from whet.model.checkpoint import save_model, save_pt
from whet.train.distributed import is_first, unwrap, whole_weights


@dataclass(frozen=True)
class ModelWriter:
    """Writes a model directory with its lineage, and the `.pt` file if one was asked for."""

    tokenizer: Tokenizer | None
    lineage: dict[str, Any] = field(default_factory=dict)
    out_ckpt: Path | None = None

    def __call__(self, model: nn.Module, directory: Path, metrics: dict[str, float]) -> None:
        """All ranks call it: a sharded model is gathered first. Only rank 0 writes."""
        state = whole_weights(model)
        if not is_first():
            return
        whole: Any = unwrap(model)
        save_model(
            whole, directory, self.tokenizer, {**self.lineage, "metrics": metrics}, state=state
        )
        if self.out_ckpt is not None and directory.name != "best":
            step = int(metrics.get("step", 0))
            save_pt(whole, self.out_ckpt, self.lineage["stage"], step, metrics, state=state)
