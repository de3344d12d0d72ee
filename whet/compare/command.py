"""`whet compare`: what each stage has changed, with intervals and an exact test."""

from dataclasses import asdict
from pathlib import Path

from whet.compare.measure import Measured, measure
from whet.compare.table import as_text, page, rows_of
from whet.files import replaced, write_json, write_text
from whet.flags.compare import Config
from whet.generate.opened import Opened, open_model
from whet.progress import say


def main(config: Config) -> int:
    """Run `whet compare`."""
    measured = list[Measured]()
    first: Opened | None = None
    for path in config.models:
        say(f"{path}:")
        opened = open_model(path, device=config.device, precision=config.precision, score=None)
        measured.append(measure(_name(path, config.models), opened, first, config))
        if first is None and not opened.model.config.score:
            first = opened
    rows = rows_of(measured)
    say()
    say(as_text(rows))
    if any("gained" in row for row in rows):
        say()
        say(
            "right: greedy replies with the gold number, 95 % interval; gained and lost: against "
            "the model before; p: how often chance alone would differ so"
        )
    if config.json:
        content = {"models": rows, "replies": [asdict(each) for each in measured]}
        with replaced(config.json) as aside:
            write_json(aside, content)
    if config.html:
        write_text(config.html, page(rows, measured))
        say(f"page: {config.html}")
    return 0


def _name(path: str, models: tuple[str, ...]) -> str:
    """The folder's own name, where no other model has it."""
    names = [Path(model).name for model in models]
    name = Path(path).name
    return name if names.count(name) == 1 else path
