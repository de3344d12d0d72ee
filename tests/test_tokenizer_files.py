"""SentencePiece and tiktoken files against the libraries that they belong to."""

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from whet.chat.tokenizer import read_tokenizer
from whet.errors import UserError
from whet.tokenizer_files import (
    TIKTOKEN,
    add_ends,
    byte_letters,
    convert,
    find_convertible,
)

TEXTS = [
    "Hello world",
    " Hello,  world!\n\n\tx = 12345 + 6.78;",
    "don't WE'LL I'd  've  naïve Führer – 日本語テキスト 한국어 🦙.cpp",
    "    indented\r\n   lines  \n ",
    "\u200bzero\xa0width é e\u0301 ﬁ ½ ① ４２",
    "",
    "a",
    " ",
    "1 22 333 4444 55555",
]


@cache
def backend(file: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(convert(file).json_text)


def ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["sentencepiece/mistral_v3.model", "tinyllama/tokenizer.model"])
def test_sentencepiece_files_give_sentencepieces_ids(shared_data: Path, name: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    file = shared_data / "tokenizers" / name
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(file))
    found = backend(file)
    prose = (shared_data / "text" / "tinyshakespeare.txt").read_text()[:20_000]
    for text in [*TEXTS, prose]:
        assert ids(found, text) == oracle.encode(text)
        assert found.decode(oracle.encode(text)) == oracle.decode(oracle.encode(text))
    assert found.get_vocab_size() == oracle.vocab_size()
    assert convert(file).named == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_the_files_that_others_converted_agree(shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / "tinyllama"
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = backend(folder / "tokenizer.model")
    assert found.get_vocab() == theirs.get_vocab()
    for text in [*TEXTS, "a</s> b<s>c"]:
        assert ids(found, text) == ids(theirs, text)


def trained(folder: Path, **options: Any) -> Path:
    """A small SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = "the shop sells three apples and two pears, she pays 12 coins\n"
    (folder / "text").write_text(text * 20 + "who counts what remains of them?\n" * 9)
    settings = {"vocab_size": 310, "byte_fallback": True, "hard_vocab_limit": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        **settings,
    )
    file = find_convertible(folder)
    assert file == folder / "tokenizer.model"
    return file


SYMBOLS = {"user_defined_symbols": ["<sep>", "[x"]}
PLAIN = {"add_dummy_prefix": False}
IDENTITY = {"normalization_rule_name": "identity"}


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {**IDENTITY, "remove_extra_whitespaces": False},
        {**IDENTITY},
        {**SYMBOLS},
        {**SYMBOLS, **IDENTITY, "remove_extra_whitespaces": False},
        {**SYMBOLS, **PLAIN},
        {**SYMBOLS, **PLAIN, **IDENTITY},
        {**SYMBOLS, **PLAIN, **IDENTITY, "remove_extra_whitespaces": False},
    ],
    ids=str,
)
def test_trained_sentencepiece_models(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    file = trained(tmp_path, model_type=model_type, **options)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(file))
    found = backend(file)
    texts = ["the three pears", " she  counts what\tthem", "ﬁve 日 shops", "apples<sep>remains"]
    texts += ["a<sep>b", "a <sep>  b ", "<sep> x<sep>", "[x[x<sep>", "＜sep＞ a", "\n[x a\n"]
    texts += ["\n\nthe\n", "\u3000the ", ""]
    texts += ["<sep>"] if options.keys() >= PLAIN.keys() else []  # else it has no space before it
    for text in texts:
        assert ids(found, text) == oracle.encode(text), text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user_defined_symbols": ["ﬁ"]}, "the 1 symbols .* 'ﬁ'"),
        ({"treat_whitespace_as_suffix": True}, "spaces at the end of words"),
    ],
)
def test_sentencepiece_models_that_would_get_other_ids_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"tokenizer.model: .*{message}"):
        convert(trained(tmp_path, **options))


@pytest.mark.parametrize(
    "said",
    [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}],
    ids=str,
)
def test_bos_and_eos_stand_where_transformers_puts_them(
    tmp_path: Path, said: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    trained(tmp_path, model_type="bpe", **IDENTITY, remove_extra_whitespaces=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", **names, **said}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = read_tokenizer(tmp_path)
    found.save(tmp_path / "saved")
    config = {"add_bos_token": True, **config}  # the older default, as the models were trained
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("three apples", "she  counts\n"):
        expected = theirs(text).input_ids
        assert found.backend.encode(text).ids == expected
        assert again(text).input_ids == expected
        assert found.encode(text) == [i for i in expected if i not in (1, 2)]


def test_ends_are_added_where_the_file_says_so() -> None:
    """GPT-2's files name their <|endoftext|> as bos, and do not put it first."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<b>": 1}, "a"))
    made.add_special_tokens(["<b>"])
    for said, expected in (({}, [0]), ({"add_bos_token": True}, [1, 0])):
        add_ends(made, {"bos_token": "<b>"}, said)
        assert made.encode("a").ids == expected


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base"])
def test_tiktoken_files_give_tiktokens_ids(shared_data: Path, name: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    file = shared_data / "tokenizers" / "tiktoken" / f"{name}.tiktoken"
    lines = file.read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    vocabulary = TIKTOKEN[len(ranks)]
    oracle = tiktoken.Encoding(
        name,
        pat_str=vocabulary.pattern,
        mergeable_ranks=ranks,
        special_tokens=vocabulary.special,
    )
    found = backend(file)
    prose = (shared_data / "text" / "tinyshakespeare.txt").read_text()[:20_000]
    for text in [*TEXTS, prose, "a<|endoftext|>b"]:
        assert ids(found, text) == oracle.encode(text, allowed_special="all")
        assert found.decode(ids(found, text), skip_special_tokens=False) == text


def test_r50k_is_gpt2(shared_data: Path) -> None:
    folder = shared_data / "tokenizers"
    found = backend(folder / "tiktoken" / "r50k_base.tiktoken")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "gpt2" / "tokenizer.json"))
    assert found.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ids(found, text) == ids(theirs, text)


