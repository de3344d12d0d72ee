"""`whet compare`: what each stage has changed, with intervals and an exact test."""

import os
from dataclasses import asdict

from whet.compare.measure import Measured, measure, prompts_of
from whet.compare.page import page
from whet.compare.table import as_text, rows_of
from whet.config import collected, problems
from whet.data.store import PackedStore
from whet.files import replaced, short_names, write_json, write_text
from whet.flags.compare import Config
from whet.flags.policy import parse_reward
from whet.generate.opened import Opened, open_chat, open_model
from whet.hub import find_model
from whet.progress import say
from whet.rl.rewards import PythonReward


def main(config: Config) -> int:
    """Run `whet compare`."""
    _examine(config)
    measured = list[Measured]()
    first: Opened | None = None
    names = short_names([os.path.normpath(path) for path in config.models])
    for path, name in zip(config.models, names, strict=True):
        say(f"{path}:")
        opened = open_model(path, device=config.device, precision=config.precision, score=None)
        measured.append(measure(name, opened, first, config))
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


def _examine(config: Config) -> None:
    """Raise UserError with all that is wrong with the files, before the first model is measured;
    what does not fit a single model is known when that one is open."""
    found: list[str] = []
    with collected(found):
        if config.dev:
            PackedStore(config.dev)
    with collected(found):
        if config.pairs:
            PackedStore(config.pairs, kinds=("preferences",))
    for place in (parse_reward(text)[0] for text in config.reward):
        with collected(found):
            if place.rpartition(":")[0].endswith(".py"):
                PythonReward(place, config.reward_seconds).close()
    with collected(found):
        if config.gsm8k:
            prompts_of(config, open_chat(find_model(config.models[0])))
    problems(found)
