"""Token texts: leading spaces kept, split characters as bytes, nothing that steers a terminal."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.chat.tokenizer import read_tokenizer, train_tokenizer
from whet.report.pieces import token_texts, visible

TEXT = "Hello  world\n\n  x = 1\t東京 🏳️‍🌈 שלום é <|im_end|>"
FOLDERS = ("gpt2", "qwen2", "tinyllama", "mistral_7b", "phi3", "pythia", "olmo2")


def texts_of(tokenizer, ids):
    index, texts = token_texts(np.array([ids]), tokenizer)
    return [texts[i] for i in index[0]]


@pytest.mark.parametrize("name", FOLDERS)
def test_texts_of_real_tokenizers_join_to_the_text(shared_data, name):
    tokenizer = read_tokenizer(shared_data / "tokenizers" / name)
    joined = "".join(texts_of(tokenizer, tokenizer.encode(TEXT)))
    for shown, raw in {
        "↵\n": "\n",
        "→\t": "\t",
        "<U+200D>": "\u200d",
        "<U+FE0F>": "\ufe0f",
    }.items():
        joined = joined.replace(shown, raw)
    assert joined.lstrip(" ") == TEXT  # SentencePiece begins with a space


def test_a_split_character_stands_at_its_first_token():
    tokenizer = train_tokenizer(["a b c"], 300)  # knows bytes only
    ids = tokenizer.encode("東b")
    assert texts_of(tokenizer, ids) == ["東", "", "", "b"]
    # Cut off, or cut in two by the end of a row, its bytes are shown.
    assert texts_of(tokenizer, ids[1:]) == ["<9D>", "<B1>", "b"]
    index, texts = token_texts(np.array([ids[:2], ids[2:]]), tokenizer)
    assert [texts[i] for i in index.flat] == ["<E6>", "<9D>", "<B1>", "b"]


def test_an_id_outside_the_vocabulary_is_shown_as_a_number():
    tokenizer = train_tokenizer(["a b c"], 300)
    assert texts_of(tokenizer, [99_999]) == ["[99999]"]
    assert texts_of(None, [5, 7]) == ["5 ", "7 "]


@given(st.text())
def test_visible_text_holds_no_control_characters(text):
    shown = visible(text)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown
    )
    assert shown.count("\n") == text.count("\n")


def test_joiners_are_shown_only_where_they_stand_alone():
    assert visible("👩\u200d🌾") == "👩\u200d🌾"
    assert visible("\u200d") == "<U+200D>"
