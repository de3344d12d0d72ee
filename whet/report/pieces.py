"""The text of single tokens, made safe and visible.

A token's text is what it adds to the text before it, so each id is decoded behind an anchor: alone,
many decoders would swallow its leading space. Bytes of a split character are shown as `<E2>`, and
characters that move the cursor, hide, or turn the direction of writing by their code point.
"""

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whet.chat.tokenizer import Tokenizer

INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # part of emoji and of Persian and Indic words


def visible(text: str) -> str:
    """`text` with line ends marked by `↵` and unprintable characters as `<U+001B>`."""
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "→\t"
    if character not in JOINERS and unicodedata.category(character) in INVISIBLE:
        return f"<U+{ord(character):04X}>"
    return character


def token_pieces(tokenizer: "Tokenizer", ids: Iterable[int]) -> dict[int, str]:
    """The visible text of each id; an id outside the vocabulary is shown as `[id]`."""
    backend = tokenizer.backend
    names = {int(i): backend.id_to_token(int(i)) for i in ids}
    known = [i for i, name in names.items() if name is not None]
    anchor = backend.encode("a", add_special_tokens=False).ids[-1:]
    before = backend.decode(anchor, skip_special_tokens=False)
    decoded = backend.decode_batch([[*anchor, i] for i in known], skip_special_tokens=False)
    pieces = {i: f"[{i}]" for i, name in names.items() if name is None}
    for i, text in zip(known, decoded, strict=True):
        added = text.removeprefix(before)
        pieces[i] = _bytes_shown(names[i]) if "\ufffd" in added else visible(added)
    return pieces


def plain_ids(ids: Iterable[int]) -> dict[int, str]:
    """What stands for the texts where there is no tokenizer: the ids, apart from each other."""
    return {int(i): f"{i} " for i in ids}


def _bytes_shown(token: str) -> str:
    """The bytes of a token that is not whole characters, such as `<E2><96>`.

    Byte-level BPE writes each byte as one character (GPT-2's table); SentencePiece has one token a
    byte, named `<0xE2>`.
    """
    if token.startswith("<0x") and token.endswith(">"):
        return f"<{token[3:-1]}>"
    table = _byte_of_character()
    if not all(character in table for character in token):
        return visible(token)
    raw = bytes(table[character] for character in token)
    # What is whole in it stays readable: "…<E2><96>" rather than bytes alone.
    text = raw.decode("utf-8", errors="surrogateescape")
    return "".join(f"<{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else visible(c) for c in text)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table backwards: printable bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
