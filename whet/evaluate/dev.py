"""One pass over a dev file: its loss, the same at any number of ranks, and where it comes from.

The parts are by source, by turn, by length, and at the ends of replies. A bad mask shows there
within the first hundred steps: if a stop token is not trained, its probability at the true end of a
reply stays low; if something after it is trained, or a cut-off end, its probability inside answers
rises.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from whet.data.batches import Batch, micro_batches, read_batch, shares_of
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.generate.engine import evaluating
from whet.model.decoder import Transformer, run_batch
from whet.model.loss import TokenLoss
from whet.progress import track

TURNS = 4
"""Trained turns with a number of their own; later ones are taken together."""
LENGTHS = (128, 512, 2048)
"""Borders of the length classes, in tokens of the document."""


@dataclass(frozen=True)
class DevLoss:
    """What `dev_loss` gives; loss is in nats per token."""

    loss: float
    ppl: float
    """exp(loss)"""
    tokens: int
    """Trained tokens, that is those with a weight."""
    stop_probability: float | None = None
    """Mean probability of the stop token where a reply ends. None if `stop_ids` were not given or
    none is trained."""
    stop_inside: float | None = None
    """Mean probability of the first of `stop_ids` where a reply goes on. None as above."""
    parts: dict[str, float] = field(default_factory=dict)
    """Mean loss, without weights, of the trained tokens of a class: `source/NAME`, `turn/N`,
    `length/…`."""


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
) -> DevLoss:
    """sum(weight x nll) / sum(weight) over all rows of `store`, `micro_rows` of them at a time.

    Each rank runs every `world_size`-th row, all of them equally many micro-batches, so that
    forwards may be collectives. `reduce` adds up lists of numbers over the ranks. Rows are added up
    in the file's order whichever rank ran them, so the ranks' number changes no rounding here.

    Raises UserError if the file trains nothing.
    """
    total = float(store.loss_tokens.sum())
    if total == 0:
        raise UserError(f"{store.path}: no token in it is trained, so it has no dev loss")
    shares = shares_of(len(store), rank, world_size, micro_rows)
    names = class_names(store)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    table = np.zeros((len(store), 6))
    parts, by_class = [], torch.zeros(len(names) + 1, 2, dtype=torch.float64, device=device)
    with (
        torch.no_grad(),
        evaluating(model),
        track("Dev loss", sum(map(len, shares)), unit="rows", quiet=quiet) as progress,
    ):
        for rows in shares:
            whole = micro_batches(read_batch(store, rows, total=total), micro_rows, 1)[0]
            classes = torch.from_numpy(classes_of(whole, store, names)).to(device)
            batch = whole.to(device)
            found = run_batch(model, batch, watch=stop_ids[0] if stop_ids else None)
            parts.append(_row_sums(found, batch.targets, batch.weight, stops)[: len(rows)])
            _add(by_class, classes, found.nll)
            progress.advance(len(rows))
    table[np.concatenate(shares)] = torch.cat(parts).cpu().numpy()  # the one wait for the device
    flat = [*table.flatten().tolist(), *by_class[:-1].flatten().tolist()]
    flat = list(reduce(flat)) if reduce is not None else flat
    sums = np.reshape(flat[: table.size], table.shape).sum(axis=0)
    nll, tokens, at_stop, n_stops, inside, n_inside = sums
    loss = nll / total
    means = zip(names, np.reshape(flat[table.size :], (-1, 2)), strict=True)
    return DevLoss(
        loss=float(loss),
        ppl=math.exp(loss) if loss < 700 else math.inf,
        tokens=round(tokens),
        stop_probability=float(at_stop / n_stops) if n_stops else None,
        stop_inside=float(inside / n_inside) if n_inside else None,
        parts={name: float(value / count) for name, (value, count) in means if count},
    )


def class_names(store: PackedStore) -> list[str]:
    """The classes of trained tokens, in the order of `classes_of`'s numbers."""
    sources = dict.fromkeys(f"source/{label}" for label in source_labels(store))
    turns = [f"turn/{turn}" for turn in range(1, TURNS + 1)] + [f"turn/{TURNS + 1}+"]
    lengths = [f"length/to_{length}" for length in LENGTHS] + [f"length/over_{LENGTHS[-1]}"]
    return [*sources, *turns, *lengths]


def source_labels(store: PackedStore) -> list[str]:
    """The file name of each source; with its folders where two files have the same name."""
    short = [name.rpartition("/")[2] for name in store.sources]
    return [s if short.count(s) == 1 else n for s, n in zip(short, store.sources, strict=True)]


def classes_of(batch: Batch, store: PackedStore, names: list[str]) -> np.ndarray:
    """(3, B, T) the numbers, in `names`, of each trained token's source, turn and length; where
    there is none, len(names)."""
    none = len(names)
    trained, segments = batch.weight.numpy() != 0, batch.segments.numpy()
    lengths = np.zeros((len(segments), segments.max(initial=0) + 1), np.int64)
    places = (np.arange(len(segments))[:, None], segments)
    np.add.at(lengths, places, 1)
    row, segment = np.nonzero(lengths[:, 1:])
    source = np.full(lengths.shape, none)
    if len(store.documents):
        number = {label: names.index(f"source/{label}") for label in source_labels(store)}
        of_index = np.array([*(number[label] for label in source_labels(store)), none])
        entries = store.documents["source"][store.numbers(batch.rows[row], segment + 1)]
        known = (entries >= 0) & (entries < len(of_index) - 1)
        source[row, segment + 1] = of_index[np.where(known, entries, -1)]
    turn = names.index("turn/1") + np.minimum(turns_of(trained, segments), TURNS + 1) - 1
    length = names.index(f"length/to_{LENGTHS[0]}") + np.searchsorted(LENGTHS, lengths)
    return np.where(trained, np.stack([source[places], turn, length[places]]), none)


def turns_of(trained: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """(B, T) the number, from 1 in each document, of the last trained span that has begun."""
    first = np.ones(trained.shape, bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    begins = trained.copy()
    begins[:, 1:] &= ~trained[:, :-1] | first[:, 1:]
    count = np.cumsum(begins, axis=1)
    earlier = np.maximum.accumulate(np.where(first, count - begins, 0), axis=1)
    return count - earlier


def _add(by_class: Tensor, classes: Tensor, nll: Tensor) -> None:
    """Add each token's nll (B, T), and 1, to its classes (3, B, T)."""
    values = torch.stack([nll.double(), torch.ones_like(nll, dtype=torch.float64)], dim=-1)
    for each in classes:
        by_class.index_add_(0, each.flatten(), values.flatten(0, 1))


def _row_sums(found: TokenLoss, targets: Tensor, weight: Tensor, stops: Tensor) -> Tensor:
    """(B, 6) float64 per row: weighted nll, trained tokens, probabilities at stops, stops,
    probabilities of a stop elsewhere, places elsewhere."""
    trained = weight != 0
    at_stop = trained & torch.isin(targets, stops)
    inside = trained & ~at_stop & (found.watched is not None)
    watched = found.nll if found.watched is None else found.watched
    sums = (
        found.nll.double() * weight.double(),
        trained,
        torch.exp(-found.nll.double()) * at_stop,
        at_stop,
        watched * inside,
        inside,
    )
    return torch.stack([each.double().sum(dim=1) for each in sums], dim=1)
