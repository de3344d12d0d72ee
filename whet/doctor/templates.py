"""The template on the user's own conversations, and whether the packed file fits the model."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from whet.chat.certificate import Refusal
from whet.chat.chat import Chat
from whet.chat.conversation import Conversation
from whet.chat.encode import Encoded, encode_many, encode_prompt
from whet.data.store import PackedStore
from whet.doctor.subject import Finding, Subject, failed, judge, skipped
from whet.errors import UserError
from whet.model.open import misfits, template_misfit

FAITHFUL = "every reply is trained after its own prompt"
STOPS = "every trained reply ends with a stop token"
FITS = "the packed file was made for this model"
COUNTS = "the file's trained-token counts are true"


def certificate(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """What is trained follows the prompt that `whet chat` gives, and ends with a stop token."""
    chat = subject.chat
    talks = [datum for datum in subject.data if isinstance(datum, Conversation)]
    if chat is None or not talks:
        why = "no conversations; give --conversations FILE"
        yield from skipped("the model has no tokenizer" if talks else why, FAITHFUL, STOPS)
        return
    results = encode_many(talks, chat)
    kinds = Counter(result.kind for result in results if isinstance(result, Refusal))
    note = f"of {len(talks)} conversations"
    if kinds:
        note += ", refused: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    if kinds.total() == len(talks):
        yield failed(FAITHFUL, f"{note}: nothing can be trained")
        return
    wrong_prompts = wrong_stops = 0
    for talk, result in zip(talks, results, strict=True):
        if isinstance(result, Encoded):
            wrong_prompts += _wrong_prompts(talk, result, chat)
            wrong_stops += sum(
                int(example.ids[span.end - 1]) not in chat.stop_ids
                for example in result.examples
                for span in example.spans
            )
    yield judge(FAITHFUL, wrong_prompts, 0, note)
    yield judge(STOPS, wrong_stops, 0, note)


def _wrong_prompts(talk: Conversation, encoded: Encoded, chat: Chat) -> int:
    """Trained spans that follow something else than the prompt that asks for them."""
    wrong = 0
    for example in encoded.examples:
        for span in example.spans:
            asked = replace(
                talk, messages=talk.messages[: span.message], weights=talk.weights[: span.message]
            )
            prompt = encode_prompt(asked, chat, go_on=False)
            wrong += prompt != example.ids[: span.start].tolist()
    return wrong


def data_fit(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """The packed file was made for this model, and counts its trained tokens rightly."""
    store = subject.store
    if store is None:
        yield from skipped("no packed file; give --data FILE.h5", FITS, COUNTS)
        return
    try:
        n_rows = len(store.loss_tokens)
    except UserError as error:
        yield failed(COUNTS, str(error))
        yield from skipped("its rows are not sound", FITS)
        return
    found = misfits(subject.model, subject.chat, store, "--data")
    if subject.chat:
        found += template_misfit(subject.chat, store, "--data", "the model directory")
        found += _wrong_stops(subject.chat, store)
    yield failed(FITS, "; ".join(found)) if found else judge(FITS, 0, 0)
    yield judge(COUNTS, 0, 0, f"all {n_rows:,} rows, when the file was opened")


def _wrong_stops(chat: Chat, store: PackedStore) -> list[str]:
    """A line if the file records other stop ids than its template gives when it is tried."""
    if (said := store.attrs.get("chat")) is None:
        return []
    recorded, tried = (
        chat.rendering_as(each, str(store.path)).stop_ids for each in (said, {**said, "hash": ""})
    )
    line = f"--data {store.path}: says that replies end at the ids {recorded}; they end at {tried}"
    return [line] if recorded != tried else []
