"""Texts cut at their added tokens, so that what many texts share is tokenised once.

Added tokens (`<|im_start|>`, …) are cut out of a text before anything else happens to it, and the
pieces between them are tokenised one by one. So the ids of a text are those of its pieces, and a
piece that comes again (a system prompt, tools, the earlier turns of a conversation that becomes
many examples) need not be tokenised again. Where a piece's ids could depend on what stands around
it, whole texts are tokenised and their added tokens looked up.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tokenizers

KEPT_CHARACTERS = 8_000_000
"""Of the pieces that are remembered; each takes a few bytes, its ids included."""
INDEPENDENT = {"ByteLevel", "Digits", "Punctuation", "Split", "Whitespace", "WhitespaceSplit"}
"""Pre-tokenizers that treat each piece alone. Metaspace may treat the first one differently."""


class Cut(NamedTuple):
    """A text in ids. `after[c]` says of the added token that ends at character c which one it is,
    and how many tokens the text has up to its end. It is empty where that is not known."""

    ids: list[int]
    after: dict[int, tuple[str, int]]


@dataclass
class Cutter:
    """Cuts and tokenises texts. `added` are the added tokens that hold more than blanks."""

    backend: tokenizers.Tokenizer
    added: dict[str, int]
    _known: dict[str, list[int]] = field(default_factory=dict)  # pieces that came more than once
    _kept: int = 0  # characters in `_known`

    def __post_init__(self) -> None:
        # Where several begin, the library takes the longest
        longest_first = sorted(self.added, key=len, reverse=True)
        any_added = "|".join(map(re.escape, longest_first)) or "(?!)"  # which matches nothing
        self._pattern = re.compile(f"({any_added})")
        self.names = {i: token for token, i in self.added.items()}
        self.piecewise = pieces_are_independent(self.backend)

    def cut(self, texts: Sequence[str]) -> list[Cut]:
        """Each text's ids, equal to those of `backend.encode(text, add_special_tokens=False)`."""
        if self.piecewise:
            return self._by_pieces(texts)
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            self._looked_up(text, encoding.ids)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _by_pieces(self, texts: Sequence[str]) -> list[Cut]:
        split = [self._pattern.split(text) for text in texts]  # piece, token, piece, …, piece
        count = Counter(piece for parts in split for piece in parts[::2])
        new = [piece for piece in count if piece and piece not in self._known]
        encodings = self.backend.encode_batch_fast(new, add_special_tokens=False)
        ids_of = {piece: encoding.ids for piece, encoding in zip(new, encodings, strict=True)}
        cuts = [self._joined(parts, ids_of) for parts in split]
        self._remember({piece: ids for piece, ids in ids_of.items() if count[piece] > 1})
        return cuts

    def _joined(self, parts: list[str], new: dict[str, list[int]]) -> Cut:
        ids: list[int] = []
        after: dict[int, tuple[str, int]] = {}
        end = 0
        for i, part in enumerate(parts):
            end += len(part)
            if i % 2:
                ids.append(self.added[part])
                after[end] = (part, len(ids))
            elif part:
                ids += new[part] if part in new else self._known[part]
        return Cut(ids, after)

    def _remember(self, pieces: dict[str, list[int]]) -> None:
        length = sum(map(len, pieces))
        if self._kept + length > KEPT_CHARACTERS:
            self._known, self._kept = {}, 0
        if length <= KEPT_CHARACTERS:
            self._known.update(pieces)
            self._kept += length

    def _looked_up(self, text: str, ids: list[int]) -> Cut:
        """The added tokens in `ids` paired with those in `text`, if they are the same in order."""
        written = [(match[0], match.end()) for match in self._pattern.finditer(text)]
        names = self.names
        places = [k for k, i in enumerate(ids) if i in names]
        if [names[ids[k]] for k in places] != [token for token, _ in written]:
            return Cut(ids, {})
        pairs = zip(written, places, strict=True)
        return Cut(ids, {end: (token, k + 1) for (token, end), k in pairs})


def pieces_are_independent(backend: tokenizers.Tokenizer) -> bool:
    """Whether the ids of a piece between added tokens never depend on what stands around it."""
    added = backend.get_added_tokens_decoder().values()
    for token in added:
        if token.single_word or token.lstrip or token.rstrip:
            return False  # these look at, or take in, what stands beside them
        if not token.content.strip() or (token.normalized and backend.normalizer):
            return False  # matched within a piece, or in a text that is not this one
    in_one_round = len({token.normalized for token in added}) == 1
    return in_one_round and all(kind in INDEPENDENT for kind in _kinds(backend.pre_tokenizer))


def _kinds(pre_tokenizer: Any) -> list[str]:
    """The types of a pre-tokenizer's steps, as tokenizer.json names them."""
    if pre_tokenizer is None:
        return []
    state = json.loads(pre_tokenizer.__getstate__())
    return [step["type"] for step in state.get("pretokenizers", [state])]
