"""Log-probabilities of documents under a reference model, computed once and kept in a file.

A safetensors file: for each packed file a tensor (documents,) float64, named by the packed file's
fingerprint, of the sum of weight x ln p(token) over the document; and in its metadata the
fingerprint of the model that gave them. Numbers of another model or of other data are refused.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from whet.data.store import PackedStore
from whet.errors import UserError
from whet.files import replaced


@dataclass
class Reference:
    """The numbers of one model, by the fingerprint of a packed file."""

    model: str
    """Fingerprint of the model."""
    logp: dict[str, np.ndarray] = field(default_factory=dict)
    """Fingerprint of a packed file -> (documents,) float64."""

    def rows(self, store: PackedStore, rows: np.ndarray, segments: int) -> np.ndarray:
        """(B, segments + 1) float64 for some rows of `store`: column s is document s, column 0 the
        padding; 0 where there is no document."""
        found = np.zeros((len(rows), segments + 1))
        if store.fingerprint in self.logp:
            row, segment, number = store.documents_in(rows)
            found[row, segment] = self.logp[store.fingerprint][number]
        return found

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as aside:
            safetensors.numpy.save_file(self.logp, aside, metadata={"model": self.model})


def read_reference(path: Path, model: str, stores: dict[str, PackedStore]) -> Reference:
    """Read a file that must hold the numbers of this model, for the stores (by flag) that it has.

    Raises UserError if it is damaged, of another model, or lacks the numbers of a store.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            made_by = (file.metadata() or {}).get("model", "")
            logp = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: is no file of reference log-probabilities ({error})") from None
    if made_by != model:
        raise UserError(
            f"{path}: was computed by another model than --model, or in another precision; leave "
            "it out to compute it again"
        )
    for flag, store in stores.items():
        if logp.get(store.fingerprint, np.zeros(0)).shape != store.document_rows.shape:
            raise UserError(
                f"{path}: holds nothing of {flag} {store.path}, or of the file that it was before; "
                "leave it out to compute it again"
            )
    return Reference(made_by, logp)
