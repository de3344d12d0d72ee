"""What a worker of `whet prepare` does: a block of records -> tokens, trained runs, refusals.

Results are a few flat arrays, which cross the border between processes fast and hold millions of
conversations in little memory. A loss mask is kept as its runs of equal weight.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from whet.chat.certificate import Refusal, refusal_of
from whet.chat.chat import Chat
from whet.chat.conversation import MESSAGE_KEYS, Conversation, RawText, Tokenised
from whet.chat.encode import Encoded, EncodeOptions, Example, encode_many
from whet.data.decontaminate import Evaluations
from whet.data.formats import IDS_KEYS, MASK_KEYS, Datum, to_example
from whet.data.layout import KINDS
from whet.data.preferences import Preference
from whet.data.reader import GOES_ON, Block, Unit, parse
from whet.data.record import renamed, rest
from whet.errors import UserError

CONVERSATION = np.dtype(
    [
        ("source", "<i4"),
        ("line", "<i8"),
        ("digest", "<u8", 2),  # of all ids and weights: equal for exact duplicates
        ("opening", "<u8"),  # of the first question: equal for what must not be split apart
        ("question", "<i4"),  # the evaluation question that it shares, -1 for none
        ("kind", "i1"),  # index into KIND_NAMES
        ("margin", "<f4"),  # of a pair of replies, as in `Preference`
        ("scores", "<f4", 2),
    ]
)
EXAMPLE = np.dtype(
    [
        ("conversation", "<i8"),
        ("part", "<i4"),  # of its conversation, from 0
        ("offset", "<i8"),  # of its first token among all tokens
        ("length", "<i8"),
        ("first_run", "<i8"),
        ("n_runs", "<i4"),
    ]
)
KIND_NAMES = tuple(KINDS)
RUN = np.dtype([("start", "<i4"), ("end", "<i4"), ("weight", "<f4")])
"""Tokens start..end of an example, which all have the loss weight `weight`, not 0."""

Pieces = list[tuple[np.ndarray, np.ndarray]]
"""(ids, loss mask) of examples that stay together."""


class Entry(NamedTuple):
    """A row of the table of conversations before it is one."""

    datum: Datum
    pieces: Pieces
    first_part: int  # the number of pieces[0] among the examples of the datum


@dataclass
class EncodedBlock:
    """The arrays count conversations, tokens and runs from the beginning of the block."""

    source: int
    lines: int
    size: int  # of the block that was read, in bytes
    conversations: np.ndarray
    examples: np.ndarray
    runs: np.ndarray
    tokens: np.ndarray  # int32
    refusals: list[Refusal]
    notes: Counter[str]  # what certificates count: escaped control tokens, split tokens, ...
    unused: Counter[str]  # fields that nothing reads: records that have them
    renamed: Counter[str]  # fields of the file that `--fields` names: records that have them


@dataclass(frozen=True)
class BlockEncoder:
    """`encoder(block)` encodes a block; pickled once for each worker process."""

    chat: Chat
    options: EncodeOptions
    paths: tuple[str, ...]  # of the sources
    context_length: int  # into pieces of which raw text is cut
    format: str | None = None
    fields: dict[str, str] = field(default_factory=dict)  # as `read_fields` gives them
    evaluations: Evaluations | None = None
    text_only: bool = False  # for pretraining: everything is trained, conversations are refused

    def __call__(self, block: Block) -> EncodedBlock:
        path = self.paths[block.source]
        data: list[Datum] = []
        refusals: list[Refusal] = []
        renames: Counter[str] = Counter()
        for unit in block.units:
            try:
                datum = self._read(unit, path, renames)
                if empty := _empty_reply(datum, self.options.train_on):
                    refusals.append(empty)
                else:
                    data.append(datum)
            except UserError as error:
                refusals.append(Refusal("datum", str(error), path, unit.line))
        flat = [side for datum in data for side in sides_of(datum)]
        results = iter(encode_many(flat, self.chat, self.options))
        kept: list[Entry] = []
        notes: Counter[str] = Counter()
        for datum in data:
            own = [next(results) for _ in sides_of(datum)]
            if refused := _judge(datum, own):
                refusals.append(refused)
                continue
            encoded = [result for result in own if isinstance(result, Encoded)]
            kept += self._entries(datum, [e for result in encoded for e in result.examples])
            for result in encoded:
                _count(notes, result)
            if isinstance(datum, Preference):
                notes["pairs whose chosen reply has the lower score; are they swapped?"] += (
                    datum.margin < 0
                )
        conversations = self._describe(block.source, kept)
        examples, runs, tokens = _flatten(kept)
        refusals.sort(key=lambda refusal: refusal.line)
        lines = sum(not unit.goes_on for unit in block.units)  # a long text is one document
        size = block.size
        return EncodedBlock(
            block.source, lines, size, conversations, examples, runs, tokens, refusals, notes,
            Counter(name for datum in data for name in self._unused(datum)), renames,
        )  # fmt: skip

    def _read(self, unit: Unit, path: str, renames: Counter[str]) -> Datum:
        try:
            record = parse(unit)
        except UserError as error:
            raise UserError(f"{path}:{unit.line}: {error}") from None
        if self.fields and isinstance(record, dict):
            record = renamed(record, self.fields, renames)
        if not self.text_only:
            datum = to_example(record, self.format, path, unit.line)
            if isinstance(datum, Tokenised) and not any(datum.mask[1:]):
                raise datum.at.error("its mask trains no token after the first")
            return datum
        for key in IDS_KEYS if isinstance(record, Mapping) else ():
            if isinstance(record.get(key), list):
                mask = record.get("attention_mask") or [1] * len(record[key])
                record = {**rest(record, *MASK_KEYS), "mask": mask}
                break
        datum = to_example(record, self.format, path, unit.line)
        if isinstance(datum, Conversation | Preference):
            raise datum.at.error(
                "is a conversation; pretraining reads plain text (.txt, or records with `text` or "
                "`ids`), `whet prepare` and `whet sft` train on conversations"
            )
        return datum

    def _entries(self, datum: Datum, encoded: Sequence[Example]) -> list[Entry]:
        """The examples of a conversation together. Text is cut into rows, no token of it lost, and
        each row is an entry of its own: a part of a long text can be held out for dev."""
        examples = [(example.ids, example.loss_mask) for example in encoded]
        if not isinstance(datum, RawText) and not self.text_only:
            return [Entry(datum, examples, 0)]
        ((ids, mask),) = examples
        if datum.extra.get(GOES_ON) and self.chat.tokenizer.eos_id is not None:
            ids, mask = ids[:-1], mask[:-1]
        cuts = [slice(i, i + self.context_length) for i in range(0, len(ids), self.context_length)]
        return [Entry(datum, [(ids[cut], mask[cut])], part) for part, cut in enumerate(cuts)]

    def _describe(self, source: int, kept: Sequence[Entry]) -> np.ndarray:
        """The table of conversations, column by column: far faster than entry by entry."""
        table = np.zeros(len(kept), CONVERSATION)
        table["source"] = source
        table["line"] = [entry.datum.at.line for entry in kept]
        digests = b"".join(_digest(entry) for entry in kept)
        table["digest"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
        openings = np.array([_opening(entry.datum) for entry in kept], np.uint64)
        table["opening"] = np.where(openings == 0, table["digest"][:, 0], openings)
        table["question"] = -1
        table["margin"], table["scores"] = np.nan, np.nan
        for number, entry in enumerate(kept):
            if isinstance(entry.datum, Preference):
                table["kind"][number] = 1 if len(entry.datum.sides) == 2 else 2
                table["margin"][number] = entry.datum.margin
                table["scores"][number, : len(entry.datum.scores)] = entry.datum.scores
        if self.evaluations:
            found = {id(entry.datum): entry.datum for entry in kept}  # a text has many entries
            question = {key: self._question(datum) for key, datum in found.items()}
            table["question"] = [question[id(entry.datum)] for entry in kept]
        return table

    def _question(self, datum: Datum) -> int:
        """The number of the evaluation question that `datum` shares, -1 if none."""
        if isinstance(datum, Tokenised):
            datum = RawText(self.chat.tokenizer.decode(datum.ids))
        if not self.evaluations:
            return -1
        return max(self.evaluations.match(side) for side in sides_of(datum))

    def _unused(self, datum: Datum) -> set[str]:
        """The fields of its record that say something and that nothing reads."""
        found = {k for k, v in datum.extra.items() if v not in (None, "", [], {}) and k != GOES_ON}
        for side in sides_of(datum):
            for message in side.messages if isinstance(side, Conversation) else ():
                if len(message) > 2:
                    others = message.keys() - MESSAGE_KEYS
                    found |= {f"messages.{k}" for k in others if k not in self._template_words}
        return found

    @cached_property
    def _template_words(self) -> set[str]:
        """The words of the templates, which may read any key of a message."""
        return set(re.findall(r"\w+", " ".join(t.source for t in self.chat.templates)))


def sides_of(datum: Datum) -> tuple[Conversation | RawText | Tokenised, ...]:
    """What of `datum` is encoded on its own."""
    return datum.sides if isinstance(datum, Preference) else (datum,)


def _empty_reply(datum: Datum, train_on: str) -> Refusal | None:
    """Why `datum` is left out if a reply that would be trained has no text, thought or tool call:
    from it a model learns to stop before it says anything."""
    for side in sides_of(datum):
        if not isinstance(side, Conversation):
            continue
        replies = [i for i, message in enumerate(side.messages) if message["role"] == "assistant"]
        for i in replies[-1:] if train_on == "last" else replies:
            reply = side.messages[i]
            said = reply.get("content", "") + reply.get("reasoning_content", "")
            if side.weights[i] != 0 and not said.strip() and not reply.get("tool_calls"):
                reason = f"message {i + 1} (assistant): the reply is empty"
                return refusal_of(datum, "empty_reply", reason)
    return None


def _judge(datum: Datum, sides: Sequence[Encoded | Refusal]) -> Refusal | None:
    """Why `datum` is left out, None if it is not: its first refusal, or sides that are no pair."""
    for side in sides:
        if isinstance(side, Refusal):
            return side
    if not isinstance(datum, Preference):
        return None
    examples = [e for side in sides if isinstance(side, Encoded) for e in side.examples]
    if len(examples) != len(sides):
        return refusal_of(datum, "rewritten", "the template rewrites earlier turns of a reply")
    if len(examples) == 2:
        starts = [int(np.argmax(example.loss_mask != 0)) for example in examples]
        prompts = [e.ids[:start] for e, start in zip(examples, starts, strict=True)]
        if not np.array_equal(prompts[0], prompts[1]):
            reason = "the template renders other prompts before the chosen and the rejected reply"
            return refusal_of(datum, "prompts", reason)
        if np.array_equal(examples[0].ids, examples[1].ids):
            return refusal_of(datum, "equal_sides", "chosen and rejected are the same")
    return None


def _digest(entry: Entry) -> bytes:
    digest = blake2b(digest_size=16)
    for ids, mask in entry.pieces:
        digest.update(ids.data)
        digest.update(mask.data)
    if isinstance(entry.datum, Preference) and len(entry.datum.sides) == 1:
        digest.update(repr(entry.datum.scores).encode())  # good and bad are no duplicates
    return digest.digest()


def _opening(datum: Datum) -> int:
    """A hash of the first thing that the user says, whatever its case and spacing; 0 if nothing."""
    if not isinstance(datum, Conversation):
        return 0
    for message in datum.messages:
        if message["role"] == "user":
            words = " ".join(str(message["content"]).casefold().split())
            hashed = blake2b(words.encode("utf-8", "replace"), digest_size=8).digest()
            return int.from_bytes(hashed, "little")
    return 0


def _flatten(kept: Sequence[Entry]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples, runs and tokens of many conversations.

    The mask of an example's first token is dropped: nothing precedes it that could predict it.
    """
    flat = [piece for entry in kept for piece in entry.pieces]
    examples = np.zeros(len(flat), EXAMPLE)
    if not flat:
        return examples, np.zeros(0, RUN), np.zeros(0, np.int32)
    examples["conversation"] = np.repeat(np.arange(len(kept)), [len(e.pieces) for e in kept])
    examples["part"] = [e.first_part + i for e in kept for i in range(len(e.pieces))]
    examples["length"] = [len(ids) for ids, _ in flat]
    starts = np.cumsum(examples["length"]) - examples["length"]
    examples["offset"] = starts
    tokens = np.concatenate([ids for ids, _ in flat]).astype(np.int32, copy=False)
    mask = np.concatenate([mask for _, mask in flat]).astype(np.float32)
    mask[starts] = 0
    # A run begins where the weight changes and where an example begins.
    begins = np.zeros(len(mask), bool)
    begins[1:] = mask[1:] != mask[:-1]
    begins[starts] = True
    first = np.flatnonzero(begins)
    end = np.append(first[1:], len(mask))
    weight = mask[first]
    owner = np.searchsorted(starts, first, "right") - 1
    trained = weight != 0
    runs = np.zeros(int(trained.sum()), RUN)
    runs["start"] = (first - starts[owner])[trained]
    runs["end"] = (end - starts[owner])[trained]
    runs["weight"] = weight[trained]
    examples["n_runs"] = np.bincount(owner[trained], minlength=len(flat))
    examples["first_run"] = np.cumsum(examples["n_runs"]) - examples["n_runs"]
    return examples, runs, tokens


def _count(notes: Counter[str], encoded: Encoded) -> None:
    certificate = encoded.certificate
    notes[
        "control tokens in texts, encoded as plain text (--special_in_content allow: as control)"
    ] += certificate.escaped
    notes["tokens split at the border of a reply"] += certificate.split_tokens
    split = len(encoded.examples) > 1
    notes["conversations split because the template rewrites earlier turns"] += split
    lengths = [len(example.ids) for example in encoded.examples]
    again = "tokens more through such splits; --rewritten_turns last trains their last turn alone"
    notes[again] += sum(lengths) - max(lengths)
    notes["replies closed with the stop token that the template leaves out"] += certificate.closed
    differs = "conversations with a reply that the template does not render after its prompt"
    notes[f"{differs}; put there"] += certificate.composed
    notes["turns left out by --rewritten_turns last"] += len(certificate.untrained_turns)
