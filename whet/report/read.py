"""A packed file -> a Sheet."""

import hashlib
from contextlib import suppress
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whet.chat.certificate import REASONS
from whet.chat.chat import BUILT_IN
from whet.chat.conversation import Origin
from whet.data.account import SourceAccount, totals
from whet.data.left_out import WORDS
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.report.pieces import token_texts
from whet.report.sheet import LeftOut, Sheet

if TYPE_CHECKING:
    from whet.chat.tokenizer import Tokenizer


def read_sheet(store: PackedStore, first: int, end: int, tokenizer: Path | None) -> Sheet:
    """Rows first..end of the file; `tokenizer` overrides the one that the file names.

    Raises UserError where the rows are not in the file or `tokenizer` is not the file's own.
    """
    if not 0 <= first < end <= len(store):
        last = len(store) - 1
        raise UserError(f"{store.path}: has rows 0 to {last:,}, asked for {first:,} to {end - 1:,}")
    rows = store.rows(range(first, end))
    documents = store.documents if len(store.documents) else store.scan.documents
    here = slice(*np.searchsorted(documents["row"], (first, end)))
    shown = documents[here].copy()
    notes = _notes(store)[here] if store.kind != "text" else []
    shown["row"] -= first
    decoder, said = _tokenizer(store, tokenizer)
    index, texts = token_texts(rows.tokens, decoder)
    accounts, left_out = _accounts(store), _left_out(store)
    fills = np.bincount(documents["row"], documents["length"], len(store))
    return Sheet(
        title=store.path.name,
        tokens=rows.tokens,
        mask=rows.loss_mask,
        documents=shown,
        sources=store.sources,
        index=index,
        texts=texts,
        lengths=documents["length"],
        fills=fills.astype(np.int64),
        trained=int(documents["trained"].sum()),
        first=first,
        notes=notes,
        facts={"tokenizer": said, **_facts(store)},
        accounts=accounts,
        left_out=left_out,
        left_out_counts=_left_out_counts(accounts),
    )


def _notes(store: PackedStore) -> list[str]:
    """What a file that is no plain text says of each of its documents."""
    if store.kind == "labels":
        return ["good" if label > 0 else "bad" for label in store.values("labels", 1)]
    if store.kind == "preferences":
        margins = [f", margin {m:g}" if m == m else "" for m in store.values("margins", 2)]
        return [f"{side}{margin}" for margin in margins for side in ("chosen", "rejected")]
    rewards = [f"reward {reward:g}" for reward in store.values("rewards", 1)]
    if "token_advantages" not in store.attrs["places"]:
        advantages = store.values("advantages", 1)
        return [f"{r}, advantage {a:.3g}" for r, a in zip(rewards, advantages, strict=True)]
    each = store.of_places("token_advantages")
    ends = store.documents["start"] + store.documents["length"]
    places = zip(store.documents["row"], ends - store.documents["trained"], ends, strict=True)
    spans = [each[row, start:end] for row, start, end in places]
    return [
        f"{r}, advantages of its tokens {s.min():.3g} to {s.max():.3g}" if len(s) else r
        for r, s in zip(rewards, spans, strict=True)
    ]


def _tokenizer(store: PackedStore, wanted: Path | None) -> tuple["Tokenizer | None", str]:
    """The file's tokenizer, and a line about it. That the recorded one is gone is no error."""
    recorded = store.attrs.get("settings", {}).get("tokenizer")
    path = wanted or (Path(recorded) if recorded and Path(recorded).exists() else None)
    if path is None:
        gone = f"{recorded} is not there" if recorded else "the file names none"
        return None, f"none, ids are shown ({gone}; --tokenizer DIR gives one)"
    from whet.chat.chat import Chat, add_chat_tokens
    from whet.chat.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(path)
    expected = store.attrs.get("tokenizer_hash")
    given = store.attrs.get("settings", {}).get("chat_template")
    if given and tokenizer.hash != expected:  # as `whet prepare` adds what the base lacks
        with suppress(UserError):
            tokenizer = add_chat_tokens(Chat(tokenizer), given)[0].tokenizer
    if expected and tokenizer.hash != expected:
        if wanted:
            raise UserError(
                f"--tokenizer {path}: is not the tokenizer of {store.path} "
                f"(hash {tokenizer.hash[:12]}, expected {expected[:12]}); its texts would be wrong"
            )
        return None, f"none, ids are shown ({path} has changed since the file was made)"
    return tokenizer, str(path)


def _facts(store: PackedStore) -> dict[str, str]:
    """What the file records of its making, hashes shortened for reading."""
    settings = store.attrs.get("settings", {})
    facts = {name: str(settings[name]) for name in ("date", "seed", "train_on") if name in settings}
    if store.kind != "text":
        facts["kind"] = store.kind
    if store.attrs.get("template_hash"):
        facts["template"] = _template_name(store)
    return facts


def _template_name(store: PackedStore) -> str:
    """How the template was given to `whet prepare`: by name, by file, or with the tokenizer."""
    for name in BUILT_IN:
        source = files("whet.chat").joinpath(f"{name}.jinja").read_bytes()
        if hashlib.sha256(source).hexdigest() == store.attrs["template_hash"]:
            return name
    settings = store.attrs.get("settings", {})
    return str(settings.get("chat_template") or f"that of {settings.get('tokenizer', 'its model')}")


def _accounts(store: PackedStore) -> list[SourceAccount]:
    entries = store.attrs.get("account", {}).get("sources", [])
    names = {field.name for field in fields(SourceAccount)}
    return [SourceAccount(**{k: v for k, v in e.items() if k in names}) for e in entries]


def _left_out(store: PackedStore) -> list[LeftOut]:
    """The records of `whet.data.left_out`, without the place that their reasons begin with."""
    found = []
    for record in store.refusals:
        source, line = record["source"], record["line"]
        reason = record["reason"].removeprefix(f"{Origin(source, line).where}: ")
        found.append(LeftOut(source, line, reason))
    return found


def _left_out_counts(accounts: list[SourceAccount]) -> dict[str, int]:
    """How many lines and examples are left out, for each kind of reason."""
    total = totals(accounts)
    words = {**REASONS, **WORDS}
    found = [*total.refused.items(), *total.dropped_examples.items()]
    return {words.get(kind, kind): n for kind, n in found}
