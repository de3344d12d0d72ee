"""Encoded examples on their way from the workers to the packed file.

Tokens wait in a nameless temporary file beside the output, which vanishes with the process, however
it ends; what is known of them, some 250 bytes for each conversation, waits in memory.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from whet.chat.certificate import Refusal
from whet.data.encoding import CONVERSATION, EXAMPLE, RUN, EncodedBlock
from whet.errors import UserError

KEPT_REFUSALS = 10_000
"""Refusals that are kept with their texts; all of them are counted."""


class Spool:
    """Blocks in, in order; afterwards the tables, and the tokens of any example."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError, here and later, if nothing can be written there."""
        self._folder = folder
        with self._as_user_error():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".whet-tokens-")  # noqa: SIM115
        self._conversations: list[np.ndarray] = []
        self._examples: list[np.ndarray] = []
        self._runs: list[np.ndarray] = []
        self._counts = [0, 0, 0]  # conversations, runs, tokens so far
        self.refusals: list[Refusal] = []
        self.refused: Counter[tuple[int, str]] = Counter()  # by source and kind
        self.lines: Counter[int] = Counter()  # read, by source
        self.notes: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()  # records that have a field which nothing reads
        self.renamed: Counter[str] = Counter()  # records that have a field of `--fields`

    @property
    def n_tokens(self) -> int:
        """Tokens so far."""
        return self._counts[2]

    def add(self, block: EncodedBlock) -> None:
        """Take over a block; its numbers are shifted to follow those already here."""
        n_conversations, n_runs, n_tokens = self._counts
        block.examples["conversation"] += n_conversations
        block.examples["first_run"] += n_runs
        block.examples["offset"] += n_tokens
        self._conversations.append(block.conversations)
        self._examples.append(block.examples)
        self._runs.append(block.runs)
        with self._as_user_error():
            self._file.write(block.tokens.astype("<i4", copy=False).data)
        self._counts = [
            n_conversations + len(block.conversations),
            n_runs + len(block.runs),
            n_tokens + len(block.tokens),
        ]
        self.lines[block.source] += block.lines
        for own, of_block in (
            (self.notes, block.notes),
            (self.unused, block.unused),
            (self.renamed, block.renamed),
        ):
            own.update(of_block)
        for refusal in block.refusals:
            self.refused[block.source, refusal.kind] += 1
            if len(self.refusals) < KEPT_REFUSALS:
                self.refusals.append(refusal)

    def refused_by_kind(self) -> Counter[str]:
        """How many lines were refused, over all sources."""
        kinds: Counter[str] = Counter()
        for (_, kind), n in self.refused.items():
            kinds[kind] += n
        return kinds

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All conversations, examples and runs; ends the adding."""
        with self._as_user_error():
            self._file.flush()
        joined = (
            np.concatenate([np.zeros(0, CONVERSATION), *self._conversations]),
            np.concatenate([np.zeros(0, EXAMPLE), *self._examples]),
            np.concatenate([np.zeros(0, RUN), *self._runs]),
        )
        self._conversations, self._examples, self._runs = [], [], []
        return joined

    def tokens(self, offset: int, length: int) -> np.ndarray:
        """Tokens offset..offset+length, int32."""
        return np.frombuffer(os.pread(self._file.fileno(), 4 * length, 4 * offset), "<i4")

    @contextmanager
    def _as_user_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--out: {self._folder} cannot be written: {error.strerror}; nothing is left there"
            ) from None

    def close(self) -> None:
        """Let go of the tokens."""
        with suppress(OSError):  # what could not be written is tried again
            self._file.close()
