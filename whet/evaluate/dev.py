"""Loss over a whole dev file: every token with its weight, the same at any number of ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whet.chat.chat import Chat
from whet.data.batches import micro_batch_count, micro_batches, read_batch
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.generate.engine import evaluating
from whet.model.decoder import TokenLoss, Transformer
from whet.progress import track


@dataclass(frozen=True)
class DevLoss:
    """What `dev_loss` gives; loss is in nats per token."""

    loss: float
    ppl: float
    """exp(loss)"""
    tokens: int
    """Trained tokens, that is those with a weight."""
    stop_probability: float | None = None
    """Mean probability of the stop token where a reply ends; a bad mask shows here first. None if
    `stop_ids` were not given or none is trained."""


def dev_loss(
    model: Transformer,
    store: PackedStore,
    *,
    micro_rows: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Sequence[float]], Sequence[float]] | None = None,
    stop_ids: Sequence[int] = (),
    quiet: bool = True,
    between: Callable[[], None] = lambda: None,
) -> DevLoss:
    """sum(weight x nll) / sum(weight) over all rows of `store`, `micro_rows` of them at a time.

    Each rank runs every `world_size`-th row, all of them equally many micro-batches, so that
    forwards may be collectives. `reduce` adds up lists of numbers over the ranks. Rows are added up
    in the file's order whichever rank ran them, so the ranks' number changes no rounding here.
    `between` is called after each micro-batch; what it raises ends the evaluation.

    Raises UserError if the file trains nothing.
    """
    total = float(store.loss_tokens.sum())
    if total == 0:
        raise UserError(f"{store.path}: no token in it is trained, so it has no dev loss")
    mine = np.arange(rank, len(store), world_size)
    count = micro_batch_count(len(store), world_size, micro_rows)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    parts = []
    with (
        torch.no_grad(),
        evaluating(model),
        track("Dev loss", len(mine), unit="rows", quiet=quiet) as progress,
    ):
        for i in range(count):
            rows = mine[i * micro_rows : (i + 1) * micro_rows]
            batch = micro_batches(read_batch(store, rows, total=total), micro_rows, 1)[0].to(device)
            found = model(
                batch.tokens,
                None,
                batch.segments,
                targets=batch.targets,
                weight=batch.weight,
            )
            parts.append(_row_sums(found, batch.targets, batch.weight, stops)[: len(rows)])
            progress.advance(len(rows))
            between()
    table = np.zeros((len(store), 4))
    table[mine] = torch.cat(parts).cpu().numpy()  # the one wait for the device
    if reduce is not None:
        table = np.reshape(reduce(table.flatten().tolist()), table.shape)
    nll, tokens, stop_probability, stop_count = table.sum(axis=0)
    loss = nll / total
    return DevLoss(
        loss=float(loss),
        ppl=math.exp(loss) if loss < 700 else math.inf,
        tokens=round(tokens),
        stop_probability=float(stop_probability / stop_count) if stop_count else None,
    )


def misfits(model: Transformer, chat: Chat | None, store: PackedStore, flag: str) -> list[str]:
    """Why a packed file, given by `flag`, does not fit this model: a line for each reason."""
    found, config, attrs = [], model.config, store.attrs
    if chat and attrs.get("tokenizer_hash") not in (None, chat.tokenizer.hash):
        template = (attrs.get("settings") or {}).get("chat_template")
        found.append(
            f"{flag} {store.path}: was made with another tokenizer than the model's; run `whet "
            "prepare` again with --tokenizer on the model's directory"
            + (f", or, as there, add --chat_template {template}" if template else "")
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


def _row_sums(found: TokenLoss, targets: Tensor, weight: Tensor, stops: Tensor) -> Tensor:
    """(B, 4) float64 per row: weighted nll, trained tokens, probabilities at stops, stops."""
    trained = weight != 0
    at_stop = trained & torch.isin(targets, stops)
    sums = (
        found.nll.double() * weight.double(),
        trained,
        torch.exp(-found.nll.double()) * at_stop,
        at_stop,
    )
    return torch.stack([each.double().sum(dim=1) for each in sums], dim=1)
