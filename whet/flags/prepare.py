"""The flags of `whet prepare`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from whet.config import FIRST, PLACE, Place, at_least, below_1, collected, from_0
from whet.errors import UserError
from whet.files import unwritable
from whet.flags.choices import Overlong, Refused
from whet.hub import check_name

GIVEN = "(given)"
"""In place of a tokenizer's name where a caller hands over the tokenizer itself."""


@dataclass(frozen=True)
class Config:
    """Make packed rows with loss masks of conversations."""

    data: Annotated[tuple[Annotated[str, PLACE], ...], FIRST] = ()
    """Files (.jsonl, .json, .parquet, .txt, each also .gz or .zst) or hub data sets
    NAME[@CONFIG][#SPLIT]. FILE:WEIGHT uses its conversations WEIGHT times (0.5: a random half)."""
    tokenizer: Annotated[Place, FIRST] = ""
    """Model or tokenizer directory, or Hub name, of the model that is to be trained."""
    out: Annotated[str, FIRST, PLACE] = "data/sft_packed.h5"
    """The packed file that is written."""
    context_length: Annotated[int, FIRST, at_least(2)] = 1024
    """Places of a row: the longest example that the model sees whole."""
    dev_out: Annotated[str | None, PLACE] = None
    """Packed file of the conversations that are held out for the dev loss."""
    dev_fraction: Annotated[float, below_1] = 0.0
    """Share of the conversations that go to --dev_out; the same opening keeps them together."""
    format: str | None = None
    """messages, sharegpt, alpaca, prompt_completion, dolly, gsm8k, text, tokenised, preferences or
    labels; by default recognised by the fields of each record."""
    fields: str | None = None
    """The file's own names of fields: messages=conversation,role=speaker; NAME= leaves one out."""
    overlong: Overlong = "drop"
    """Examples longer than a row: stop, leave out, or end after the last turn that fits whole."""
    refused: Refused = "error"
    """Lines that cannot be read and conversations without a provably right loss mask: stop, or
    leave them out, counted and recorded (drop_unproven: only the latter)."""
    decontaminate: tuple[Annotated[str, PLACE], ...] = ()
    """Evaluation files; conversations that share a question with them are left out."""
    chat_template: Annotated[str | None, PLACE] = None
    """plain, chatml or a template file instead of the tokenizer's own."""
    train_on: Literal["all", "last"] = "all"
    """Train every assistant turn, or the last one only."""
    rewritten_turns: Literal["split", "last", "error"] = "split"
    """Where the template rewrites earlier turns: an example each, the last turn only, or stop."""
    special_in_content: Literal["escape", "error", "allow"] = "escape"
    """Control tokens in somebody's text: encode as plain text, refuse, or let them through."""
    template_kwargs: str | None = None
    """Further variables for the template as a JSON object, such as '{"enable_thinking": false}'."""
    date: str | None = None
    """The date that the template gets, as 2025-12-31; today by default."""
    seed: Annotated[int, from_0] = 0
    """Fixes the dev part, the mixture and the order of the rows."""
    workers: Annotated[int | None, from_0] = None
    """Processes; all cores by default, 0 for none."""


def flaws(config: Config) -> list[str]:
    """What is wrong with the flags beside their values alone."""
    from whet.chat.chat import find_template, read_date
    from whet.chat.template import read_variables
    from whet.data.formats import FIELDS, FORMATS
    from whet.data.reader import check_path, parse_sources
    from whet.data.record import read_fields
    from whet.data.store import PACKED

    found: list[str] = []
    paths: list[str] = []
    if not config.data:
        found.append("--data: name at least one file")
    with collected(found):
        paths = [source.path for source in parse_sources(config.data)]
    for path in config.decontaminate:
        with collected(found):
            check_path(path, "--decontaminate")
    if config.dev_fraction < 1 and bool(config.dev_out) != bool(config.dev_fraction):
        found.append("--dev_out and --dev_fraction belong together: give both or neither")
    with collected(found):
        read_variables(config.template_kwargs)
    with collected(found):
        if config.date:
            read_date(config.date)
    with collected(found):
        if config.chat_template:
            _ = find_template(config.chat_template).described
    if config.format and config.format not in FORMATS:
        found.append(f"--format {config.format}: formats are {', '.join(FORMATS)}")
    with collected(found):
        read_fields(config.fields, FIELDS)
    inputs = [*paths, *config.decontaminate, config.tokenizer]
    found += unwritable("--out", config.out, inputs, PACKED)
    if config.dev_out:
        found += unwritable("--dev_out", config.dev_out, [*inputs, config.out], PACKED)
    with collected(found):
        if not config.tokenizer:
            raise UserError("--tokenizer: name the directory of the model's tokenizer")
        if config.tokenizer != GIVEN:
            check_name(config.tokenizer)
    return found
