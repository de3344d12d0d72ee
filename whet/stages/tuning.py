"""What of a base model is trained, and how it is saved: all of it, a part, or an adapter."""

import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whet.chat.chat import Chat, add_chat_tokens
from whet.errors import UserError
from whet.files import nearest
from whet.model.decoder import Transformer
from whet.model.embedding import grow_embedding
from whet.model.hf.checkpoint import save_model, save_pt, saved_bytes
from whet.model.lora.lora import LoRA, adapters, apply_lora, kind_of, quantize_base
from whet.model.lora.read import continue_adapter
from whet.model.lora.trained import select_trainable
from whet.model.lora.write import save_adapter
from whet.train.distributed import is_first, unwrap, whole_weights


def add_tokens(model: Transformer, chat: Chat, chat_template: str) -> tuple[Chat, list[int]]:
    """Give tokenizer and model the control tokens of a template that the base does not know.

    Returns the new chat and the ids whose rows are new.
    """
    chat, added = add_chat_tokens(chat, chat_template)
    if isinstance(model, Transformer):
        grow_embedding(model, chat.tokenizer.vocab_size)
    else:
        model.grow(chat.tokenizer.vocab_size)  # another architecture: foreign.py
    ids = [chat.tokenizer.backend.token_to_id(token) for token in added]
    return chat, [i for i in ids if i is not None]


def choose_trained(
    model: Transformer,
    *,
    train: str,
    lora: LoRA | None,
    adapter: Path | None,
    new_rows: list[int],
    four_bits: bool,
    device: torch.device,
    seed: int,
) -> LoRA | None:
    """Freeze what is not trained; with an adapter everything but it and the new rows.

    `lora` are the settings of a new adapter, `adapter` the directory of one that is trained
    further. Returns the adapter's settings, or None if the model itself is trained.
    """
    if lora is None and adapter is None:
        select_trainable(model, train)
        return None
    if adapter is not None and new_rows:
        raise UserError(
            f"{adapter}: an adapter can't be given tokens that it lacks; merge it first: "
            f"whet export {adapter} --merge --out DIR"
        )
    if four_bits:
        quantize_base(model, device)
    if adapter is not None:
        return continue_adapter(model, adapter)
    assert lora is not None
    apply_lora(model, lora, new_rows, seed)
    if isinstance(model, Transformer):
        return lora
    kinds = dict.fromkeys(kind_of(name) for name, _ in adapters(model))
    return replace(lora, targets=",".join(kinds))  # another architecture's: which ones it got


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
        if self.lora is not None:
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
