"""Log-probabilities of documents under a reference model, computed once and kept in a file.

A safetensors file: for each packed file a tensor (documents,) float64, named by the packed file's
fingerprint, of the sum of weight x ln p(token) over the document; for KTO another one, whose name
ends in ` mismatched`, of the documents that `mismatched` makes of them; and in its
metadata the fingerprint of the model that gave them. Numbers of another model or of other data are
refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from whet.data.layout import Rows
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.files import replaced

MISMATCHED = " mismatched"


@dataclass
class Reference:
    """The numbers of one model, by the fingerprint of a packed file."""

    model: str
    """Fingerprint of the model."""
    kinds: tuple[str, ...] = ("",)
    """Of which documents of each file: as they are (""), MISMATCHED."""
    logp: dict[str, np.ndarray] = field(default_factory=dict)
    """Fingerprint of a packed file, and kind -> (documents,) float64."""

    def rows(
        self, store: PackedStore, rows: np.ndarray, segments: int, kind: str = ""
    ) -> np.ndarray:
        """(B, segments + 1) float64 for some rows of `store`: column s is document s, column 0 the
        padding; 0 where there is no document."""
        found = np.zeros((len(rows), segments + 1))
        if (name := store.fingerprint + kind) in self.logp:
            row, segment, number = store.documents_in(rows)
            found[row, segment] = self.logp[name][number]
        return found

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as aside:
            safetensors.numpy.save_file(self.logp, aside, metadata={"model": self.model})


def read_reference(
    path: Path, wanted: Reference, stores: Mapping[str, PackedStore], without: str = "remove it"
) -> Reference:
    """Read a file that must hold the numbers of the model and kinds `wanted`, for all stores (by
    flag). `without`: what the user does to have them computed instead.

    Raises UserError if it is damaged, of another model, or lacks the numbers of a store.
    """
    again = f"; {without}, and they are computed again"
    try:
        with safetensors.safe_open(path, "numpy") as file:
            made_by = (file.metadata() or {}).get("model", "")
            logp = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        what = "is no file of reference log-probabilities"
        raise UserError(f"{path}: {what} ({error}){again}") from None
    if made_by != wanted.model:
        raise UserError(
            f"{path}: was computed by another model than --model, or in another --precision: give "
            f"the same{again}"
        )
    for (flag, store), kind in product(stores.items(), wanted.kinds):
        if logp.get(store.fingerprint + kind, np.zeros(0)).shape == store.document_rows.shape:
            continue
        what = f"replies of {flag} {store.path}, or of the file that it was before"
        if store.fingerprint in logp:
            what = f"replies of {flag} {store.path} to other prompts, which --loss kto needs"
        raise UserError(f"{path}: holds no {what}{again}")
    return replace(wanted, logp=logp)


def mismatched(read: Rows, size: int) -> Rows:
    """The rows with each reply after the prompt of the unit before it; units have `size` documents.

    A document's reply begins with its first trained token. Each row has the documents, numbers and
    tokens that it had, in another order; rows with a single unit have nothing to exchange and
    become empty.
    """
    found = Rows(*(np.zeros_like(array) for array in read))
    for row, segments in enumerate(read.segment_ids):
        count, end = int(segments.max(initial=0)), 0
        if count <= size:
            continue
        places = [np.flatnonzero(segments == number + 1) for number in range(count)]
        trained = [read.loss_mask[row, p] != 0 for p in places]
        border = [int(t.argmax()) if t.any() else len(t) for t in trained]
        for number in range(count):
            other = (number + size) % count
            prompt, reply = places[number][: border[number]], places[other][border[other] :]
            here = slice(end, end + len(prompt) + len(reply))
            taken = np.concatenate([prompt, reply])
            found.tokens[row, here] = read.tokens[row, taken]
            found.loss_mask[row, here] = read.loss_mask[row, taken]
            found.segment_ids[row, here] = number + 1
            end = here.stop
    return found
