"""Which training conversations share a question with an evaluation file.

Two tests, as usual in the field: the same question after normalisation, and a common run of 13
words (GPT-3, appendix C of arXiv:2005.14165, uses 13-grams). Any text of the conversation is
searched for such runs, since a system prompt or an answer may contain the question, too.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whet.chat.conversation import Conversation, Origin, RawText
from whet.data.formats import Datum, to_example
from whet.data.reader import read_each, read_units
from whet.errors import UserError

GRAM = 13
WORD = re.compile(r"\w+")
QUESTION_KEYS = ("question", "problem", "prompt", "query", "instruction", "input")


def words_of(text: str) -> list[str]:
    """The words of `text` without case, punctuation, accents' spelling and spacing."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclass
class Evaluations:
    """The questions of evaluation files, to be searched for."""

    names: list[str] = field(default_factory=list)  # "file:line" of each question
    questions: dict[str, int] = field(default_factory=dict)  # normalised question -> its number
    grams: dict[str, int] = field(default_factory=dict)  # 13 words -> question's number

    def add(self, question: str, name: str) -> None:
        """Remember one question; `name` says where it stands."""
        words = words_of(question)
        if not words:
            return
        number = len(self.names)
        self.names.append(name)
        self.questions.setdefault(" ".join(words), number)
        for gram in _grams(words):
            self.grams.setdefault(gram, number)

    def match(self, datum: Datum) -> int:
        """The number of a question that `datum` shares, -1 if none. Ids are not searched."""
        if isinstance(datum, RawText):
            return self._match_words(words_of(datum.text))
        if not isinstance(datum, Conversation):
            return -1
        for message in datum.messages:
            words = words_of(str(message.get("content") or ""))
            if (
                message["role"] == "user"
                and (found := self.questions.get(" ".join(words))) is not None
            ):
                return found
            if (found := self._match_words(words)) >= 0:
                return found
        return -1

    def _match_words(self, words: list[str]) -> int:
        return next((self.grams[g] for g in _grams(words) if g in self.grams), -1)


def _grams(words: list[str]) -> Iterable[str]:
    return (" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))


def read_evaluations(paths: Iterable[str]) -> Evaluations:
    """The questions of evaluation files in any format that `to_example` reads, or with a question
    under one of QUESTION_KEYS (SVAMP's Body and Question are joined)."""
    evaluations = Evaluations()
    for path in paths:
        try:
            for question, at in read_each(Path(path), read_units(path), _question):
                evaluations.add(question, at.where)
        except UserError as error:
            lines = [f"{line} (--decontaminate)" for line in str(error).splitlines()]
            raise UserError("\n".join(lines)) from None
    return evaluations


def _question(record: dict[str, Any], at: Origin) -> tuple[str, Origin]:
    """The question of one evaluation record, the user's first words or a field of that name; and
    its place."""
    try:
        datum = to_example(record)
    except UserError:
        datum = None
    if isinstance(datum, Conversation):
        for message in datum.messages:
            if message["role"] == "user":
                return str(message["content"]), at
    if isinstance(datum, RawText):
        return datum.text, at
    fields = {str(key).lower(): value for key, value in record.items()}
    for key in QUESTION_KEYS:
        if isinstance(fields.get(key), str):
            body = fields.get("body")
            return (f"{body} {fields[key]}" if isinstance(body, str) else fields[key]), at
    raise at.error(
        "holds no question; expected a conversation or one of the fields "
        f"{', '.join(QUESTION_KEYS)}"
    )
