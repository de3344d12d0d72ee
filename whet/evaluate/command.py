"""`whet eval`: dev loss and GSM8K accuracy of a model."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from whet.config import problems
from whet.data.store import PackedStore
from whet.evaluate.dev import dev_loss, misfits
from whet.evaluate.gsm8k import Sample, gsm8k_accuracy, load_gsm8k, write_samples
from whet.files import replaced, unwritable, write_json
from whet.generate.opened import Device, Opened, Precision, open_model
from whet.progress import say


@dataclass
class Config:
    """Measure a model: loss on packed rows, accuracy on word problems."""

    run: Positional[Path]
    """Run folder, model directory or `.pt` file."""
    gsm8k: Path | None = None
    """Problems to answer: GSM8K's test.jsonl, or SVAMP."""
    dev: Path | None = None
    """Packed file to measure the loss on, made by `whet prepare`."""
    limit: int | None = None
    """Only the first so many problems."""
    json: Path | None = None
    """Write the numbers here."""
    samples: Path | None = None
    """Write every question, reply, extracted and gold answer here, one JSON object a line."""
    max_new_tokens: int = 256
    """Longest reply."""
    batch_size: int = 32
    """Problems that are answered at once."""
    micro_rows: int = 4
    """Rows of the packed file in one forward."""
    tokenizer: Path | None = None
    """Tokenizer directory; default: the model's own."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Precision of the weights; auto: bf16 on CUDA."""


def main(config: Config) -> int:
    """Run `whet eval`."""
    _check(config)
    started = time.monotonic()
    numbers: dict[str, Any] = {"run": str(config.run)}
    samples: list[Sample] = []
    # Both files before the model: a typing error shows at once.
    questions = load_gsm8k(config.gsm8k, config.limit) if config.gsm8k else None
    store = PackedStore(config.dev) if config.dev else None
    opened = open_model(config.run, config.tokenizer, config.device, config.precision)
    if store is not None:
        numbers |= _measure_loss(store, opened, config.micro_rows)
    if questions is not None:
        found = gsm8k_accuracy(
            *opened,
            questions,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
        say(
            f"accuracy: {found.correct:,} of {found.n:,} right, {100 * found.accuracy:.1f} % "
            f"(95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %); "
            f"{found.unanswered:,} without a number, {found.unstopped:,} without an end"
        )
        samples = found.samples
        numbers |= {
            "gsm8k": str(config.gsm8k),
            "accuracy": found.accuracy,
            "interval_95": [found.low, found.high],
            "correct": found.correct,
            "n": found.n,
            "unanswered": found.unanswered,
            "unstopped": found.unstopped,
        }
    numbers["seconds"] = round(time.monotonic() - started, 3)
    if config.json:
        with replaced(config.json) as aside:
            write_json(aside, numbers)
    if config.samples:
        write_samples(samples, config.samples)
    return 0


def _check(config: Config) -> None:
    found = []
    if config.gsm8k is None and config.dev is None:
        found.append("nothing to measure: give --gsm8k FILE, --dev FILE, or both")
    if config.samples and config.gsm8k is None:
        found.append("--samples: there are samples with --gsm8k only")
    for flag in ("limit", "max_new_tokens", "batch_size", "micro_rows"):
        value = getattr(config, flag)
        if value is not None and value < 1:
            found.append(f"--{flag} {value}: expected at least 1")
    others: list[Path | None] = [config.run, config.gsm8k, config.dev, config.tokenizer]
    for flag in ("json", "samples"):
        path = getattr(config, flag)
        if path and not path.absolute().parent.is_dir():
            found.append(f"--{flag} {path}: the folder {path.absolute().parent} does not exist")
        elif path:
            found += unwritable(f"--{flag}", path, others)
            others.append(path)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        found.append("whet eval runs in one process; start it without torchrun")
    problems(found)


def _measure_loss(store: PackedStore, opened: Opened, micro_rows: int) -> dict[str, Any]:
    model, chat = opened
    problems(misfits(model, chat, store, "--dev"))
    device = next(model.parameters()).device
    found = dev_loss(
        model,
        store,
        micro_rows=micro_rows,
        device=device,
        stop_ids=chat.stop_ids,
        quiet=False,
    )
    stops = "none" if found.stop_probability is None else f"{found.stop_probability:.3f}"
    say(
        f"dev loss: {found.loss:.4f} (ppl {found.ppl:.3f}) over {found.tokens:,} trained tokens; "
        f"probability of the stop token where replies end: {stops}"
    )
    return {
        "dev": str(store.path),
        "dev_loss": found.loss,
        "ppl": found.ppl,
        "trained_tokens": found.tokens,
        "stop_probability": found.stop_probability,
    }
