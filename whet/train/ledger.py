"""The step ledger: which documents each optimizer step saw, and with what loss.

`ledger.bin` in the run folder is an array of `RECORD`, sorted by step and document. Documents are
numbers of the packed file's table, which knows file and line; so the ledger takes 16 bytes for a
document and step.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from whet.data.batches import Batch
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.flags.ledger import Config
from whet.progress import say

RECORD = np.dtype([("step", "<u4"), ("document", "<u4"), ("trained", "<u4"), ("loss", "<f4")])
"""`trained` tokens of the document in this step, and their mean -ln p."""


@dataclass(frozen=True)
class Seen:
    """The documents of one micro-batch, still on the device: reading them would wait for it."""

    step: int
    rows: np.ndarray  # (B,) row numbers, -1 for an empty row
    nll: torch.Tensor  # (B, S + 1) summed over each segment
    trained: torch.Tensor  # (B, S + 1) tokens with a weight


def see(step: int, batch: Batch, segments: int, nll: torch.Tensor) -> Seen:
    """Sum `nll` (B, T) over the documents of a batch that has `segments` of them in a row."""
    shape = (len(batch.segments), segments + 1)
    sums = torch.zeros(shape, dtype=torch.float64, device=nll.device)
    counts = torch.zeros(shape, dtype=torch.int64, device=nll.device)
    sums.scatter_add_(1, batch.segments, nll.double())
    counts.scatter_add_(1, batch.segments, (batch.weight != 0).long())
    return Seen(step, batch.rows, sums, counts)


def records_of(seen: Sequence[Seen], store: PackedStore) -> np.ndarray:
    """`RECORD`s of some micro-batches, sorted by step and document; untrained ones are left out."""
    parts = [np.zeros(0, RECORD)]
    for item in seen:
        trained = item.trained.cpu().numpy()
        row, segment = np.nonzero(trained)
        part = np.zeros(len(row), RECORD)
        part["step"] = item.step
        part["document"] = _first_document(store, item.rows[row]) + np.maximum(segment - 1, 0)
        part["trained"] = trained[row, segment]
        with np.errstate(over="ignore"):
            part["loss"] = item.nll.cpu().numpy()[row, segment] / trained[row, segment]
        parts.append(part)
    return in_order(np.concatenate(parts))


def in_order(records: np.ndarray) -> np.ndarray:
    """Sorted by step, then by document: the ledger does not depend on ranks and micro-batches."""
    return records[np.lexsort((records["document"], records["step"]))]


def _first_document(store: PackedStore, rows: np.ndarray) -> np.ndarray:
    """The number of each row's first document."""
    return np.searchsorted(store.document_rows, rows.astype(store.document_rows.dtype), "left")


def describe(records: np.ndarray, store: PackedStore) -> list[dict]:
    """The records with the documents' file and line, for people; of a packed file without a table
    of documents its own name and the row, counted from 1."""
    sources = store.attrs.get("sources") or []
    found = []
    for record in records:
        document = int(record["document"])
        if document < len(store.documents):
            entry = store.documents[document]
            source = source_name(sources, int(entry["source"]))
            place = {"file": source, "line": int(entry["line"])}
        else:
            place = {"file": str(store.path), "line": int(store.document_rows[document]) + 1}
        loss = float(record["loss"])
        found.append({**place, "trained": int(record["trained"]), "loss": loss})
    return found


def source_name(sources: Sequence, index: int) -> str:
    """The file of a source; the packed file keeps names, or objects that hold one."""
    entry = sources[index] if 0 <= index < len(sources) else f"source {index}"
    return str(entry.get("path", entry) if isinstance(entry, dict) else entry)


def main(config: Config) -> int:
    """`whet ledger RUN --step N` and `whet ledger RUN --document FILE:LINE`."""
    records, store = open_ledger(config.run)
    if (config.step is None) == (config.document is None):
        raise UserError("whet ledger: give either --step N or --document FILE:LINE")
    if config.step is not None:
        wanted = records[records["step"] == config.step]
        if len(wanted) == 0:
            last = int(records["step"][-1]) if len(records) else 0
            raise UserError(
                f"--step {config.step}: the ledger of {config.run} has steps 1 to {last}"
                if last
                else f"--step {config.step}: the ledger of {config.run} is empty"
            )
        for found in sorted(describe(wanted, store), key=lambda d: -d["loss"]):
            place = f"{found['file']}:{found['line']}"
            say(f"{place}  trained {found['trained']}  loss {found['loss']:.4f}")
        return 0
    assert config.document is not None
    wanted = records[np.isin(records["document"], documents_at(config.document, store))]
    for record in wanted:
        say(f"step {record['step']}  trained {record['trained']}  loss {record['loss']:.4f}")
    if len(wanted) == 0:
        say("no step has seen it yet")
    return 0


def open_ledger(run: Path) -> tuple[np.ndarray, PackedStore]:
    """The records of a run and the packed file that it trained on."""
    try:
        data = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["data"]
        raw = (run / "ledger.bin").read_bytes()
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{run}: is not the folder of a run with a ledger ({error})") from None
    whole = len(raw) - len(raw) % RECORD.itemsize  # a running process may be writing
    path = run / "packed.h5" if isinstance(data, list) else Path(data)
    return np.frombuffer(raw[:whole], RECORD), PackedStore(path)


def documents_at(place: str, store: PackedStore) -> np.ndarray:
    """The numbers of the documents that were read from `FILE:LINE`."""
    file, _, line = place.rpartition(":")
    if not file or not line.isdigit():
        raise UserError(f"--document {place}: expected FILE:LINE, e.g. train.jsonl:17")
    if len(store.documents) == 0 and Path(file).name == store.path.name:
        return np.flatnonzero(store.document_rows == int(line) - 1)
    sources = store.attrs.get("sources") or []
    names = [source_name(sources, index) for index in range(len(sources))]
    fitting = [i for i, name in enumerate(names) if name == file or name.endswith("/" + file)]
    if not fitting:
        raise UserError(f"--document {place}: no such source; there are {', '.join(names)}")
    table = store.documents
    found = np.flatnonzero(np.isin(table["source"], fitting) & (table["line"] == int(line)))
    if len(found) == 0:
        raise UserError(f"--document {place}: no document of {store.path} comes from there")
    return found
