"""What `whet inspect` shows, be it read from a packed file or made from one conversation."""

from dataclasses import dataclass, field

import numpy as np

from whet.data.account import SourceAccount


@dataclass(frozen=True)
class LeftOut:
    """A line of the data that is not in the file, and why."""

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
    """store.DOCUMENT, by row and start: the documents of the shown rows; the first is row 0."""
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
    notes: list[str] = field(default_factory=list)
    """What the file says of each shown document, such as its reward; empty if it says nothing."""
    facts: dict[str, str] = field(default_factory=dict)
    turns: list[tuple[int, str, str]] = field(default_factory=list)
    """Of one conversation: number of each message from 1, its role, and what becomes of it."""
    accounts: list[SourceAccount] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    """Lines that were refused or left out, with reasons; may be only the first of them."""
    left_out_counts: dict[str, int] = field(default_factory=dict)
    """How many there are, all of them, for each kind of reason."""

    def text(self, row: int, start: int, end: int) -> list[str]:
        """The texts of tokens start..end of `row`."""
        return [self.texts[i] for i in self.index[row, start:end]]

    @property
    def width(self) -> int:
        """Places of a row (T)."""
        return int(self.tokens.shape[1])


def document_name(document: np.void, names: list[str]) -> str:
    """`source:line` of an entry of the documents table, and which example of its line it is."""
    source, line, part = (int(document[name]) for name in ("source", "line", "part"))
    name = names[source] if 0 <= source < len(names) else "source unknown"
    where = f"{name}:{line}" if line > 0 else name
    return f"{where} part {part + 1}" if part else where
