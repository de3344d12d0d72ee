"""What is examined, the user's model, a few rows made of his own documents, his machine; and what
a check finds: a claim, the measured difference, its bound, and the verdict.

Documents are cut to a few dozen tokens around the place where their training begins, so that a
check costs seconds whatever the file's context length: no claim depends on the length.

Shape letters: B rows, T tokens, n tokens of a document.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from whet.chat.certificate import Refusal
from whet.chat.chat import Chat
from whet.chat.conversation import Origin
from whet.chat.encode import Datum, encode_many
from whet.data.batches import Batch, make_batch
from whet.data.encoding import sides_of
from whet.data.formats import to_example
from whet.data.reader import read_each, read_units
from whet.data.store import PackedStore, Rows, new_store, row_weights
from whet.errors import UserError
from whet.model.decoder import Transformer
from whet.model.hf.checkpoint import empty_model, save_model
from whet.model.hf.config import from_hf, to_hf

ROWS = 5
"""With batches of 4 rows the last one has a single row: a rank of two then has none."""
DOCUMENTS_PER_ROW = 3
SCANNED_ROWS = 256  # of the packed file, evenly spread
SCANNED_CONVERSATIONS = 200
LARGE = 200_000_000
"""Parameters above which the checks that run processes take the first two layers only."""


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table."""

    claim: str
    """What Whet promises, as a sentence without a full stop."""
    verdict: Literal["pass", "fail", "skipped"]
    measured: float | None = None
    """The difference that was seen; None where nothing was measured."""
    bound: float | None = None
    """The largest difference that still passes."""
    note: str = ""
    """On what it was measured, why it was skipped, or how it failed."""


def judge(claim: str, measured: float, bound: float, note: str = "") -> Finding:
    """Pass if `measured` is at most `bound`; NaN fails."""
    verdict: Literal["pass", "fail"] = "pass" if measured <= bound else "fail"
    return Finding(claim, verdict, float(measured), float(bound), note)


def skipped(why: str, *claims: str) -> list[Finding]:
    """Claims that cannot be tried here."""
    return [Finding(claim, "skipped", note=why) for claim in claims]


def failed(claim: str, how: str) -> Finding:
    """A claim whose check ended without a number."""
    return Finding(claim, "fail", note=how)


def worse(one: float, other: float) -> float:
    """The larger of two differences; NaN, which `max` may lose, is the largest."""
    return one if one != one or one > other else other


@dataclass(frozen=True)
class Difference:
    """Relative differences of two ways to the same loss, as measured or as rounding explains them
    where the same is summed in another order. Log-probs of single tokens count as gradients do."""

    loss: float
    gradient: float


BOUNDS = {
    # Some 20 times and 200 times what is seen (docs/doctor.md), as depth and vocabulary add to it.
    torch.float32: Difference(1e-5, 1e-4),
    # bf16 has 8 bits: each product is rounded by up to 0.4 %.
    torch.bfloat16: Difference(1e-2, 1e-1),
}


@dataclass(frozen=True)
class Document:
    """ids (n,) int64 and loss_mask (n,) float32, not shifted."""

    ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Setting:
    """Where and in which precision the checks of numbers run."""

    name: str
    device: torch.device
    dtype: torch.dtype | None
    """Of autocast; None is float32."""

    @property
    def bounds(self) -> Difference:
        """The largest differences that still pass."""
        return BOUNDS[self.dtype or torch.float32]


@dataclass
class Subject:
    """What the checks are given."""

    model: Transformer
    chat: Chat | None
    store: PackedStore | None
    data: list[Datum]
    """The first conversations of --conversations."""
    rows: list[list[Document]]
    """What the packed rows are made of; the last row is left untrained on purpose."""
    row_tokens: int
    settings: list[Setting]
    scratch: Path
    """A folder for what the checks write."""

    @property
    def documents(self) -> list[Document]:
        return [document for row in self.rows for document in row]

    @property
    def trained(self) -> list[Document]:
        """The documents in which some token is a trained target."""
        return [document for document in self.documents if document.loss_mask[1:].any()]

    def arrays(self) -> Rows:
        """The packed rows, each array (B, T)."""
        shape = (len(self.rows), self.row_tokens)
        read = Rows(
            np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        )
        for i, row in enumerate(self.rows):
            start = 0
            for number, document in enumerate(row, 1):
                here = slice(start, start + len(document.ids))
                read.tokens[i, here] = document.ids
                read.loss_mask[i, here] = document.loss_mask
                read.segment_ids[i, here] = number
                start = here.stop
        return read

    def batch(self) -> Batch:
        """The packed rows as the batch of one step."""
        read = self.arrays()
        total = float(row_weights(read.loss_mask, read.segment_ids).sum())
        return make_batch(read, np.arange(len(self.rows)), total=total)

    def packed_file(self) -> Path:
        """The packed rows as a file."""
        path = self.scratch / "rows.h5"
        if not path.exists():
            read = self.arrays()
            with new_store(path, len(self.rows), self.row_tokens, weighted=True) as writer:
                writer.write_rows(*read)
        return path

    def saved_model(self) -> Path:
        """The model as a directory that Whet has saved."""
        path = self.scratch / "model"
        if not path.exists():
            save_model(self.model.cpu(), path, self.chat, {"stage": "doctor"})
        return path

    @property
    def is_large(self) -> bool:
        """Whether processes that train it would hold too much."""
        return sum(p.numel() for p in self.model.parameters()) > LARGE

    def small_model(self) -> tuple[Path, str]:
        """What the checks that run processes train: a directory, and a note if it is a part."""
        if not self.is_large:
            return self.saved_model(), ""
        path = self.scratch / "small"
        if not path.exists():
            small = first_layers(self.model, 2)
            save_model(small.cpu(), path, self.chat, {"stage": "doctor"})
        return path, "on the first 2 layers of the model"


