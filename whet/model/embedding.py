"""The ends of a model: growing the embedding for new tokens, training only some of its rows, and a
score in the place of the head."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.model.decoder import Transformer


@torch.no_grad()
def grow_embedding(model: Transformer, n_tokens: int, multiple: int = 64) -> range:
    """Give `model` rows for `n_tokens` tokens, rounded up to a `multiple`; return the new ids.

    The new rows of embedding and head are the mean of the old ones: the model then gives each new
    token about the probability of an average one, and training starts where the others are. A
    multiple of 64 keeps matrix products on a GPU's fast path. Nothing changes if the rows suffice.
    """
    old = model.config.vocab_size
    if n_tokens <= old:
        return range(old, old)
    new = -(-n_tokens // multiple) * multiple
    resize_embedding(model, new)
    return range(old, new)


@torch.no_grad()
def resize_embedding(model: Transformer, rows: int) -> None:
    """Give embedding and head `rows` rows: the first ones, or more, which are the mean."""
    model.embed.weight = _resized(model.embed.weight, rows)
    model.embed.num_embeddings = rows
    if hasattr(model, "head"):
        model.head.weight = _resized(model.head.weight, rows)
        model.head.out_features = rows
        if model.head.bias is not None:
            model.head.bias = _resized(model.head.bias, rows)
    model.config = dataclasses.replace(model.config, vocab_size=rows)


def _resized(weight: Tensor, rows: int) -> nn.Parameter:
    mean = weight.float().mean(dim=0).to(weight.dtype)
    added = mean.expand(max(0, rows - len(weight)), *weight.shape[1:])
    return nn.Parameter(torch.cat([weight[:rows], added]), requires_grad=weight.requires_grad)


@torch.no_grad()
def untie(model: Transformer) -> None:
    """Give a tied head a matrix of its own, equal to the embedding."""
    if not model.config.tied:
        return
    model.config = dataclasses.replace(model.config, tied=False)
    if not model.config.score:
        weight = model.embed.weight
        model.head = nn.Linear(model.config.width, len(weight), bias=False, device="meta")
        model.head.weight = nn.Parameter(weight.clone(), requires_grad=weight.requires_grad)


@torch.no_grad()
def add_score(model: Transformer) -> None:
    """Put a score in the place of the head: a row of zeros (1, D), from which a reward model or a
    critic is trained. A model that has one keeps it."""
    if model.config.score:
        return
    if not model.config.tied:
        del model.head
    embedding = model.embed.weight
    model.score = nn.Linear(
        model.config.width, 1, bias=False, device=embedding.device, dtype=embedding.dtype
    )
    model.score.weight.zero_()
    model.config = dataclasses.replace(model.config, score=True)


class TrainableRows(nn.Module):
    """An embedding or head whose `rows` are trained while all else stays frozen.

    The rows stand beside the frozen matrix, in float32, and take the place of the rows `ids`.
    """

    ids: Tensor

    def __init__(self, base: nn.Embedding | nn.Linear, ids: Sequence[int]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rows = nn.Parameter(base.weight.detach()[list(ids)].float())
        self.register_buffer("ids", torch.tensor(ids, device=base.weight.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole matrix (V, D), the trained rows in their places."""
        weight = self.base.weight
        return weight.index_copy(0, self.ids, self.rows.to(weight.dtype))

    @property
    def bias(self) -> Tensor | None:
        """The bias of a head."""
        return getattr(self.base, "bias", None)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up `tokens` of any shape, as nn.Embedding does."""
        place = (tokens.unsqueeze(-1) == self.ids).long()
        found = F.embedding(place.argmax(-1), self.rows).to(self.base.weight.dtype)
        return torch.where(place.any(-1, keepdim=True), found, self.base(tokens))


def train_rows(model: Transformer, ids: Sequence[int]) -> None:
    """Make the rows `ids` of embedding and untied head trainable; the others are frozen."""
    if not ids:
        return
    for name in [name for name in ("embed", "head") if hasattr(model, name)]:
        setattr(model, name, TrainableRows(getattr(model, name), ids))


@torch.no_grad()
def merge_rows(model: Transformer) -> None:
    """Write trained rows into their matrices and take the wrappers away."""
    for name in ("embed", "head"):
        wrapper = getattr(model, name, None)
        if isinstance(wrapper, TrainableRows):
            wrapper.base.weight.index_copy_(
                0, wrapper.ids, wrapper.rows.to(wrapper.base.weight.dtype)
            )
            setattr(model, name, wrapper.base)
