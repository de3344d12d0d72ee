"""The text of each token in some rows, made safe and visible.

A token's text is what it adds to the text before it, so each id is decoded after an anchor:
alone, many decoders would swallow its leading space. A character that is split among tokens is
shown at the first of them and the others are empty; bytes that form no character are shown as
`<E2>`, and characters that move the cursor, hide, or turn the direction of writing by their code
point.
"""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from whet.chat.tokenizer import Tokenizer

INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Part of emoji and of Persian and Indic words: invisible only where they stand alone.
JOINERS = "\u200c\u200d\ufe0e\ufe0f"


def visible(text: str) -> str:
    """`text` with line ends marked by `↵` and unprintable characters as `<U+001B>`."""
    if text and not text.strip(JOINERS):
        return "".join(f"<U+{ord(character):04X}>" for character in text)
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "→\t"
    if "\udc80" <= character <= "\udcff":  # a byte that Python could not decode
        return f"<{ord(character) - 0xDC00:02X}>"
    if character not in JOINERS and unicodedata.category(character) in INVISIBLE:
        return f"<U+{ord(character):04X}>"
    return character


def token_texts(tokens: np.ndarray, tokenizer: "Tokenizer | None") -> tuple[np.ndarray, list[str]]:
    """The texts of `tokens` (B, T): indices (B, T) into a list of texts, and the list.

    Without a tokenizer the ids themselves are the texts. A text of the list belongs to one id; an
    id whose text depends on its neighbours has several.
    """
    ids, index = np.unique(tokens, return_inverse=True)
    index = index.reshape(tokens.shape)
    if tokenizer is None:
        return index, [f"{i} " for i in ids]
    pieces = token_pieces(tokenizer, [int(i) for i in ids])
    texts = [visible(piece) if isinstance(piece, str) else "" for piece in pieces]
    number: dict[tuple[int, str], int] = {}
    parts: dict[tuple[int, ...], list[str]] = {}
    is_part = np.array([isinstance(piece, bytes) for piece in pieces])
    for run in _runs(is_part[index]):
        found = tuple(int(i) for i in index.flat[run])
        if found not in parts:
            parts[found] = _joined([pieces[i] for i in found])  # type: ignore[misc]
        for place, i, text in zip(range(run.start, run.stop), found, parts[found], strict=True):
            if (i, text) not in number:
                number[i, text] = len(texts)
                texts.append(text)
            index.flat[place] = number[i, text]
    return index, texts


def token_pieces(tokenizer: "Tokenizer", ids: Sequence[int]) -> list[str | bytes]:
    """What each id adds to a text; bytes where that is not a whole number of characters."""
    backend = tokenizer.backend
    names = {i: name for i in ids if (name := backend.id_to_token(i)) is not None}
    known = list(names)
    anchor = backend.encode("a", add_special_tokens=False).ids[-1:]
    before = backend.decode(anchor, skip_special_tokens=False)
    decoded = backend.decode_batch([[*anchor, i] for i in known], skip_special_tokens=False)
    pieces: dict[int, str | bytes] = {i: f"[{i}]" for i in ids}  # outside the vocabulary
    for i, text in zip(known, decoded, strict=True):
        added = text.removeprefix(before)
        pieces[i] = _bytes(names[i]) if "\ufffd" in added else added
    return [pieces[i] for i in ids]


def _bytes(token: str) -> str | bytes:
    """The bytes of a token that is not whole characters, or itself if it is made of none.

    Byte-level BPE writes each byte as one character (GPT-2's table); SentencePiece has one token a
    byte, named `<0xE2>`.
    """
    if token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:-1])
    from whet.tokenizer_files import (
        byte_letters,  # with the tokenizers, which a page may do without
    )

    table = {letter: byte for byte, letter in byte_letters().items()}
    if not all(character in table for character in token):
        return token
    return bytes(table[character] for character in token)


def _runs(chosen: np.ndarray) -> list[slice]:
    """The runs of chosen places of `chosen` (B, T), flat; none crosses from row to row."""
    padded = np.zeros((len(chosen), chosen.shape[1] + 1), bool)
    padded[:, :-1] = chosen
    changes = np.flatnonzero(np.diff(padded.reshape(-1), prepend=False))
    # A run begins and ends in one row, so the padding before it is one place for each row above.
    rows = changes[::2] // padded.shape[1]
    return [
        slice(int(a - r), int(b - r))
        for a, b, r in zip(changes[::2], changes[1::2], rows, strict=True)
    ]


def _joined(parts: Sequence[bytes]) -> list[str]:
    """The text of each part: characters stand where their first byte is."""
    texts = [""] * len(parts)
    owner = [i for i, part in enumerate(parts) for _ in part]
    at = 0
    for character in b"".join(parts).decode("utf-8", errors="surrogateescape"):
        texts[owner[at]] += visible(character)
        at += len(character.encode("utf-8", errors="surrogateescape"))
    return texts
