"""Tokens declared outside tokenizer.json: transformers' ids and flags, from and to every file."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import transformers

from whet.chat.chat import Chat, load_tokenizer
from whet.chat.tokenizer import train_tokenizer
from whet.errors import UserError

TEXT = "Hello <a> <b> there<c>  <d>sum<e> <f> <pad><|endoftext|> The</x> sum"


def token(content: str, **fields: bool) -> dict[str, Any]:
    return {"content": content, **fields}


def added(content: str, **fields: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, **fields}


PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
DIRECTORIES: dict[str, dict[str, Any]] = {
    "numbered": {CONFIG: {"added_tokens_decoder": {"900": token("<a>", **PLAIN, special=True)}}},
    "numbered, out of order, some known": {
        CONFIG: {
            "added_tokens_decoder": {
                "999": token("<b>", **PLAIN, special=False),
                "7": token("<a>", **PLAIN, special=True),
                "0": token("<|endoftext|>", **PLAIN, special=True),
                "50": token("The", **PLAIN, special=False),
            }
        }
    },
    "numbered, with whitespace": {
        CONFIG: {
            "added_tokens_decoder": {
                "400": token("<a>", lstrip=True, rstrip=True, special=True),
                "401": token("sum", single_word=True, normalized=True),
                "402": token("<c>", rstrip=True),
            }
        }
    },
    "numbered and the map that then is not read": {
        CONFIG: {"added_tokens_decoder": {"500": token("<b>")}, "eos_token": "<|endoftext|>"},
        MAP: {"pad_token": "<pad>", "additional_special_tokens": ["<a>"]},
        ADDED: {"<c>": 700},
    },
    "numbered changes a flag": {
        CONFIG: {"added_tokens_decoder": {"0": token("<|endoftext|>", lstrip=True, special=True)}}
    },
    "numbered and named": {
        CONFIG: {
            "added_tokens_decoder": {"600": token("<a>", special=False)},
            "pad_token": "<a>",
            "mask_token": added("<b>", lstrip=True),
        }
    },
    "additional": {CONFIG: {"additional_special_tokens": ["<b>", "<a>", "<b>"]}},
    "additional as objects": {
        CONFIG: {
            "additional_special_tokens": [added("<b>", lstrip=True), added("<a>", special=True)]
        }
    },
    "extra": {CONFIG: {"extra_special_tokens": ["<a>", "<b>"]}},
    "extra and additional": {
        CONFIG: {"extra_special_tokens": ["<a>"], "additional_special_tokens": ["<b>"]}
    },
    "extra, empty, and additional": {
        CONFIG: {"extra_special_tokens": {}, "additional_special_tokens": ["<b>"]}
    },
    "extra with names": {CONFIG: {"extra_special_tokens": {"image_token": "<a>", "boi": "<b>"}}},
    "custom names": {CONFIG: {"video_token": "<d>", "pad_token": "<pad>", "audio_token": "<c>"}},
    "null": {CONFIG: {"pad_token": None, "unk_token": None, "additional_special_tokens": None}},
    "a map": {MAP: {"pad_token": "<pad>", "eos_token": token("<e>", **PLAIN)}},
    "a map that the configuration contradicts": {
        CONFIG: {"pad_token": "<a>", "eos_token": "<|endoftext|>"},
        MAP: {"pad_token": "<pad>", "eos_token": None},
    },
    "a map with additional": {MAP: {"additional_special_tokens": ["<c>", "<a>"]}},
    "a map with additional beside those of the configuration": {
        CONFIG: {"additional_special_tokens": ["<b>"]},
        MAP: {"additional_special_tokens": ["<c>", "<a>"]},
    },
    "a map with extra": {
        CONFIG: {"extra_special_tokens": ["<b>"]},
        MAP: {"extra_special_tokens": ["<b>", token("<a>", lstrip=True)]},
    },
    "a map with names beside a list": {
        CONFIG: {"extra_special_tokens": ["<c>"]},
        MAP: {"extra_special_tokens": {"boi": "<a>"}},
    },
    "names beside a list": {
        CONFIG: {"extra_special_tokens": {"boi": "<b>"}},
        MAP: {"additional_special_tokens": ["<c>", "<a>"]},
    },
    "a map with names": {MAP: {"extra_special_tokens": {"boi": "<a>"}, "video_token": "<b>"}},
    "added": {ADDED: {"<b>": 350, "<a>": 340}},
    "added, some special": {
        ADDED: {"<b>": 350, "<a>": 340, "<c>": 330},
        CONFIG: {"pad_token": "<b>"},
        MAP: {"extra_special_tokens": ["<a>"], "eos_token": "<c>"},
    },
    "added over one of tokenizer.json": {ADDED: {"<a>": 0, "<b>": 1}},
    "all at once": {
        ADDED: {"<b>": 350, "The": 340},
        MAP: {"additional_special_tokens": ["<c>"], "cls_token": "<d>"},
        CONFIG: {"video_token": "<e>", "pad_token": "<pad>", "bos_token": "<|endoftext|>"},
    },
}


@pytest.fixture(scope="module")
def small() -> Chat:
    return Chat(train_tokenizer(["Hello there. The sum of 12 and 345 is 357.\n"] * 9, 300))


def compare(folder: Path) -> Chat:
    ours = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = ours.tokenizer
    assert tokenizer.encode(TEXT) == theirs(TEXT, add_special_tokens=False).input_ids
    expected = theirs.added_tokens_decoder
    assert repr(tokenizer.backend.get_added_tokens_decoder()) == repr(expected)
    for name, content in theirs.special_tokens_map.items():
        assert tokenizer.named[name] == content
    assert set(tokenizer.named) - {"eos_token"} <= set(theirs.special_tokens_map)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.vocab_size == max(theirs.get_vocab().values()) + 1
    return ours


@pytest.mark.parametrize("name", DIRECTORIES)
def test_ids_flags_and_names_are_those_of_transformers(
    small: Chat, tmp_path: Path, name: str
) -> None:
    small.save(tmp_path)
    for file, content in DIRECTORIES[name].items():
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"} if file == CONFIG else {}
        (tmp_path / file).write_text(json.dumps({**kind, **content}), encoding="utf-8")
    ours = compare(tmp_path)
    ours.save(tmp_path / "saved")
    again = compare(tmp_path / "saved")
    for other in (again, pickle.loads(pickle.dumps(ours))):
        assert other.tokenizer.encode(TEXT) == ours.tokenizer.encode(TEXT)
        assert other.tokenizer.named == ours.tokenizer.named
        assert other.tokenizer.hash == ours.tokenizer.hash
    if name not in ("null", "numbered and the map that then is not read"):
        changed = ours.tokenizer.backend.to_str() != small.tokenizer.backend.to_str()
        assert (ours.tokenizer.hash != small.tokenizer.hash) == changed


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (CONFIG, {"added_tokens_decoder": ["<a>"]}, "added_tokens_decoder must be an object"),
        (CONFIG, {"added_tokens_decoder": {"x": "<a>"}}, "added_tokens_decoder must be an object"),
        (CONFIG, {"added_tokens_decoder": {"5": 3}}, "3 is no token"),
        (CONFIG, {"added_tokens_decoder": {"5": {"special": True}}}, ".* is no token"),
        (CONFIG, {"additional_special_tokens": "<a>"}, "extra_special_tokens must be a list"),
        (CONFIG, {"extra_special_tokens": [4]}, "4 is no token"),
        (CONFIG, {"extra_special_tokens": {"boi": 4}}, "boi is 4"),
        (CONFIG, {"extra_special_tokens": {"tools": "<a>"}}, ".*tools can't be set"),
        (CONFIG, {"eos_token": 4}, "eos_token is 4; expected"),
        (MAP, {"pad_token": ["<a>"]}, "pad_token is .*; expected"),
        (CONFIG, {"bos_token": "\ud800"}, ".* is no token"),
        (ADDED, {"\ud800": 7}, ".* is no token"),
        (ADDED, {"<a>": "x"}, "'<a>' has the id 'x'"),
        (ADDED, ["<a>"], "expected a JSON object"),
    ],
)
def test_what_is_no_declaration_is_refused_by_file_and_key(
    small: Chat, tmp_path: Path, file: str, content: Any, reason: str
) -> None:
    small.save(tmp_path)
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=reason if "can't" in reason else f"{file}: {reason}"):
        load_tokenizer(tmp_path)
