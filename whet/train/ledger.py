"""The step ledger: which documents each optimizer step saw, and with what loss.

`ledger.bin` in the run folder is an array of `RECORD`, sorted by step and document. Documents are
numbers of the stage's `Documents`, which know file and line; so the ledger takes 16 bytes for a
document and step. `whet ledger` (stages/ledger.py) reads it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from whet.data.batches import Batch, per_document
from whet.train.stage import Documents

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
    counts = per_document((batch.weight != 0).long(), batch.segments, segments)
    return Seen(step, batch.rows, per_document(nll.double(), batch.segments, segments), counts)


def records_of(seen: Sequence[Seen], documents: Documents) -> np.ndarray:
    """`RECORD`s of some micro-batches, sorted by step and document; untrained ones are left out."""
    parts = [np.zeros(0, RECORD)]
    for item in seen:
        trained = item.trained.cpu().numpy()
        row, segment = np.nonzero(trained)
        part = np.zeros(len(row), RECORD)
        part["step"] = item.step
        part["document"] = documents.numbers(item.rows[row], segment)
        part["trained"] = trained[row, segment]
        with np.errstate(over="ignore"):
            part["loss"] = item.nll.cpu().numpy()[row, segment] / trained[row, segment]
        parts.append(part)
    return in_order(np.concatenate(parts))


def in_order(records: np.ndarray) -> np.ndarray:
    """Sorted by step, then by document: the ledger does not depend on ranks and micro-batches."""
    return records[np.lexsort((records["document"], records["step"]))]


def describe(records: np.ndarray, documents: Documents) -> list[dict]:
    """The records for people: file, line and side, trained tokens and their mean loss."""
    return [
        {**place, "trained": int(record["trained"]), "loss": float(record["loss"])}
        for place, record in zip(documents.places(records["document"]), records, strict=True)
    ]


def named(document: dict) -> str:
    """A described document: `FILE:LINE`, of pairs and labelled replies also which one it is."""
    return f"{document['file']}:{document['line']} {document.get('side', '')}".rstrip()


def incident(
    step: int, reason: str, loss: float, norm: float, documents: Sequence[dict], run: Path
) -> dict:
    """What is written of a step that is not applied, to `incidents/step_XXXXXXXX.json`."""
    return {
        "step": step,
        "reason": reason,
        "train_loss": as_json(loss),
        "grad_norm": as_json(norm),
        "replay": f"whet replay {run} --step {step}",
        "documents": [{**document, "loss": as_json(document["loss"])} for document in documents],
    }


def as_json(value: float) -> float | str:
    """JSON knows no NaN and no infinity: a text stands for them."""
    return value if math.isfinite(value) else str(value)
