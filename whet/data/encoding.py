"""What a worker of `whet prepare` does: a block of records -> tokens, trained runs, refusals.

Results are a few flat arrays, which cross the border between processes fast and hold millions of
conversations in little memory. A loss mask is kept as its runs of equal weight.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from whet.chat.certificate import Refusal
from whet.chat.encode import Encoded, EncodeOptions, encode_many
from whet.chat.formats import IDS_KEYS, Datum, to_example
from whet.chat.messages import Conversation, RawText, Tokenised
from whet.chat.tokenizer import Tokenizer
from whet.data.decontaminate import Evaluations
from whet.data.reader import Block, Unit, parse
from whet.errors import UserError

CONVERSATION = np.dtype(
    [
        ("source", "<i4"),
        ("line", "<i8"),
        ("digest", "<u8", 2),  # of all ids and weights: equal for exact duplicates
        ("opening", "<u8"),  # of the first question: equal for what must not be split apart
        ("question", "<i4"),  # the evaluation question that it shares, -1 for none
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
RUN = np.dtype([("start", "<i4"), ("end", "<i4"), ("weight", "<f4")])
"""Tokens start..end of an example, which all have the loss weight `weight`, not 0."""


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


@dataclass(frozen=True)
class BlockEncoder:
    """`encoder(block)` encodes a block; pickled once for each worker process."""

    tokenizer: Tokenizer
    options: EncodeOptions
    paths: tuple[str, ...]  # of the sources
    context_length: int  # into pieces of which raw text is cut
    format: str | None = None
    evaluations: Evaluations | None = None
    text_only: bool = False  # for pretraining: everything is trained, conversations are refused

    def __call__(self, block: Block) -> EncodedBlock:
        path = self.paths[block.source]
        data: list[Datum] = []
        refusals: list[Refusal] = []
        for unit in block.units:
            try:
                data.append(self._read(unit, path))
            except UserError as error:
                refusals.append(Refusal("datum", str(error), path, unit.line))
        results = encode_many(data, self.tokenizer, self.options)
        kept: list[tuple[Datum, list[tuple[np.ndarray, np.ndarray]]]] = []
        notes: Counter[str] = Counter()
        for datum, result in zip(data, results, strict=True):
            if isinstance(result, Refusal):
                refusals.append(result)
                continue
            kept.append((datum, self._pieces(datum, result)))
            _count(notes, result)
        conversations = np.zeros(len(kept), CONVERSATION)
        conversations["source"] = block.source
        for entry, (datum, pieces) in zip(conversations, kept, strict=True):
            self._describe(entry, datum, pieces)
        examples, runs, tokens = _flatten([pieces for _, pieces in kept])
        refusals.sort(key=lambda refusal: refusal.line)
        lines, size = len(block.units), block.size
        return EncodedBlock(
            block.source, lines, size, conversations, examples, runs, tokens, refusals, notes
        )

    def _read(self, unit: Unit, path: str) -> Datum:
        try:
            record = parse(unit)
        except UserError as error:
            raise UserError(f"{path}:{unit.line}: {error}") from None
        if not self.text_only:
            datum = to_example(record, self.format, path, unit.line)
            if isinstance(datum, Tokenised) and not any(datum.mask[1:]):
                raise UserError(f"{datum.where}: its mask trains no token behind the first")
            return datum
        ids_key = next((key for key in IDS_KEYS if record.get(key)), None)
        if ids_key and isinstance(record[ids_key], list):
            record = {"ids": record[ids_key], "mask": [1] * len(record[ids_key])}
        datum = to_example(record, self.format, path, unit.line)
        if isinstance(datum, Conversation):
            raise UserError(
                f"{datum.where}: is a conversation; pretraining reads plain text (.txt, or records "
                "with `text` or `ids`), `whet prepare` and `whet sft` train on conversations"
            )
        return datum

    def _pieces(self, datum: Datum, encoded: Encoded) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, mask) of each example. Raw text of more than a row is cut, no token of it lost."""
        examples = [(example.ids, example.loss_mask) for example in encoded.examples]
        if not isinstance(datum, RawText) and not self.text_only:
            return examples
        ((ids, mask),) = examples
        goes_on = not datum.extra.get("last", True)  # a piece of a file
        if goes_on and self.tokenizer.eos_id is not None:
            ids, mask = ids[:-1], mask[:-1]
        starts = range(0, len(ids), self.context_length)
        return [
            (ids[i : i + self.context_length], mask[i : i + self.context_length]) for i in starts
        ]

    def _describe(
        self, entry: np.void, datum: Datum, pieces: list[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        entry["line"] = datum.line
        digest = blake2b(digest_size=16)
        for ids, mask in pieces:
            digest.update(ids.tobytes())
            digest.update(mask.tobytes())
        entry["digest"] = np.frombuffer(digest.digest(), "<u8")
        entry["opening"] = _opening(datum) or entry["digest"][0]
        entry["question"] = -1
        if self.evaluations:
            if isinstance(datum, Tokenised):
                datum = RawText(self.tokenizer.decode(datum.ids))
            entry["question"] = self.evaluations.match(datum)


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


def _flatten(
    conversations: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples, runs and tokens of the (ids, mask) pieces of many conversations.

    The mask of an example's first token is dropped: nothing stands before it to predict it from.
    """
    flat = [piece for pieces in conversations for piece in pieces]
    examples = np.zeros(len(flat), EXAMPLE)
    if not flat:
        return examples, np.zeros(0, RUN), np.zeros(0, np.int32)
    parts = [len(pieces) for pieces in conversations]
    examples["conversation"] = np.repeat(np.arange(len(parts)), parts)
    examples["part"] = np.concatenate([np.arange(n) for n in parts])
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
    notes["control tokens in texts, encoded as plain text"] += certificate.escaped
    notes["tokens split at the border of a reply"] += certificate.split_tokens
    notes["conversations split because the template rewrites earlier turns"] += (
        certificate.rewritten
    )
    notes["replies closed with the stop token that the template leaves out"] += certificate.closed
    notes["turns left out by --rewritten_turns last"] += len(certificate.untrained_turns)
