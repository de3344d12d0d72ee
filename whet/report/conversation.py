"""One conversation: how it is rendered, which tokens are trained, and what its certificate says."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whet.chat.certificate import Certificate
from whet.chat.chat import Chat
from whet.chat.conversation import Conversation
from whet.chat.encode import Datum, Encoded, encode_chat
from whet.data.formats import to_example
from whet.data.layout import DOCUMENT
from whet.data.preferences import Preference
from whet.data.reader import parse, read_units
from whet.errors import UserError
from whet.report.pieces import token_texts, visible
from whet.report.sheet import Sheet
from whet.report.terminal import Ink, marked, rule, spans_text


@dataclass(frozen=True)
class EncodedLine:
    """One line of a data file as it is trained on."""

    datum: Datum
    encoded: Encoded
    chat: Chat


def encode_line(reference: str, chat: Chat) -> EncodedLine:
    """Encode the conversation at `FILE:LINE`, counted from 1; in `.json` and Parquet, the record.

    Raises UserError if there is no such line, and Refused, a UserError, with the reason if the
    conversation has no certain loss mask.
    """
    path, colon, number = reference.rpartition(":")
    if not colon or not number.isdecimal() or int(number) == 0:
        raise UserError(
            f"--conversation {reference}: expected FILE.jsonl:LINE, counted from 1; in .json and "
            "Parquet the number of the record"
        )
    if not Path(path).is_file():
        raise UserError(f"--conversation {reference}: there is no file {path}")
    line = int(number)
    unit = next((unit for unit in read_units(path) if unit.line >= line), None)
    if unit is None or unit.line != line:
        raise UserError(
            f"--conversation {reference}: {path} has no conversation at line or record {line:,}"
        )
    try:
        record = parse(unit)
    except UserError as error:
        raise UserError(f"{path}:{line}: {error}") from None
    datum = to_example(record, None, path, line)
    if isinstance(datum, Preference):
        raise datum.at.error("is preference data; inspect the file that `whet prepare` makes")
    return EncodedLine(datum, encode_chat(datum, chat), chat)


def conversation_lines(shown: EncodedLine, ink: Ink) -> Iterator[str]:
    """The rendering, the turns and the certificate, for the terminal."""
    examples = shown.encoded.examples
    yield marked(shown.datum.at.where, ink.title)
    yield ink.legend
    for number, example in enumerate(examples, 1):
        name = f"example {number} of {len(examples)}" if len(examples) > 1 else "rendering"
        trained = int((example.loss_mask != 0).sum())
        yield ""
        yield rule(f"{name}: {len(example.ids):,} tokens, {trained:,} trained", ink)
        index, texts = token_texts(example.ids[None], shown.chat.tokenizer)
        yield spans_text([texts[i] for i in index[0]], example.loss_mask, ink)
    if isinstance(shown.datum, Conversation):
        yield ""
        yield rule("turns", ink)
        for number, role, what in turns(shown):
            yield f"{number:>3}  {role:<10} {what}"
    yield ""
    yield rule("certificate", ink)
    for name, said in certificate_facts(shown.encoded.certificate, len(examples)).items():
        yield f"{name + ':':<24}{said}"


def turns(shown: EncodedLine) -> list[tuple[int, str, str]]:
    """Number and role of each message, and what becomes of it: context, or which tokens are
    trained, and their last one."""
    if not isinstance(shown.datum, Conversation):
        return []
    rows = []
    examples = shown.encoded.examples
    for number, message in enumerate(shown.datum.messages):
        found = []
        for i, example in enumerate(examples, 1):
            for span in (span for span in example.spans if span.message == number):
                last = int(example.ids[span.end - 1])
                stop = visible(shown.chat.tokenizer.decode([last], False))
                where = f"example {i}, " if len(examples) > 1 else ""
                weight = f", weight {span.weight:g}" if span.weight != 1 else ""
                found.append(
                    f"{where}tokens {span.start:,} to {span.end - 1:,} trained{weight}, "
                    f"the last is {stop.strip()!r}"
                )
        rows.append((number + 1, message["role"], "; ".join(found) or "context"))
    return rows


def certificate_facts(certificate: Certificate, n_examples: int) -> dict[str, str]:
    """The certificate in words, one entry a rule."""
    changes = []
    if certificate.split_tokens:
        changes.append(f"{certificate.split_tokens} tokens split at the border of a reply")
    if certificate.escaped:
        changes.append(f"{certificate.escaped} control tokens in texts encoded as plain text")
    if certificate.closed:
        changes.append("the stop token that the template leaves out put after the last reply")
    if certificate.composed:
        changes.append("a reply put after its prompt, which the template renders differently")
    facts = {
        "ids": "those of the tokenizer and template"
        + (", but for: " + "; ".join(changes) if changes else "")
    }
    context = "every turn sees what it sees at inference"
    if certificate.rewritten:
        context += f"; the template rewrites earlier turns, hence {n_examples} examples"
    facts["context"] = context
    if certificate.untrained_turns:
        left_out = ", ".join(map(str, certificate.untrained_turns))
        how = "whet prepare --rewritten_turns last"
        facts["turns left out"] = f"{left_out}, which the template rewrites: {how}"
    if certificate.today:
        facts["date for the template"] = certificate.today
    return facts


def encoded_sheet(shown: EncodedLine) -> Sheet:
    """The examples as rows of their own, for a page."""
    examples = shown.encoded.examples
    width = max(len(example.ids) for example in examples)
    tokens = np.zeros((len(examples), width), np.int32)
    mask = np.zeros((len(examples), width), np.float32)
    documents = np.zeros(len(examples), DOCUMENT)
    for row, example in enumerate(examples):
        tokens[row, : len(example.ids)] = example.ids
        mask[row, : len(example.ids)] = example.loss_mask
        documents[row] = (
            row, 0, len(example.ids), (example.loss_mask != 0).sum(), 0, shown.datum.at.line, row,
        )  # fmt: skip
    index, texts = token_texts(tokens, shown.chat.tokenizer)
    return Sheet(
        title=f"{Path(shown.datum.at.source).name}:{shown.datum.at.line}",
        tokens=tokens,
        mask=mask,
        documents=documents,
        sources=[shown.datum.at.source],
        index=index,
        texts=texts,
        lengths=documents["length"],
        fills=documents["length"],
        trained=int(documents["trained"].sum()),
        turns=turns(shown),
        facts={
            "template": shown.chat.template.name,
            **certificate_facts(shown.encoded.certificate, len(examples)),
        },
    )
