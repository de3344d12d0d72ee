"""Tokenizer directories: whatever stands in their files, each opens or is refused in a line."""

import json
import tempfile
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.harness import SCALARS, counts, damaged, fuzz, json_like
from whet.chat.chat import Chat, load_tokenizer
from whet.chat.tokenizer import train_tokenizer

CHAT = Chat(train_tokenizer(["Hello there. The sum of 12 and 345 is 357.\n"] * 9, 280))
NAMES = ("bos", "eos", "unk", "pad", "video")
KEYS = [f"{name}_token" for name in NAMES]
KEYS += ["added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"]
KEYS += ["content", "special", "lstrip", "0", "999", "<a>", "__type", "chat_template"]
FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PLACES = ("normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens", "model")
KINDS = ["Replace", "Prepend", "Sequence", "Precompiled", "NFC", "Strip", "Split", "ByteLevel"]
KINDS += ["Metaspace", "Digits", "FixedLength", "WordPiece", "BPE", "Unigram", "WordLevel"]
KINDS += ["TemplateProcessing", "CTC", "Fuse", "ByteFallback", "Whitespace", "Lowercase"]
FIELDS = ["type", "pattern", "content", "String", "Regex", "normalizers", "pretokenizers", "id"]
FIELDS += ["decoders", "prepend", "precompiled_charsmap", "vocab", "merges", "unk_id", "unk_token"]
FIELDS += ["start", "stop", "length", "behavior", "invert", "replacement", "prefix", "special"]


def use(folder: Path) -> None:
    """Open the directory, encode and decode with it, save it, and open what was saved."""
    opened = load_tokenizer(folder).tokenizer
    ids = opened.encode("Hello <a> 12<|endoftext|> é")
    opened.decode(ids)
    opened.save(folder / "saved")
    again = load_tokenizer(folder / "saved").tokenizer
    assert again.encode("Hello <a> 12<|endoftext|> é") == ids
    assert again.hash == opened.hash


def directory(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        CHAT.save(folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        use(folder)


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


@counts(60, 5_000)
def test_declared_tokens(count):
    content = json_like(KEYS).map(as_json)
    files = st.dictionaries(st.sampled_from(FILES), content, min_size=1, max_size=3)
    tally = fuzz("declared tokens", files, directory, count)
    assert min(tally["read"], tally["refused"]) > 0


@counts(60, 5_000)
def test_parts_of_a_tokenizer_json(count):
    kinds = st.fixed_dictionaries({"type": st.sampled_from(KINDS)})
    other = st.dictionaries(st.sampled_from(FIELDS), SCALARS | kinds | st.lists(kinds, max_size=3))
    part = st.tuples(kinds, other).map(lambda pair: {**pair[1], **pair[0]})
    parts = st.dictionaries(st.sampled_from(PLACES), part, min_size=1, max_size=2)

    def read(changed: dict) -> None:
        content = {**json.loads(CHAT.tokenizer.json_text), **changed}
        directory({"tokenizer.json": as_json(content)})

    tally = fuzz("parts of a tokenizer.json", parts, read, count)
    assert tally["refused"] > 0
    if count > 1000:  # few random parts make a tokenizer: among some dozens there may be none
        assert tally["read"] > 0


@counts(60, 5_000)
def test_damaged(count):
    strategy = damaged(CHAT.tokenizer.json_text.encode())
    tally = fuzz(
        "damaged tokenizer.json", strategy, lambda b: directory({"tokenizer.json": b}), count
    )
    assert min(tally["read"], tally["refused"]) > 0
