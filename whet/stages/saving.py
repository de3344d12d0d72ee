"""How a stage writes its model: whole, or its adapter, with its lineage; and a `.pt` if asked."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whet.chat.chat import Chat
from whet.config import as_toml
from whet.errors import UserError
from whet.files import nearest
from whet.flags.training import TrainSettings
from whet.model.hf.checkpoint import save_model, save_pt, saved_bytes
from whet.model.hf.weights import saved_as
from whet.model.lora.lora import LoRA, merge_lora
from whet.model.lora.write import save_adapter
from whet.stages.opening import Opened
from whet.train.distributed import is_first, unwrap, whole_weights

REHEARSED_BYTES = 2_000_000_000
"""Weights up to this size are written and read back before the first step: some seconds."""


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
    without_weights: bool = False
    """Write all but the weights: of large models a rehearsal does no more."""

    def __call__(self, model: nn.Module, directory: Path, metrics: dict[str, float]) -> None:
        """All ranks call it: a sharded model is gathered first. Only rank 0 writes."""
        state = whole_weights(model)
        if not is_first():
            return
        whole: Any = unwrap(model)
        lineage = {**self.lineage, "metrics": metrics}
        if self.lora is not None and getattr(whole.config, "score", False):
            # PEFT would save the score beside the adapter; a whole model opens everywhere.
            whole = deepcopy(whole).float()
            merge_lora(whole)
        elif self.lora is not None:
            base = str(self.lineage["base"])
            save_adapter(whole, directory, self.lora, base, self.chat, lineage, state=state)
            return
        save_model(
            whole,
            directory,
            self.chat,
            lineage,
            self.dtype,
            state=state,
            without_weights=self.without_weights,
        )
        if self.out_ckpt is not None and directory == self.out and not self.without_weights:
            step, stage = int(metrics.get("step", 0)), self.lineage["stage"]
            save_pt(whole, self.out_ckpt, stage, step, metrics, self.dtype, state=state)

    def rehearse(self, model: nn.Module) -> None:
        """Write beside `out` what will be written at the end, read it back and remove it.

        On rank 0, before the model is spread. Of weights above `REHEARSED_BYTES` only the space is
        looked for, and of other architectures the layout. Raises UserError for whatever fails: it
        would have cost the training.
        """
        assert self.out is not None, "a rehearsal needs a run folder"
        aside = nearest(self.out) / f".rehearsal.{os.getpid()}.saving"
        trial = replace(
            self,
            out=aside,
            out_ckpt=self.out_ckpt and aside / "model.pt",
            without_weights=saved_bytes(model.state_dict(), self.dtype) > REHEARSED_BYTES,
        )
        try:
            with torch.random.fork_rng(devices=[]):
                trial(model, aside, {})
        except (UserError, MemoryError):
            raise
        except Exception as error:  # whatever it is, the end of the training would meet it
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise UserError(
                f"--out {self.out}: the trained model could not be saved, so training does not "
                f"begin: {reason}"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def writer(
    config: TrainSettings, opened: Opened, stage: str, facts: Mapping[str, Any]
) -> ModelWriter:
    """Saves the model of `stage` with where it comes from: `facts` of its data, its base, and the
    settings, as the SHA-256 of the run's config.toml."""
    digest = hashlib.sha256(as_toml(config).encode()).hexdigest()
    lineage = {"stage": stage, **facts, **opened.lineage, "config_hash": digest}
    dtype = saved_as("same", opened.model.config.hf)
    return ModelWriter(opened.chat, lineage, config.out_ckpt, config.out, opened.lora, dtype)
