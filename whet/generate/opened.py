"""A model opened for use: its weights on a device, and the chat that it was trained with."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from whet.chat.chat import Chat, load_tokenizer
from whet.chat.template import read_variables
from whet.errors import UserError
from whet.flags.choices import Device, Precision
from whet.flags.use import Asked
from whet.hub import find_model
from whet.model.decoder import Transformer
from whet.model.lora.read import tokenizer_home
from whet.model.open import load_backbone_from_ckpt


class Opened(NamedTuple):
    """What `open_model` gives."""

    model: Transformer
    chat: Chat

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device


def open_asked(path: str | Path, config: Asked) -> Opened:
    """`open_model` as the flags of a command say that uses a model."""
    variables = read_variables(config.template_kwargs)
    return open_model(path, config.tokenizer, config.device, config.precision, variables)


def open_model(
    path: str | Path,
    tokenizer: str | Path | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    template_kwargs: dict[str, Any] | None = None,
    score: bool | None = False,
) -> Opened:
    """The model of a run folder, a model directory, a `.pt` file or a Hub name.

    `tokenizer` is a directory, by default the model's own. `device` auto is CUDA if there is any;
    `precision` auto is bf16 on CUDA. `template_kwargs` are variables of the chat template, over
    those that the model was trained with. `score` None also opens a reward model. Raises
    UserError for what cannot be opened, and for a tokenizer with more ids than the model has.
    """
    path = find_model(path)
    # The tokenizer first: it is quickly opened, and often what is wrong.
    chat = open_chat(path, tokenizer, template_kwargs)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; --device cpu runs anywhere")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    half = precision == "bf16" or (precision == "auto" and device == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    model = load_backbone_from_ckpt(path, dtype=dtype, device=device, score=score)
    size = chat.tokenizer.vocab_size
    if size > model.config.vocab_size:
        raise UserError(
            f"{tokenizer or path}: this tokenizer has {size:,} ids, the model {path} "
            f"{model.config.vocab_size:,}; it needs the model's own"
        )
    return Opened(model.eval(), chat)


def open_chat(
    path: Path,
    tokenizer: str | Path | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> Chat:
    """The tokenizer and template of the model in `path`, or those in `tokenizer`."""
    if tokenizer is None and path.is_file():
        raise UserError(
            f"{path}: a .pt file has no tokenizer; name its directory with --tokenizer, or make a "
            f"directory of both: whet export {path} --tokenizer DIR --out NEW"
        )
    return load_tokenizer(tokenizer or tokenizer_home(path), template_kwargs=template_kwargs)
