"""What `whet inspect` shows, whether it was read from a packed file or made from one conversation."""

import os
from dataclasses import dataclass, field

import numpy as np

@dataclass(frozen=True)
class SourceAccount:
    """Where the tokens of one source went: tokens = trained + context + truncated + dropped."""

    source: str
    documents: int
    tokens: int
    trained: int
    context: int
    truncated: int
    dropped: int


@dataclass(frozen=True)
class Refusal:
    """A line of the data that was not packed, and why."""

    source: str
    line: int
    reason: str


@dataclass(frozen=True)
class Sheet:
    """Some rows of a packed file, and what is known about the whole file."""

    title: str
    tokens: np.ndarray
    """(N, T) int32: the rows that are shown."""
    mask: np.ndarray
    """(N, T): weight of each token in the loss; 0 is context."""
    documents: np.ndarray
    """store.DOCUMENT, sorted by row and start: the documents of the shown rows, whose first is row 0."""
    sources: list[str]
    index: np.ndarray
    """(N, T): where in `texts` the text of each token is."""
    texts: list[str]
    """Token texts, safe to print."""
    lengths: np.ndarray
    """Tokens of every document of the file."""
    fills: np.ndarray
    """Filled places of every row of the file."""
    trained: int
    """Trained tokens of the file."""
    first: int = 0
    """Number of the first row that is shown."""
    facts: dict[str, str] = field(default_factory=dict)
    accounts: list[SourceAccount] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    refused: int = 0
    """How many lines were refused; `refusals` may hold only the first of them."""

    def text(self, row: int, start: int, end: int) -> list[str]:
        """The texts of tokens start..end of `row`."""
        return [self.texts[i] for i in self.index[row, start:end]]

    @property
    def width(self) -> int:
        """Places of a row (T)."""
        return int(self.tokens.shape[1])


def short_names(sources: list[str]) -> list[str]:
    """The sources without the folder that all of them share."""
    folders = {os.path.dirname(source) for source in sources}
    if len(folders) == 1:
        return [os.path.basename(source) or source for source in sources]
    try:
        shared = os.path.commonpath(folders)
    except ValueError:  # absolute and relative paths, or an empty list
        return list(sources)
    return [os.path.relpath(source, shared) if shared else source for source in sources]
