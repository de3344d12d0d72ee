"""Histograms as plain SVG: no plotting library, and they follow the page's colours."""

from collections.abc import Callable
from html import escape
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 480, 150  # of the drawing, in its own units; the page scales it
BASE = HEIGHT - 22  # where the bars stand; below it the axis is labelled
TOP = 16  # room for the label of the highest bar
GAP = 1.5


def lengths_figure(lengths: np.ndarray) -> str:
    """Histogram of the lengths of the documents, in tokens."""
    if not len(lengths):
        return ""
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


def fills_figure(fills: np.ndarray, width: int) -> str:
    """Histogram of how much of each row is filled, in percent of its `width` places."""
    if not len(fills):
        return ""
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
) -> str:
    """Bars of `counts` over `edges` (one more than bars), the highest count, three ticks."""
    highest = int(counts.max())
    step = WIDTH / len(counts)
    bars = []
    for i, (count, name) in enumerate(zip(counts, names, strict=True)):
        # A bar of one document among a million must still be seen.
        height = max(1.5, (BASE - TOP) * count / highest) if count else 0
        bars.append(
            f'<rect class="bar" x="{i * step:.2f}" y="{BASE - height:.2f}" '
            f'width="{max(step - GAP, 1):.2f}" height="{height:.2f}">'
            f"<title>{escape(name)}: {count:,}</title></rect>"
        )
    peak = (int(counts.argmax()) + 0.5) * step
    anchor = "start" if peak < 40 else "end" if peak > WIDTH - 40 else "middle"
    at = {"start": 0, "end": WIDTH, "middle": peak}[anchor]
    middle = (edges[0] + edges[-1]) / 2
    return (
        f"<figure><figcaption>{escape(title)}<small>{escape(words)}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}: {escape(words)}">'
        f'{"".join(bars)}<line class="axis" x1="0" y1="{BASE}" x2="{WIDTH}" y2="{BASE}"/>'
        f'<text x="{at:.1f}" y="{TOP - 5}" text-anchor="{anchor}">{highest:,}</text>'
        f'<text x="0" y="{HEIGHT - 6}">{label(edges[0])}</text>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{label(middle)}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 6}" text-anchor="end">{label(edges[-1])}</text>'
        "</svg></figure>"
    )
