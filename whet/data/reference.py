"""Log-probabilities of documents under a reference model, computed once and kept in a file.

A safetensors file: for each packed file a tensor (documents,) float64, named by the packed file's
fingerprint, of the sum of weight x ln p(token) over the document; for KTO another one, whose name
ends in ` mismatched`, of the documents that `whet.data.rows.mismatched` makes of them; and in its
metadata the fingerprint of the model that gave them. Numbers of another model or of other data are
refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from whet.data.store import PackedStore
from whet.errors import UserError
from whet.files import replaced

MISMATCHED = " mismatched"


@dataclass
class Reference:
    """The numbers of one model, by the fingerprint of a packed file."""

    model: str
    """Fingerprint of the model."""
    logp: dict[str, np.ndarray] = field(default_factory=dict)
    """Fingerprint of a packed file -> (documents,) float64."""

    def rows(
        self, store: PackedStore, rows: np.ndarray, segments: int, kind: str = ""
    ) -> np.ndarray:
        """(B, segments + 1) float64 for some rows of `store`: column s is document s, column 0 the
        padding; 0 where there is no document. `kind` is "", or MISMATCHED."""
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
    path: Path,
    model: str,
    stores: dict[str, PackedStore],
    kinds: Sequence[str] = ("",),
    without: str = "remove it",
) -> Reference:
    """Read a file that must hold the numbers of this model and of these kinds, for all stores (by
    flag). `without`: what the user does to have them computed instead.

    Raises UserError if it is damaged, of another model, or lacks the numbers of a store.
    """
    again = f"; {without}, and they are computed again"
    try:
        with safetensors.safe_open(path, "numpy") as file:
            made_by = (file.metadata() or {}).get("model", "")
            logp = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path}: is no file of reference log-probabilities ({error}){again}"
        ) from None
    if made_by != model:
        raise UserError(
            f"{path}: was computed by another model than --model, or in another --precision: give "
            f"the same{again}"
        )
    for (flag, store), kind in product(stores.items(), kinds):
        if logp.get(store.fingerprint + kind, np.zeros(0)).shape == store.document_rows.shape:
            continue
        what = f"replies of {flag} {store.path}, or of the file that it was before"
        if store.fingerprint in logp:
            what = f"replies of {flag} {store.path} to other prompts, which --loss kto needs"
        raise UserError(f"{path}: holds no {what}{again}")
    return Reference(made_by, logp)
