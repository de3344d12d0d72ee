"""Histograms for `parts.html` to draw as SVG: no plotting library, and the page's own colours."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

WIDTH, HEIGHT = 480, 150  # of the drawing, in its own units; the page scales it
BASE = HEIGHT - 22  # where the bars stand; below it the axis is labelled
TOP = 16  # room for the label of the highest bar
GAP = 1.5
Figure = dict[str, Any]
"""What `parts.html` draws."""


def lengths_figure(lengths: np.ndarray) -> Figure:
    """Histogram of the lengths of the documents, in tokens."""
    longest = int(lengths.max())
    edges = np.unique(np.linspace(0, longest, min(longest, 40) + 1).astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    median = float(np.median(lengths))
    words = (
        f"{len(lengths):,} documents, median {median:,.0f} tokens, "
        f"99 % within {np.percentile(lengths, 99):,.0f}, longest {longest:,}"
    )
    # np.histogram's bins are [from, to), except the last, which holds its upper edge as well.
    upper = [*(edges[1:-1] - 1), edges[-1]]
    names = [
        f"{a:,}–{b:,} tokens" if a != b else f"{a:,} tokens"
        for a, b in zip(edges[:-1], upper, strict=True)
    ]
    return _figure("Length of the documents", words, counts, names, edges, lambda x: f"{x:,.0f}")


def fills_figure(fills: np.ndarray, width: int) -> Figure:
    """Histogram of how much of each row is filled, in percent of its `width` places."""
    share = fills / width
    lowest = np.floor(share.min() * 20) / 20 if share.min() < 1 else 0.95
    edges = np.linspace(lowest, 1, 41)
    counts, _ = np.histogram(share, edges)
    full = int((fills == width).sum())
    words = f"{len(fills):,} rows, {full:,} full, {100 * share.mean():.2f} % of all places filled"
    names = [f"{100 * a:.1f}–{100 * b:.1f} % filled" for a, b in pairwise(edges)]
    return _figure("Fill of the rows", words, counts, names, edges, lambda x: f"{100 * x:.4g} %")


def _figure(
    title: str,
    words: str,
    counts: np.ndarray,
    names: list[str],
    edges: np.ndarray,
    label: Callable[[float], str],
) -> Figure:
    """Bars of `counts` over `edges` (one more than bars), the highest count, three ticks."""
    highest = int(counts.max())
    step = WIDTH / len(counts)
    bars = []
    for i, (count, name) in enumerate(zip(counts, names, strict=True)):
        # A bar of one document among a million must still be seen.
        height = max(1.5, (BASE - TOP) * count / highest) if count else 0
        place = (i * step, BASE - height, max(step - GAP, 1), height)
        bars.append((*(f"{number:.2f}" for number in place), f"{name}: {count:,}"))
    peak = (int(counts.argmax()) + 0.5) * step
    anchor = "start" if peak < 40 else "end" if peak > WIDTH - 40 else "middle"
    ends = {"start": (0, edges[0]), "middle": (WIDTH / 2, (edges[0] + edges[-1]) / 2)}
    ends |= {"end": (WIDTH, edges[-1])}
    at = peak if anchor == "middle" else ends[anchor][0]
    ticks = [(x, HEIGHT - 6, anchor, label(edge)) for anchor, (x, edge) in ends.items()]
    return {
        "title": title,
        "words": words,
        "width": WIDTH,
        "height": HEIGHT,
        "base": BASE,
        "bars": bars,
        "labels": [(f"{at:.1f}", TOP - 5, anchor, f"{highest:,}"), *ticks],
    }
