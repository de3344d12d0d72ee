"""Opening any model: one of Whet's own families, another architecture, or an adapter on either; and
whether a packed file fits it."""

from pathlib import Path
from typing import cast

import torch

from whet.chat.chat import Chat
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.files import read_json
from whet.hub import is_adapter
from whet.model.decoder import Transformer
from whet.model.embedding import add_score
from whet.model.foreign_files import load_foreign
from whet.model.hf.checkpoint import open_own
from whet.model.hf.families import FAMILIES
from whet.model.lora.lora import merge_lora
from whet.model.lora.read import find_base, load_adapter


def load_backbone_from_ckpt(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quiet: bool = False,
    score: bool | None = False,
) -> Transformer:
    """Open the model directory or `.pt` file at `path`, its weights cast to `dtype` on `device`.

    An adapter's directory gives its base with the adapter merged into it; an architecture that is
    not Whet's own a `ForeignModel`, which has the same forward.

    `score`: True for a model that gives scores, as a reward model or a critic does; a language
    model gets a new row of zeros. False for one that gives logits, None for either. Raises
    UserError for a model of the other kind, and for what cannot be opened as the model that its
    files describe.
    """
    path, device = Path(path), torch.device(device)
    if is_adapter(path):
        model = open_adapter(path, dtype=dtype, device=device, quiet=quiet)
        merge_lora(model)
    elif is_foreign(path):
        model = cast(Transformer, load_foreign(path, dtype=dtype, device=device, quiet=quiet))
    else:
        model = open_own(path, dtype, device, quiet=quiet)
    return _as_wished(model, score, path)


def _as_wished(model: Transformer, score: bool | None, path: Path) -> Transformer:
    own = isinstance(model, Transformer)
    if score and not own:
        raise UserError(f"{path}: scores need a model of Whet's own families")
    if score:
        add_score(model)
    elif own and model.config.score and score is False:
        raise UserError(f"{path}: a reward model, which gives scores; expected a language model")
    return model


def open_adapter(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quiet: bool = False,
) -> Transformer:
    """The base that the adapter in `directory` names, with the adapter on it."""
    base = find_base(Path(directory), quiet=quiet)
    model = load_backbone_from_ckpt(base, dtype=dtype, device=device, quiet=quiet, score=None)
    load_adapter(model, directory)
    return model


def is_foreign(path: Path) -> bool:
    """Whether a model directory is of an architecture that is not Whet's own."""
    file = path / "config.json"
    if not file.is_file():
        return False
    family = read_json(file).get("model_type")
    return family is None or (isinstance(family, str) and family not in FAMILIES)


def template_misfit(chat: Chat, store: PackedStore, flag: str, whose: str) -> list[str]:
    """A line if the packed file was rendered with another template than `chat`'s, the chat of
    `whose`."""
    if "chat" not in store.attrs:
        return []
    difference = chat.rendering_as(store.attrs["chat"], str(store.path)).difference(chat)
    line = f"{flag} {store.path}: was rendered with {difference}, unlike {whose}"
    return [line] if difference else []


def misfits(model: Transformer, chat: Chat | None, store: PackedStore, flag: str) -> list[str]:
    """Why a packed file, given by `flag`, does not fit this model: a line for each reason."""
    found, config, attrs = [], model.config, store.attrs
    if chat and attrs.get("tokenizer_hash") not in (None, chat.tokenizer.hash):
        template = (attrs.get("settings") or {}).get("chat_template")
        found.append(
            f"{flag} {store.path}: was made with another tokenizer than the model's; run `whet "
            "prepare` again with --tokenizer on the model's directory"
            + (f", or train, as there, with --chat_template {template}" if template else "")
        )
    needed = attrs.get("vocab_size", 0)
    if needed > config.vocab_size:
        found.append(
            f"{flag} {store.path}: its tokenizer has {needed:,} ids, the model's embedding "
            f"{config.vocab_size:,} rows; prepare it with the model's own tokenizer"
        )
    elif "vocab_size" not in attrs:  # a file that others made
        low, high = store.id_range
        if low < 0 or high >= config.vocab_size:
            found.append(
                f"{flag} {store.path}: holds token ids from {low:,} to {high:,}, the model's "
                f"embedding {config.vocab_size:,} rows"
            )
    if config.max_positions and store.context_length > config.max_positions:
        found.append(
            f"{flag} {store.path}: rows of {store.context_length:,} tokens, but the model has "
            f"{config.max_positions:,} positions; prepare with --context_length "
            f"{config.max_positions} or less"
        )
    return found
