"""`whet eval`: dev loss and GSM8K accuracy of a model."""

import time
from typing import Any

from whet.config import problems
from whet.data.store import PackedStore
from whet.evaluate.dev import dev_loss
from whet.evaluate.gsm8k import Sample, gsm8k_accuracy, load_gsm8k, write_samples
from whet.files import replaced, write_json
from whet.flags.eval import Config
from whet.generate.opened import Opened, open_asked
from whet.model.open import misfits, template_misfit
from whet.progress import say


def main(config: Config) -> int:
    """Run `whet eval`."""
    started = time.monotonic()
    numbers: dict[str, Any] = {"run": str(config.run)}
    samples: list[Sample] = []
    # Both files before the model: a typing error shows at once.
    questions = load_gsm8k(config.gsm8k, config.limit) if config.gsm8k else None
    store = PackedStore(config.dev) if config.dev else None
    opened = open_asked(config.run, config)
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
        names = ("accuracy", "correct", "n", "unanswered", "unstopped")
        numbers |= {"gsm8k": str(config.gsm8k), "interval_95": [found.low, found.high]}
        numbers |= {name: getattr(found, name) for name in names}
    numbers["seconds"] = round(time.monotonic() - started, 3)
    if config.json:
        with replaced(config.json) as aside:
            write_json(aside, numbers)
    if config.samples:
        write_samples(samples, config.samples)
    return 0


def _measure_loss(store: PackedStore, opened: Opened, micro_rows: int) -> dict[str, Any]:
    model, chat = opened
    problems(misfits(model, chat, store, "--dev"))
    for line in template_misfit(chat, store, "--dev", "what the model is asked with"):
        say(f"note: {line}")
    found = dev_loss(
        model,
        store,
        micro_rows=micro_rows,
        device=opened.device,
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
