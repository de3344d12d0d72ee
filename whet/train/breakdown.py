"""Where the dev loss comes from: by source, by turn, by length, and at the ends of replies.

A bad mask shows here within the first hundred steps: if a stop token is not trained, its
probability at the true end of a reply stays low; if something after it is trained, or a cut-off
end, its probability inside answers rises.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from whet.data.batches import Batch, micro_batch_count, micro_batches, read_batch
from whet.data.store import PackedStore
from whet.progress import track
from whet.train.distributed import Ranks, sum_over_ranks

ROWS = 64
"""Dev rows that are looked at: a few hundred documents tell what this is for."""
TURNS = 4
"""Trained turns with a number of their own; later ones are taken together."""
LENGTHS = (128, 512, 2048)
"""Borders of the length classes, in tokens of the document."""


def breakdown(
    model: Any,
    store: PackedStore,
    stop_ids: Sequence[int],
    micro_rows: int,
    ranks: Ranks,
    between: Callable[[], None] = lambda: None,
    quiet: bool = True,
) -> dict[str, float]:
    """Mean loss `dev_loss/source/…`, `/turn/…`, `/length/…`, and the mean probability of a stop
    token inside replies, `dev_stop_inside`. All ranks call it; all do the same number of passes,
    with `between` after each.
    """
    n_rows = min(ROWS, len(store))
    keys = class_names(store)
    sums = np.zeros((len(keys), 2))
    inside = np.zeros(2)
    mine = np.arange(n_rows)[ranks.rank :: ranks.size]
    was_training = model.training
    model.eval()
    with torch.no_grad(), track("Dev loss by part", len(mine), "rows", quiet) as progress:
        for i in range(micro_batch_count(n_rows, ranks.size, micro_rows)):
            rows = mine[i * micro_rows : (i + 1) * micro_rows]
            whole = micro_batches(read_batch(store, rows, total=1.0), micro_rows, 1)[0]
            batch = whole.to(ranks.device)
            nll = _nll(model, batch, batch.targets, batch.weight)
            _add(sums, keys, store, whole, nll)
            if stop_ids:
                inside += _stop_inside(model, batch, stop_ids)
            progress.advance(len(rows))
            between()
    model.train(was_training)
    flat = sum_over_ranks([*sums.flatten().tolist(), *inside.tolist()], ranks)
    sums, (probability, places) = np.reshape(flat[:-2], sums.shape), flat[-2:]
    found = {
        f"dev_loss/{key}": float(total / count)
        for key, (total, count) in zip(keys, sums, strict=True)
        if count
    }
    if places:
        found["dev_stop_inside"] = probability / places
    return found


def class_names(store: PackedStore) -> list[str]:
    """Every class of trained tokens, in a fixed order."""
    names = [f"source/{name}" for name in _source_labels(store)]
    names += [f"turn/{turn}" for turn in _turn_names()]
    return list(dict.fromkeys([*names, *(f"length/{name}" for name in _length_names())]))


def _source_labels(store: PackedStore) -> list[str]:
    """The file name of each source; with its folders where two files have the same name."""
    short = [name.rpartition("/")[2] for name in store.sources]
    return [s if short.count(s) == 1 else n for s, n in zip(short, store.sources, strict=True)]


def _turn_names() -> list[str]:
    return [*(str(turn) for turn in range(1, TURNS + 1)), f"{TURNS + 1}+"]


def _length_names() -> list[str]:
    return [*(f"to_{length}" for length in LENGTHS), f"over_{LENGTHS[-1]}"]


def _nll(model: Any, batch: Batch, targets: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    found = model(batch.tokens, None, batch.segments, targets=targets, weight=weight)
    return found.nll.cpu().double().numpy()


def _stop_inside(model: Any, batch: Batch, stop_ids: Sequence[int]) -> np.ndarray:
    """(sum of probabilities, places): of the first stop token where the reply goes on."""
    stops = torch.tensor(list(stop_ids), device=batch.targets.device)
    inside = (batch.weight != 0) & ~torch.isin(batch.targets, stops)
    # Asking for -ln p(stop) at these places is the same forward pass with other targets.
    nll = _nll(model, batch, torch.full_like(batch.targets, stop_ids[0]), inside.float())
    where = inside.cpu().numpy()
    return np.array([np.exp(-nll[where]).sum(), where.sum()])


def _add(
    sums: np.ndarray, keys: list[str], store: PackedStore, batch: Batch, nll: np.ndarray
) -> None:
    """Add the trained tokens of a batch to their classes: (sum of nll, count) for each key."""
    index = {key: i for i, key in enumerate(keys)}
    labels = _source_labels(store)
    trained = batch.weight.numpy() != 0
    segments = batch.segments.numpy()
    for b, row in enumerate(batch.rows):
        if row < 0:
            continue
        entries = store.documents_of(np.array([row]))
        for segment in range(1, int(segments[b].max()) + 1):
            here = segments[b] == segment
            classes = turns_of(trained[b, here])
            losses = nll[b, here]
            length = _length_names()[int(np.searchsorted(LENGTHS, here.sum()))]
            per_key: dict[str, list[float]] = defaultdict(list)
            for turn, loss in zip(classes, losses, strict=True):
                if turn:
                    per_key[f"turn/{_turn_names()[min(turn, TURNS + 1) - 1]}"].append(loss)
                    per_key[f"length/{length}"].append(loss)
            if labels and segment <= len(entries):
                name = labels[int(entries[segment - 1]["source"])]
                per_key[f"source/{name}"] = per_key[f"length/{length}"]
            for key, values in per_key.items():
                sums[index[key]] += (sum(values), len(values))


def turns_of(trained: np.ndarray) -> np.ndarray:
    """(T,) the number, from 1, of the trained span that each place lies in; 0 outside of them."""
    starts = trained & ~np.concatenate([[False], trained[:-1]])
    return np.where(trained, np.cumsum(starts), 0)