def test_qwen_tiktoken_is_its_tokenizer_json(shared_data: Path, tmp_path: Path) -> None:
    """Qwen's file of ranks, written again from the tokenizer.json that was made of it."""
    theirs = tokenizers.Tokenizer.from_file(str(shared_data / "tokenizers/qwen2/tokenizer.json"))
    byte = {letter: b for b, letter in byte_letters().items()}
    vocab = theirs.get_vocab(with_added_tokens=False)
    lines = [
        base64.b64encode(bytes(byte[letter] for letter in token)) + b" %d" % rank
        for token, rank in sorted(vocab.items(), key=lambda item: item[1])
    ]
    file = tmp_path / "qwen.tiktoken"
    file.write_bytes(b"\n".join(lines))
    found = backend(file)
    assert found.get_vocab() == theirs.get_vocab()
    prose = (shared_data / "text" / "tinyshakespeare.txt").read_text()[:20_000]
    vectors = (shared_data / "tokenizers/vectors/qwen2.inp").read_text()
    texts = [*TEXTS, *vectors.split("\n__ggml_vocab_test__\n"), prose]
    for text in [*texts, "a<|im_start|>b<|im_end|><|endoftext|>"]:
        assert ids(found, text) == ids(theirs, text), text


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_patterns_and_special_tokens_are_tiktokens(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its table of vocabularies is installed with it; only the ranks would be downloaded."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    split = pytest.importorskip("regex").findall
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(public, loader, lambda *args, **kwargs: {})
    theirs = getattr(public, name)()
    ours = next(v for v in TIKTOKEN.values() if v.name == name)
    assert ours.special == theirs["special_tokens"]
    prose = (shared_data / "text" / "tinyshakespeare.txt").read_text()[:20_000]
    camel = "HTTPServer's camelCase DON'T ÀÉîö ǅungla a/b//c\n/x  \n 1234567 ½ʰ"
    for text in [*TEXTS, prose, camel, camel + " \n "]:
        assert split(ours.pattern, text) == split(theirs["pat_str"], text)


def test_load_tokenizer_converts_what_it_finds(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "tokenizers" / "tinyllama"
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    found, theirs = read_tokenizer(tmp_path), read_tokenizer(folder)
    assert (found.eos_id, found.bos_id) == (theirs.eos_id, theirs.bos_id) == (2, 1)
    assert found.encode("Hello world") == theirs.encode("Hello world")


def test_other_files_are_told(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match="a tiktoken file of 2 ranks"):
        convert(file)
    file.write_bytes(b"IQ== 0\nIg== x\n")
    with pytest.raises(UserError, match=r"tokenizer.model:2: expected a base64 token"):
        convert(file)
    for content in (b"", b"hello", b"\xff" * 50):
        file.write_bytes(content)
        with pytest.raises(UserError, match="neither a SentencePiece model nor a tiktoken file"):
            convert(file)
    assert find_convertible(tmp_path / "none") is None
