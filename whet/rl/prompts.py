"""The prompts of a policy in training: what is asked, and what a reward needs to judge a reply."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from whet.chat.chat import Chat
from whet.chat.conversation import Message, Origin, read_conversation, shown
from whet.chat.encode import encode_prompt
from whet.data.reader import read_records
from whet.data.record import first_of, with_system
from whet.errors import UserError
from whet.evaluate.answers import extract_answer
from whet.evaluate.gsm8k import svamp_question
from whet.progress import track

GOLD_FIELDS = ("gold", "answer", "solution", "ground_truth")
SHOWN = 20  # lines that are named where many have the same fault


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
    or `Body` and `Question` (SVAMP). The gold number stands in `gold`, `answer`, `solution` or
    `ground_truth`. Prompts of more than `longest` tokens are left out. `needs_gold` is the reward
    that needs a gold number, "" if none does. Raises UserError that names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; expected JSON lines with prompt or question")
    found, too_long = list[Prompt](), list[int]()
    with track("Reading prompts", unit="prompts", quiet=quiet) as progress:
        for at, record in read_records(path, limit):
            prompt = _prompt(record, at, chat)
            progress.advance(1)
            if longest is not None and len(prompt.ids) > longest:
                too_long.append(at.line)
            else:
                found.append(prompt)
    if needs_gold and (lines := [p.line for p in found if p.gold is None]):
        raise UserError(
            f"{flag} {path}: the reward {needs_gold} needs a gold number in one of "
            f"{', '.join(GOLD_FIELDS)}, and {_lines(lines)} none"
        )
    if not found:
        raise UserError(f"{flag} {path}: no prompt in it fits the model's positions")
    notes = []
    if too_long:
        count = len(found) + len(too_long)
        notes.append(
            f"{path}: {len(too_long)} of {count} prompts were left out, as they have more "
            f"than {longest:,} tokens and leave no room for a reply ({_lines(too_long)} too long)"
        )
    return Prompts(path, found), notes


def _lines(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:SHOWN])) + (", …" if len(lines) > SHOWN else "")
    return f"line {shown} has" if len(lines) == 1 else f"lines {shown} have"


def _prompt(record: Any, at: Origin, chat: Chat) -> Prompt:
    if not isinstance(record, dict):
        raise at.error(f"expected an object, got {type(record).__name__}")
    messages = with_system(_asked(record, at), record, at)
    asked = read_conversation(messages, tools=record.get("tools"), at=at, asks=True)
    ids = encode_prompt(asked, chat, go_on=False)
    return Prompt(ids, messages, _gold(record), record, at.line)


def _asked(record: dict[str, Any], at: Origin) -> list[Message]:
    name = first_of(record, ("prompt", "messages", "question"))
    asked = record[name] if name else None
    if name is None and {"Body", "Question"} <= record.keys():
        name, asked = "Question", svamp_question(record)
    if name is None:
        names = ", ".join(map(str, record)) or "none"
        raise at.error(f"expected the field prompt, messages or question, got {names}")
    if isinstance(asked, str) and asked.strip():
        return [{"role": "user", "content": asked}]
    if not isinstance(asked, list) or not asked:
        raise at.error(f"{name} must be a text or a list of messages, got {shown(asked)}")
    if isinstance(asked[-1], dict) and asked[-1].get("role") == "assistant":
        raise at.error(
            "the messages end with the assistant's; expected them to end with what it is asked"
        )
    return asked


def _gold(record: dict[str, Any]) -> str | None:
    name = first_of(record, (*GOLD_FIELDS, "Answer"))
    value = record[name] if name else None
    usable = isinstance(value, str | int | float) and not isinstance(value, bool)
    return extract_answer(str(value)) if usable else None