def alone(document: Document, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A document without packing: tokens, targets (1, n - 1) int64, weight (1, n - 1) float32.

    Shifted here by hand: what the batch does is among what is examined.
    """
    ids = torch.from_numpy(document.ids).to(device)[None]
    weight = torch.from_numpy(document.loss_mask).to(device)[None, 1:]
    return ids[:, :-1], ids[:, 1:], weight


def prompt_of(document: Document) -> list[int]:
    """What stands before the first trained token, or the first token."""
    first = int(np.flatnonzero(document.loss_mask)[0])
    return document.ids[: max(1, first)].tolist()


def first_layers(model: Transformer, n: int) -> Transformer:
    """The model of the first `n` layers, which shares the weights of `model`."""
    values = to_hf(model.config)
    values |= {key: n for key in ("num_hidden_layers", "n_layer", "n_layers") if key in values}
    values |= {
        key: values[key][:n] for key in ("layer_types", "ropes", "windows") if values.get(key)
    }
    shorter = empty_model(from_hf(values))
    kept = shorter.state_dict().keys()
    state = {name: value for name, value in model.state_dict().items() if name in kept}
    shorter.load_state_dict(state, assign=True)
    return shorter.requires_grad_()


def read_conversations(path: Path, format: str | None) -> list[Datum]:
    """The first conversations of a data file; raises UserError for the first that is none."""

    def read(record: dict[str, Any], at: Origin) -> Sequence[Datum]:
        return sides_of(to_example(record, format, at.source, at.line))

    units = itertools.islice(read_units(str(path)), SCANNED_CONVERSATIONS)
    data = [datum for sides in read_each(path, units, read) for datum in sides]
    if not data:
        raise UserError(f"--conversations {path}: holds nothing")
    return data


def sample_rows(
    vocab_size: int,
    row_tokens: int,
    store: PackedStore | None,
    data: Sequence[Datum],
    chat: Chat | None,
) -> list[list[Document]]:
    """Rows of documents from the packed file, else of the conversations, else of random ids."""
    longest = row_tokens // DOCUMENTS_PER_ROW
    refused: list[Refusal] = []
    if store is not None:
        found = list(_stored(store))
    elif data and chat is not None:
        results = encode_many(data, chat)
        refused = [result for result in results if isinstance(result, Refusal)]
        found = [
            Document(example.ids.astype(np.int64), example.loss_mask)
            for result in results
            if not isinstance(result, Refusal)
            for example in result.examples
        ]
    else:
        found = list(_random(vocab_size, longest))
    cut = [_cut(document, longest) for document in found if len(document.ids) > 1]
    cut = [document for document in cut if document.loss_mask[1:].any()]
    if not cut:
        why = f"; the first was refused: {refused[0]}" if refused else ""
        raise UserError(f"the data hold no document with a trained token: nothing to examine{why}")
    wanted = ROWS * DOCUMENTS_PER_ROW
    # Evenly spread over what was found; few documents are used more than once.
    chosen = [cut[i * len(cut) // wanted] for i in range(wanted)]
    rows = [chosen[i::ROWS] for i in range(ROWS)]
    rows[-1] = [Document(d.ids, np.zeros_like(d.loss_mask)) for d in rows[-1]]
    return rows


def _stored(store: PackedStore) -> Iterator[Document]:
    wanted = np.unique(np.linspace(0, len(store) - 1, SCANNED_ROWS).astype(np.int64))
    for i in wanted:
        read = store.rows([i])
        segments = read.segment_ids[0]
        borders = [0, *(np.flatnonzero(np.diff(segments)) + 1), len(segments)]
        for start, end in itertools.pairwise(borders):
            if segments[start]:
                ids = read.tokens[0, start:end].astype(np.int64)
                yield Document(ids, read.loss_mask[0, start:end].copy())


def _random(vocab_size: int, longest: int) -> Iterator[Document]:
    rng = np.random.default_rng(0)
    for _ in range(ROWS * DOCUMENTS_PER_ROW):
        n = int(rng.integers(longest // 2, longest + 1))
        mask = (np.arange(n) >= n // 2).astype(np.float32)
        yield Document(rng.integers(0, vocab_size, n), mask)


def _cut(document: Document, longest: int) -> Document:
    """At most `longest` tokens around the place where the training begins."""
    trained = np.flatnonzero(document.loss_mask)
    middle = int(trained[0]) if len(trained) else 0
    start = max(0, min(middle - longest // 2, len(document.ids) - longest))
    here = slice(start, start + longest)
    return Document(document.ids[here], document.loss_mask[here].astype(np.float32))
