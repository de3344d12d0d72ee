"""The flags of `whet prepare`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from whet.config import FIRST, PLACE, Place, at_least, below_1, from_0
from whet.flags.choices import Overlong, Refused


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
    """Flags that do not go together."""
    if config.dev_fraction < 1 and bool(config.dev_out) != bool(config.dev_fraction):
        return ["--dev_out and --dev_fraction belong together: give both or neither"]
    return []
