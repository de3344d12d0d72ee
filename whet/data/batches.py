"""The tensors of a step: which rows it trains on, and the one shift of the whole code.

The order of the data is a pure function of (seed, step): no iterator state has to be saved,
resuming at any step costs nothing, and another number of ranks reads the same global batches.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whet.data.layout import Rows, shifted_weight
from whet.data.store import PackedStore


@dataclass(frozen=True)
class Batch:
    """Some rows as tensors (B, T); B may be 0 where a rank has no row of a short global batch.

    At place t the model reads `tokens[t]` and is trained, with `weight[t]`, to say `targets[t]`,
    the token after it. `total` is the summed weight of the whole optimizer step over all ranks:
    dividing the weighted sum of a micro-batch's losses by it makes accumulation and ranks exact.
    """

    tokens: Tensor  # int64
    loss_mask: Tensor  # float32, belongs to the token of the same place: not shifted
    targets: Tensor  # int64, tokens shifted by one; meaningless where weight is 0
    weight: Tensor  # float32, the mask of the target; 0 at the last place of each document
    positions: Tensor  # int64, from 0 in each document
    segments: Tensor  # int64, 0 padding, 1.. the documents of a row
    total: float
    epoch: int  # from 0
    rows: np.ndarray  # (B,) row numbers in the file, -1 for an empty row
    plan: Any = None  # how the model lays the tokens out, if the stage has worked it out on the CPU
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What a stage needs besides, by name: (B, T), a number for each place, or (B, S + 1), one for
    each document as `per_document` orders them."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch, with its plan, on `device`."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with `function` applied to the tensors in it, also in its dataclasses and
    mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(item, function) for name, item in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **{k: map_tensors(v, function) for k, v in fields.items()})


def get_sft_batch_iterator(
    path: str | Path | PackedStore,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    epochs: int | None = None,
    limit_rows: int | None = None,
) -> Iterator[Batch]:
    """This rank's share of each global batch, one `Batch` for each optimizer step.

    `batch_size` is rows per optimizer step over all ranks. The shares of the ranks are disjoint and
    together the global batch. The last batch of an epoch may be smaller, so each epoch trains each
    row once. Never ends if `epochs` is None; `start_step` (from 0) resumes there without reading
    what was before. `limit_rows` uses only the first rows of the file.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    store = path if isinstance(path, PackedStore) else PackedStore(path)
    n_rows = min(len(store), limit_rows or len(store))
    per_epoch = steps_per_epoch(n_rows, batch_size)
    last = None if epochs is None else epochs * per_epoch
    for step in itertools.count(start_step) if last is None else range(start_step, last):
        whole = global_batch_rows(n_rows, batch_size, seed, step)
        total = float(store.loss_tokens[whole].sum())
        yield read_batch(store, whole[rank::world_size], total=total, epoch=step // per_epoch)


def steps_per_epoch(n_rows: int, batch_size: int) -> int:
    """Optimizer steps in which each row is trained once."""
    if n_rows < 1 or batch_size < 1:
        raise ValueError(f"n_rows and batch_size must be at least 1, got {n_rows}, {batch_size}")
    return -(-n_rows // batch_size)


def global_batch_rows(n_rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The row numbers of global batch `step` (from 0), over all ranks, in training order.

    Each epoch is a permutation of its own. A batch never crosses the end of an epoch.
    """
    epoch, step_of_epoch = divmod(step, steps_per_epoch(n_rows, batch_size))
    start = step_of_epoch * batch_size
    return epoch_order(n_rows, seed, epoch)[start : start + batch_size].copy()


@lru_cache(maxsize=4)  # train and dev, this epoch and the next
def epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of the rows, fixed by (seed, epoch).

    Sorts random numbers straight from the bit generator, because numpy guarantees these for ever;
    `Generator.permutation` may change with numpy's version, and a resumed run with it.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(n_rows), kind="stable")


def read_batch(store: PackedStore, rows: np.ndarray, *, total: float, epoch: int = 0) -> Batch:
    """Rows of the file as a `Batch`; `total` is the weight of the step that they belong to.

    Its `extra` are pairs, margins or labels where the file has them.
    """
    batch = make_batch(store.rows(rows), rows, total=total, epoch=epoch)
    if store.kind not in ("preferences", "labels"):
        return batch
    extra = {name: torch.from_numpy(values) for name, values in _extra_of(store, rows).items()}
    return dataclasses.replace(batch, extra=extra)


def _extra_of(store: PackedStore, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What pairs and labelled replies add to a batch of `rows`, float32.

    A row of `preferences` holds whole pairs: documents 2p + 1 and 2p + 2 are the chosen and the
    rejected reply of its pair p (from 0). `pairs` (B, P) is 1 where the row has that pair and
    `margins` (B, P) is by how much the chosen one is better, 0 where the data do not say.
    Of `labels`, `labels` (B, S + 1) is 1 for a good document, -1 for a bad one and 0 where there is
    none: column s is document s of the row, column 0 the padding.
    """
    row, segment, ids = store.documents_in(rows)
    most = int(segment.max(initial=0))
    if store.kind == "labels":
        labels = np.zeros((len(rows), most + 1), np.float32)
        labels[row, segment] = np.where(store.values("labels", 1)[ids] > 0, 1, -1)
        return {"labels": labels}
    stored = store.values("margins", 2)
    pairs, margins = np.zeros((2, len(rows), most // 2), np.float32)
    chosen = segment % 2 == 1
    place = row[chosen], segment[chosen] // 2
    pairs[place] = 1
    margins[place] = np.nan_to_num(stored[ids[chosen] // 2])
    return {"pairs": pairs, "margins": margins}


def make_batch(
    read: Rows,
    rows: np.ndarray,
    *,
    total: float,
    epoch: int = 0,
) -> Batch:
    """Shift by one, positions that restart in each document, and everything as tensors."""
    tokens = torch.from_numpy(read.tokens).long()
    return Batch(
        tokens=tokens,
        loss_mask=torch.from_numpy(read.loss_mask),
        targets=torch.roll(tokens, -1, dims=1),
        weight=torch.from_numpy(shifted_weight(read.loss_mask, read.segment_ids)),
        positions=torch.from_numpy(positions_of(read.segment_ids)),
        segments=torch.from_numpy(read.segment_ids).long(),
        total=total,
        epoch=epoch,
        rows=np.asarray(rows),
    )


def per_document(x: Tensor, segments: Tensor, count: int | None = None) -> Tensor:
    """Sums of `x` (B, T) over the documents `segments` (B, T) -> (B, count + 1), with a gradient.

    Column s is document s of the row, column 0 the padding. `count` is the most documents in a row;
    None asks the tensor for it, and so waits for a GPU.
    """
    if count is None:
        count = int(segments.max()) if segments.numel() else 0
    return x.new_zeros(len(x), count + 1).scatter_add(1, segments, x)


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    """Positions (B, T) int64 that count from 0 wherever the segment changes."""
    places = np.arange(segment_ids.shape[1])
    starts = np.zeros(segment_ids.shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)


def micro_batch_count(global_rows: int, world_size: int, micro_batch_size: int) -> int:
    """Into how many micro-batches every rank cuts its share of a global batch of `global_rows`."""
    share = -(-global_rows // world_size)  # the largest share: rank 0's
    return -(-share // micro_batch_size)


def shares_of(n_rows: int, rank: int, world_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """The rows of a rank's micro-batches of a whole file; equally many on every rank."""
    mine = np.arange(rank, n_rows, world_size)
    count = micro_batch_count(n_rows, world_size, micro_batch_size)
    return [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]


def micro_batches(batch: Batch, micro_batch_size: int, count: int | None = None) -> list[Batch]:
    """Cut a rank's share into `count` micro-batches of equal shape, on the batch's device.

    Missing rows are filled with empty ones (segment 0, weight 0, row -1). All ranks must pass the
    same `count` (`micro_batch_count`), so that all of them do the same number of backward passes;
    None takes as few as hold the batch.
    """
    n = len(batch.tokens)
    size = min(micro_batch_size, max(n, 1))
    needed = -(-n // size)
    count = max(needed, 1) if count is None else count
    if count < needed:
        raise ValueError(f"{n} rows do not fit into {count} micro-batches of {micro_batch_size}")
    return [_cut(batch, i * size, size) for i in range(count)]


def _cut(batch: Batch, start: int, size: int) -> Batch:
    rows = batch.rows[start : start + size]
    empty = size - len(rows)

    def part(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor[start : start + size], (0, 0, 0, empty))

    cut = map_tensors(dataclasses.replace(batch, plan=None), part)
    return dataclasses.replace(cut, rows=np.append(rows, np.full(empty, -1)))
