"""`whet ledger RUN`: which documents a step saw, and which steps saw a document."""

from pathlib import Path
from typing import Any

import numpy as np

from whet.data.layout import KINDS
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.flags.ledger import Config
from whet.progress import say
from whet.rl.prompts import Prompts
from whet.rl.sampling import PolicyConfig
from whet.stages import pretrain
from whet.stages.replay import run_settings
from whet.train.ledger import RECORD, describe, named
from whet.train.stage import Documents


def main(config: Config) -> int:
    """`whet ledger RUN --step N` and `whet ledger RUN --document FILE:LINE`."""
    records, documents = open_ledger(config.run)
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
        for found in sorted(describe(wanted, documents), key=lambda d: -d["loss"]):
            say(f"{named(found)}  trained {found['trained']}  loss {found['loss']:.4f}")
        return 0
    assert config.document is not None
    wanted = records[np.isin(records["document"], documents_at(config.document, documents))]
    for record, found in zip(wanted, describe(wanted, documents), strict=True):
        side = f"  {found['side']}" if "side" in found else ""
        say(f"step {record['step']}{side}  trained {found['trained']}  loss {found['loss']:.4f}")
    if len(wanted) == 0:
        say("no step has seen it yet")
    return 0


def open_ledger(run: Path) -> tuple[np.ndarray, Documents]:
    """The records of a run, and the documents that they name."""
    settings, _ = run_settings(run)
    try:
        raw = (run / "ledger.bin").read_bytes()
    except OSError as error:
        raise UserError(f"{run}: is not the folder of a run with a ledger ({error})") from None
    whole = len(raw) - len(raw) % RECORD.itemsize  # a running process may be writing
    return np.frombuffer(raw[:whole], RECORD), documents_of(settings)


def documents_of(settings: Any) -> Documents:
    """What the ledger of a run with these settings names."""
    if isinstance(settings, PolicyConfig):
        return Prompts(settings.prompts, [])
    is_text = isinstance(settings, pretrain.Config)
    return PackedStore(pretrain.packed(settings) if is_text else settings.data, KINDS)


def documents_at(place: str, documents: Documents) -> np.ndarray:
    """The numbers of the documents that were read from `FILE:LINE`."""
    file, _, line = place.rpartition(":")
    if not file or not line.isdigit():
        raise UserError(f"--document {place}: expected FILE:LINE, e.g. train.jsonl:17")
    try:
        return documents.find(file, int(line))
    except UserError as error:
        raise UserError(f"--document {error}") from None
