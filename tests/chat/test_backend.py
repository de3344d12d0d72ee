"""Odd tokenizer files: each opens or is refused in a line; none ends Python or takes its memory."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chat import suite
from whet.chat.backend import TokenizerError
from whet.chat.certificate import Refusal, Refused
from whet.chat.chat import Chat, load_tokenizer
from whet.chat.conversation import read_conversation
from whet.chat.encode import EncodeOptions, encode_many, encode_prompt
from whet.chat.tokenizer import Tokenizer, train_tokenizer
from whet.errors import UserError


def replacing(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


DOUBLING = replacing({"String": "a"}, "aa")
LONGER = replacing({"Regex": "(?=x)"}, "x")
CHARSMAP = "/////wAAAAAAAAAA"  # says that 4 GiB follow
SLOW = replacing({"Regex": "(q|qq)+$b"}, "x")  # the regex library gives up after a while
ODD = {
    "a charsmap of nothing": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "a charsmap cut off": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
    "nothing replaced": {"normalizer": replacing({"String": ""}, "x")},
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a decoder that strips too much": {
        "decoder": {"type": "Strip", "content": "a", "start": 99, "stop": 99}
    },
    "doubling": {"normalizer": sequence(*[DOUBLING] * 40)},
    "doubling, nested": {"normalizer": sequence(sequence(*[DOUBLING] * 20), *[DOUBLING] * 20)},
    "doubling by a look ahead": {"normalizer": sequence(*[LONGER] * 40)},
    "doubling in the decoder": {"decoder": {"type": "Sequence", "decoders": [DOUBLING] * 40}},
    "one long step": {"normalizer": replacing({"Regex": "."}, "x" * 2_000_000)},
    "no pattern": {"normalizer": replacing({"Regex": "(("}, "x")},
    "no such type": {"normalizer": {"type": "Lowercaser"}},
    "a vocabulary that is a list": {"model": {"type": "BPE", "vocab": [1], "merges": []}},
    "deep": {"normalizer": json.loads('{"type":"Sequence","normalizers":[' * 99 + "]}" * 99)},
}


@pytest.fixture(scope="module")
def small() -> Chat:
    return Chat(train_tokenizer(["Hello there. The sum of 12 and 345 is 357.\n"] * 9, 300))


def changed(chat: Chat, folder: Path, **parts: Any) -> Path:
    chat.save(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **parts}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_refused_by_name_in_a_line(
    small: Chat, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    changed(small, tmp_path, **ODD[name])
    with pytest.raises(UserError, match=r"tokenizer\.json") as refusal:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refusal.value)
    assert not capfd.readouterr().err, "the Rust library's own words"


@pytest.mark.parametrize(
    "step",
    [
        replacing({"String": " "}, "▁"),
        sequence(*[replacing({"String": c}, c + "--") for c in "—…–“”‘’«»"]),
        sequence({"type": "Prepend", "prepend": "▁"}, {"type": "NFKD"}, {"type": "Lowercase"}),
    ],
)
def test_what_normalizers_do_in_life_is_no_growth(small: Chat, tmp_path: Path, step: Any) -> None:
    assert load_tokenizer(changed(small, tmp_path, normalizer=step)).tokenizer.encode("Hello")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "x.jinja"]
)
def test_a_file_that_is_not_utf8_is_named(small: Chat, tmp_path: Path, name: str) -> None:
    small.save(tmp_path)
    (tmp_path / name).write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name}.* not UTF-8 at byte 4"):
        load_tokenizer(tmp_path, str(tmp_path / name) if name == "x.jinja" else None)


def test_a_text_on_which_the_library_fails_is_refused_alone(small: Chat, tmp_path: Path) -> None:
    """The others of its batch are encoded."""
    chat = load_tokenizer(changed(small, tmp_path, normalizer=SLOW))
    slow = "q" * 80
    with pytest.raises(TokenizerError, match="the tokenizers library can't"):
        chat.tokenizer.encode(slow)
    talks = [[suite.user(text), suite.said("Hello")] for text in ("Hi", slow, "there")]
    results = encode_many([read_conversation(talk) for talk in talks], chat, EncodeOptions())
    refused = [isinstance(result, Refusal) for result in results]
    assert refused == [False, True, False]
    with pytest.raises(Refused, match="the tokenizers library can't"):
        encode_prompt(talks[1][:1], chat)


def test_a_vocabulary_without_the_texts_letters(tmp_path: Path) -> None:
    content = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer: Tokenizer = load_tokenizer(tmp_path).tokenizer
    assert tokenizer.encode("a") == [0]
    with pytest.raises(TokenizerError, match="UNK"):
        tokenizer.encode("b")
