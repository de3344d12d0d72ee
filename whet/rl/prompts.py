"""The prompts of a policy in training: what is asked, and what a reward needs to judge a reply."""

import hashlib
import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from whet.chat.chat import Chat
from whet.chat.conversation import Message, Origin, shown
from whet.chat.encode import encode_prompt
from whet.data.reader import SHOWN, read_each, read_units
from whet.data.record import check_asked, conversation_of, first_of, nested
from whet.errors import UserError
from whet.evaluate.answers import gold_of, same_number
from whet.evaluate.gsm8k import GOLD_FIELDS, svamp_question
from whet.progress import track


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file."""

    ids: list[int]
    """What the model is asked, header of the reply included."""
    messages: list[Message]
    gold: str | None
    """The right number in plain form; None if the line has none."""
    columns: dict[str, Any]
    """All fields of the line, for rewards that need others."""
    line: int
    """From 1."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file. As the `Documents` of a stage they are numbered by their lines."""

    path: Path
    prompts: list[Prompt]

    @cached_property
    def fingerprint(self) -> str:
        """Of what is asked and what is right."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.ids, prompt.gold]).encode())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.prompts)

    def numbers(self, rows: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """A file of prompts alone: each is a row with one document."""
        return np.array([self.prompts[int(row)].line for row in rows])

    def places(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """File and line."""
        return [{"file": str(self.path), "line": int(line)} for line in numbers]

    def find(self, file: str, line: int) -> np.ndarray:
        """The prompt of a line; the end of the file's name is enough."""
        if not str(self.path).endswith(file):
            raise UserError(f"{file}:{line}: the prompts are those of {self.path}")
        return np.array([line])


def load_prompts(
    path: str | Path,
    chat: Chat,
    *,
    longest: int | None = None,
    limit: int | None = None,
    needs_gold: str = "",
    flag: str = "--prompts",
    quiet: bool = True,
) -> tuple[Prompts, list[str]]:
    """The first `limit` prompts of a file with their ids, and notes on those that were left out.

    A line is an object with `prompt` (a text or a list of messages), `messages`, `question` (GSM8K)
    or `Body` and `Question` (SVAMP). The gold number stands in the first field that a line has of
    GOLD_FIELDS. Prompts of more than `longest` tokens are left out. `needs_gold` is the reward that
    needs a gold number, "" if none does. Raises UserError that names file and lines.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; expected JSON lines with prompt or question")
    units = list(itertools.islice(read_units(str(path)), limit))
    with track("Reading prompts", total=len(units), unit="prompts", quiet=quiet) as progress:

        def read(record: dict[str, Any], at: Origin) -> Prompt:
            progress.advance(1)
            return _prompt(record, at, chat)

        read_all = read_each(path, units, read)
    found = [p for p in read_all if longest is None or len(p.ids) <= longest]
    too_long = [p.line for p in read_all if longest is not None and len(p.ids) > longest]
    if needs_gold and (lines := [p.line for p in found if p.gold is None]):
        raise UserError(
            f"{flag} {path}: the reward {needs_gold} needs a gold number in one of "
            f"{', '.join(GOLD_FIELDS)}, and {_lines(lines)} none"
        )
    if not found:
        raise UserError(f"{flag} {path}: no prompt in it fits the model's positions")
    notes = []
    if too_long:
        notes.append(
            f"{path}: {len(too_long)} of {len(units)} prompts were left out, as they have more "
            f"than {longest:,} tokens and leave no room for a reply ({_lines(too_long)} too long)"
        )
    return Prompts(path, found), notes


def _lines(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:SHOWN])) + (", …" if len(lines) > SHOWN else "")
    return f"line {shown} has" if len(lines) == 1 else f"lines {shown} have"


def _prompt(record: dict[str, Any], at: Origin, chat: Chat) -> Prompt:
    check_asked(record, at)
    conversation = conversation_of(_messages(record, at), record, at, asks=True)
    if conversation.messages[-1]["role"] == "assistant":
        raise at.error(
            "the messages end with the assistant's; expected them to end with what it is asked"
        )
    ids = encode_prompt(conversation, chat, go_on=False)
    return Prompt(ids, conversation.messages, _gold(record), record, at.line)


def _messages(record: dict[str, Any], at: Origin) -> list[Any]:
    name = first_of(record, ("prompt", "messages", "question"))
    asked = nested(record[name], name, at) if name else None
    if name is None and {"Body", "Question"} <= record.keys():
        name, asked = "Question", svamp_question(record)
    if name is None:
        names = ", ".join(map(str, record)) or "none"
        raise UserError(f"expected the field prompt, messages or question, got {names}")
    if isinstance(asked, str) and asked.strip():
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, list) or not asked:
        raise UserError(f"{name} must be a text or a list of messages, got {shown(asked)}")
    return asked


def _gold(record: dict[str, Any]) -> str | None:
    name = first_of(record, (*GOLD_FIELDS, "Answer"))
    number = gold_of(record[name]) if name else None
    return number if same_number(number, number) else None
