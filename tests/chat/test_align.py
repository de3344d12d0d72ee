"""Texts tokenised piece by piece have the ids of the whole texts."""

import re
from pathlib import Path
from random import Random

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from whet.chat import align
from whet.chat.align import Cutter, pieces_are_independent
from whet.chat.chat import load_tokenizer

PIECEWISE = {"gpt2", "qwen2", "tinyllama", "mistral_7b", "minimind", "olmo2"}
WHOLE = {"phi3", "pythia"}  # tokens that take in blanks; tokens matched in normalised text
WORDS = ["", " ", "\n", "\n\n", "  a", "Hello", " wörld", "e\u0301", "é", "👍🏽", "שלום", "1234"]
WORDS += [
    "'s",
    "<|",
    "|>",
    "<",
    "</",
    "s>",
    "system\nYou are",
    "user\n",
    "assistant\n",
    "\t",
    "\u200d",
]


def small_backend(**token: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken("<x>", **{"normalized": False, **token})])
    return backend


class Recorded:
    """A backend that remembers which texts it was given."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.given: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts: list[str], **flags: bool) -> list[tokenizers.Encoding]:
        self.given += texts
        return self.backend.encode_batch_fast(texts, **flags)


@pytest.mark.parametrize("name", sorted(PIECEWISE | WHOLE))
def test_ids_are_those_of_the_whole_text(shared_data: Path, name: str) -> None:
    chat = load_tokenizer(shared_data / "tokenizers" / name)
    backend, rng = chat.tokenizer.backend, Random(name)
    every = sorted(token.content for token in backend.get_added_tokens_decoder().values())
    cutter = Cutter(backend, chat.tokenizer.added)
    assert cutter.piecewise == (name in PIECEWISE)
    for _ in range(40):
        texts = [
            "".join(rng.choice([*WORDS, *every]) for _ in range(rng.randint(0, 14)))
            for _ in range(20)
        ]
        for text, cut in zip(texts, cutter.cut(texts + texts[:3]), strict=False):
            assert cut.ids == backend.encode(text, add_special_tokens=False).ids, repr(text)
            for end, (token, count) in cut.after.items():
                assert text[:end].endswith(token)
                assert cut.ids[count - 1] == chat.tokenizer.added[token]
            if cutter.piecewise:
                assert len(cut.after) == len(re.findall("|".join(map(re.escape, every)), text))


def test_what_texts_share_is_tokenised_once() -> None:
    backend = Recorded(small_backend())
    cutter = Cutter(backend, {"<x>": 3})
    assert [cut.ids for cut in cutter.cut(["a b<x>c", "a b<x>", "a b<x>b"])] == [
        [0, 1, 3, 2],
        [0, 1, 3],
        [0, 1, 3, 1],
    ]
    assert sorted(backend.given) == ["a b", "b", "c"]
    backend.given.clear()
    assert cutter.cut(["a b<x>c"])[0].ids == [0, 1, 3, 2]
    assert backend.given == ["c"], "what came twice is remembered, what came once is not"


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align, "KEPT_CHARACTERS", 10)
    cutter = Cutter(small_backend(), {"<x>": 3})
    for text in ("a" * 6, "b" * 6, "c" * 600, "ab"):
        for cut in cutter.cut([text, text]):
            assert len(cut.ids) == len(text)
        assert sum(map(len, cutter._known)) == cutter._kept <= 10


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_tokens_that_look_around_them_forbid_it(flag: str) -> None:
    assert pieces_are_independent(small_backend())
    assert not pieces_are_independent(small_backend(**{flag: True}))


def test_what_depends_on_the_place_forbids_it() -> None:
    backend = small_backend()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    assert not pieces_are_independent(backend)
    backend = small_backend()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    assert not pieces_are_independent(backend)
    backend = small_backend(normalized=True)
    assert pieces_are_independent(backend)
    backend.normalizer = normalizers.Lowercase()
    assert not pieces_are_independent(backend)
    backend = small_backend()
    backend.add_tokens([AddedToken("  ", normalized=False)])
    assert not pieces_are_independent(backend)
    backend = small_backend()
    backend.add_tokens([AddedToken("<y>", normalized=True)])
    assert not pieces_are_independent(backend), "two rounds: the first takes what the second would"


def test_a_tokenizer_without_added_tokens() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    assert [cut.ids for cut in Cutter(backend, {}).cut(["ab", ""])] == [[0, 1], []]


def test_the_longest_token_is_cut_out() -> None:
    backend = small_backend()
    backend.add_tokens([AddedToken("<x><y>", normalized=False)])
    cutter = Cutter(backend, {"<x>": 3, "<x><y>": 4})
    for text in ("a<x><y>b", "<x><x><y>", "<x>a<y>"):
        assert cutter.cut([text])[0].ids == backend.encode(text).ids
