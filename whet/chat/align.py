"""Marked texts -> ids and the tokens that are the model's own words.

The ids are those of the whole text (rule 1). What must be shown is that the prompt, tokenised
alone, gives the very ids that stand before the words (rules 3 and 4).

An added token cuts a text: what stands before it and what stands after it are tokenised apart
(`Cutter`). So only the stretch between the last added token of the prompt and the words matters,
mostly `assistant\\n`. The quick way compares the ids after that token with the ids of this
stretch, tokenised once and remembered. Where that proves nothing, the careful way does the same
with character offsets, tokenises prompt and words apart where a token straddles their border, and
tokenises stretches with hidden control strings as plain text.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from whet.chat.chat import Chat
from whet.chat.examples import Draft
from whet.chat.hidden import pattern_of
from whet.chat.turns import Mark

MAX_HEADERS = 64  # stretches that are remembered; a template has one or two
ANCHORS = ("\n", "a", "1", ".", " ")
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
    """Cuts and tokenises texts. `added` are the added tokens that hold more than whitespace."""

    backend: tokenizers.Tokenizer
    added: dict[str, int]
    _known: dict[str, list[int]] = field(default_factory=dict)  # pieces that came more than once
    _kept: int = 0  # characters in `_known`

    def __post_init__(self) -> None:
        added = pattern_of(self.added)  # where several begin, the longest: so does the library
        self._pattern = re.compile(f"({added.pattern})" if added else "((?!))")
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


class Unclear(Exception):  # noqa: N818 -- an answer, not an accident
    """The tokens do not show where words begin or end."""


@dataclass
class Located:
    """The ids of a draft; `spans[k]` is the range of tokens of its k-th mark."""

    ids: np.ndarray  # int32
    spans: list[tuple[int, int]]
    split: int = 0


@dataclass
class _Header:
    """The end of a generation prompt: an added token and the stretch after it."""

    text: str  # both, as written
    token: str
    length: int  # of the stretch
    ids: list[int]  # of the stretch
    swallows: bool  # the token takes in whitespace after it, and nothing of the stretch is left


@dataclass
class Aligner:
    """Tokenises drafts. Remembers the ends of generation prompts it has seen."""

    chat: Chat
    headers: list[_Header] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = self.chat.tokenizer
        self.cutter = Cutter(self.tokenizer.backend, self.tokenizer.added)

    def locate_many(self, drafts: list[Draft]) -> list[Located | Unclear]:
        """`locate` for many drafts at once; what is unclear is returned in its place."""
        cuts = self.cutter.cut([draft.text for draft in drafts])
        found: list[Located | Unclear] = []
        for draft, cut in zip(drafts, cuts, strict=True):
            located = None if draft.hidden else self._quick(draft, cut)
            try:
                found.append(located or self.locate(draft))
            except Unclear as error:
                found.append(error)
        return found

    def locate(self, draft: Draft) -> Located:
        """The ids and token spans of `draft`, the careful way. Raises Unclear."""
        return _Careful(self, draft).located()

    def _quick(self, draft: Draft, cut: Cut) -> Located | None:
        """The spans through the added tokens around them, or None where that proves nothing."""
        spans = []
        for mark in draft.marks:
            header = self._header_before(draft.text, mark.start)
            if header is None or (header.swallows and draft.text[mark.start].isspace()):
                return None
            token, at = cut.after.get(mark.start - header.length, ("", 0))
            start = at + len(header.ids)
            if token != header.token or cut.ids[at:start] != header.ids:
                return None
            token, stop = cut.after.get(mark.end, ("", 0))
            if token != mark.stop or stop <= start:
                return None
            spans.append((start, stop))
        return Located(np.array(cut.ids, np.int32), spans)

    def _header_before(self, text: str, end: int) -> _Header | None:
        for header in self.headers:
            if text.startswith(header.text, end - len(header.text)):
                return header
        return None

    def remember(self, token: str, stretch: str, ids: list[int]) -> None:
        """Keep a stretch after an added token, so that the quick way can use it."""
        if len(self.headers) < MAX_HEADERS and len(stretch) < 200:
            text = token + stretch
            if all(header.text != text for header in self.headers):
                token_id = self.tokenizer.added[token]
                swallows = self.tokenizer.backend.get_added_tokens_decoder()[token_id].rstrip
                swallows = swallows and not stretch.strip()
                self.headers.append(_Header(text, token, len(stretch), ids, swallows))

    def after(self, token: str | None, text: str, hidden: dict[str, str]) -> list[int]:
        """The ids of `text` where it follows the added token `token`, or begins everything; the
        hidden control strings in it are plain text."""
        ids = self.tokenizer.encode((token or "") + text)
        if token is not None:
            ids = ids[ids.index(self.tokenizer.added[token]) + 1 :]
        clear = restored(text, hidden)
        if clear == text:
            return ids
        if ids == self.tokenizer.encode(text):
            return list(self.chat.plain_backend.encode(clear, add_special_tokens=False).ids)
        return self.following(clear, plain=True)

    def following(self, text: str, plain: bool) -> list[int]:
        """The ids of `text` where it goes on after other text: no space is put before it.

        Some tokenizers begin each text with a space. So it is tokenised after an anchor that
        shares no token with it, and the anchor's ids are taken off.
        """
        if not text:
            return []
        backend = self.chat.plain_backend if plain else self.tokenizer.backend
        for anchor in ANCHORS:
            alone = backend.encode(anchor, add_special_tokens=False).ids
            both = backend.encode(anchor + text, add_special_tokens=False)
            n = len(alone)
            if both.ids[:n] != alone or n == len(both.ids):
                continue
            if both.offsets[n - 1][1] <= len(anchor) <= both.offsets[n][0]:
                return list(both.ids[n:])
        raise Unclear("the tokenizer joins the beginning of the reply with any text before it")


def restored(text: str, hidden: dict[str, str]) -> str:
    """`text` with control strings in the place of the characters that hide them."""
    for character, string in hidden.items():
        text = text.replace(character, string)
    return text


@dataclass
class _Stretch:
    """The ordinary tokens between two added tokens: ids[first:last], text[start:end]."""

    token: str | None  # the added token before it
    token_end: int  # where the offsets say that this ends: some swallow whitespace after them
    first: int
    last: int
    start: int
    end: int


class _Careful:
    """The careful way for one draft."""

    def __init__(self, aligner: Aligner, draft: Draft) -> None:
        self.aligner = aligner
        self.draft = draft
        self.encoding = aligner.tokenizer.backend.encode(draft.text, add_special_tokens=False)
        self.split = 0

    def located(self) -> Located:
        ids: list[int] = []
        begins: dict[int, int] = {}  # start of a mark -> token
        ends: dict[int, int] = {}  # end of an added token -> token after it
        starts = {mark.start: mark for mark in self.draft.marks}
        for stretch, token_id in self._stretches():
            border = next(
                (s for s in starts if s not in begins and stretch.start <= s <= stretch.end), None
            )
            base = len(ids)
            part, at = self._tokens_of(stretch, border)
            ids += part
            if border is not None:
                begins[border] = base + at
            if token_id is not None:
                ids.append(token_id)
                ends[stretch.end + len(self.aligner.cutter.names[token_id])] = len(ids)
        spans = [self._span(mark, begins, ends, len(ids)) for mark in self.draft.marks]
        self._check(ids)
        return Located(np.array(ids, np.int32), spans, self.split)

    def _span(
        self, mark: Mark, begins: dict[int, int], ends: dict[int, int], total: int
    ) -> tuple[int, int]:
        if not mark.stop:  # a reply that is to be continued goes on to the end of the text
            return begins[mark.start], total
        if mark.start not in begins or mark.end not in ends:
            raise Unclear(f"{mark.stop} is not one token where the reply ends")
        return begins[mark.start], ends[mark.end]

    def _stretches(self) -> list[tuple[_Stretch, int | None]]:
        """All stretches in order, each with the added token that ends it (None: end of text)."""
        added = self.aligner.cutter.names
        ids, offsets, text = self.encoding.ids, self.encoding.offsets, self.draft.text
        found: list[tuple[_Stretch, int | None]] = []
        token, token_end, first, start = None, 0, 0, 0
        for k, token_id in enumerate(ids):
            name = added.get(token_id)
            if name is None:
                continue
            # The offsets may take in whitespace around the token; it stands where it is written.
            at = text.find(name, max(start, offsets[k][0]))
            if at < 0 or at + len(name) > offsets[k][1]:
                continue  # a token matched after normalisation: then it is part of its stretch
            found.append((_Stretch(token, token_end, first, k, start, at), token_id))
            token, token_end, first, start = name, offsets[k][1], k + 1, at + len(name)
        found.append((_Stretch(token, token_end, first, len(ids), start, len(text)), None))
        return found

    def _tokens_of(self, stretch: _Stretch, border: int | None) -> tuple[list[int], int]:
        """The ids of a stretch and how many of them stand before the border in it."""
        text = self.draft.text[stretch.start : stretch.end]
        hidden = {c: s for c, s in self.draft.hidden.items() if c in text}
        ids = list(self.encoding.ids[stretch.first : stretch.last])
        if border is None:
            return self.aligner.after(stretch.token, text, hidden) if hidden else ids, 0
        head, words = text[: border - stretch.start], text[border - stretch.start :]
        before = self.aligner.after(stretch.token, head, hidden)
        n = len(before)
        offsets, token_end = self.encoding.offsets[stretch.first : stretch.last], stretch.token_end
        if hidden:  # whether a token ends at the border is seen in the clear stretch, taken alone
            ids = self.aligner.after(stretch.token, text, hidden)
            plain, clear = self.aligner.chat.plain_backend, restored(text, hidden)
            offsets, token_end = plain.encode(clear, add_special_tokens=False).offsets, 0
            border = len(restored(head, hidden))
        if ids[:n] == before and n <= len(offsets) and _between(offsets, n, border, token_end):
            if stretch.token and not hidden:
                self.aligner.remember(stretch.token, head, before)
            return ids, n
        self.split += 1
        return before + self.aligner.following(restored(words, hidden), bool(hidden)), n

    def _check(self, ids: list[int]) -> None:
        """Re-tokenised stretches must say the same text and hold no control token of their own."""
        if not self.split and not self.draft.hidden:
            return
        decode = self.aligner.tokenizer.decode
        clear = restored(self.draft.text, self.draft.hidden)
        whole = decode(self.aligner.tokenizer.encode(clear), skip_special=False)
        if _letters(decode(ids, skip_special=False)) != _letters(whole):
            raise Unclear("prompt and reply, tokenised apart, do not give the text again")
        special = self.aligner.chat.special_ids
        unhidden = sum(i in special for i in self.encoding.ids)
        if sum(i in special for i in ids) != unhidden:
            raise Unclear("a control token in somebody's text would stay one")


def _between(offsets: list[tuple[int, int]], n: int, border: int, token_end: int) -> bool:
    """Whether the first n tokens end, and the rest begin, at character `border`."""
    before = offsets[n - 1][1] if n else token_end
    following = offsets[n][0] if n < len(offsets) else border
    return before <= border <= following


def _letters(text: str) -> str:
    """`text` without whitespace: where a stretch begins, some tokenizers put one."""
    return re.sub(r"\s+", "", text)
