"""Units: the documents of a row that belong together, and what the data say of them."""

import numpy as np

from whet.data.store import PackedStore

KINDS_OF_UNITS = ("preferences", "labels")
"""Kinds of packed files whose documents belong together, or are labelled."""


def documents_in(store: PackedStore, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index into `rows`, number in its row from 1) of each document of these rows."""
    first, end = (np.searchsorted(store.document_rows, rows, side) for side in ("left", "right"))
    counts = end - first
    row = np.repeat(np.arange(len(rows)), counts)
    segment = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    return row, segment


def extra_of(store: PackedStore, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What a packed file of these kinds adds to a batch of `rows`, float32.

    A row of `preferences` holds whole pairs: documents 2p + 1 and 2p + 2 are the chosen and the
    rejected reply of its pair p (from 0). `pairs` (B, P) is 1 where the row has that pair and
    `margins` (B, P) is by how much the chosen one is better, 0 where the data do not say.
    Of `labels`, `labels` (B, S + 1) is 1 for a good document, -1 for a bad one and 0 where there is
    none: column s is document s of the row, column 0 the padding.
    """
    row, segment = documents_in(store, rows)
    ids, most = store.document_ids(rows), int(segment.max(initial=0))
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
