"""Tokenizer directories: read, trained, extended, saved."""

import json
import pickle
from pathlib import Path

import pytest
import transformers

from tests.chat import suite
from whet.chat.chat import Chat, add_chat_tokens, load_tokenizer
from whet.chat.encode import encode_chat
from whet.chat.tokenizer import train_tokenizer
from whet.errors import UserError

NAMES = ("gpt2", "qwen2", "tinyllama", "mistral_7b", "phi3", "minimind", "olmo2", "pythia")
TALK = [suite.user("Hi"), suite.said("Hello")]


@pytest.fixture(scope="module")
def small() -> Chat:
    return Chat(train_tokenizer(["Hello there. The sum of 12 and 345 is 357.\n"] * 9, 300))


@pytest.mark.parametrize("name", NAMES)
def test_real_tokenizers(shared_data: Path, name: str) -> None:
    chat = load_tokenizer(shared_data / "tokenizers" / name)
    text = "Hello, wörld! 12345\n\n  def f():\treturn '👍🏽'"
    assert chat.tokenizer.decode(chat.tokenizer.encode(text)).strip() == text
    assert chat.tokenizer.eos_id is not None
    assert chat.tokenizer.eos_id in chat.stop_ids
    assert max(chat.tokenizer.encode(text)) < chat.tokenizer.vocab_size
    assert len(chat.tokenizer.hash) == 64


@pytest.mark.parametrize("family", ["gpt-2", "qwen2", "phi-3", "llama-spm"])
def test_known_vectors(shared_data: Path, family: str) -> None:
    """Texts and ids that llama.cpp keeps for its own tokenizers."""
    names = {"gpt-2": "gpt2", "qwen2": "qwen2", "phi-3": "phi3", "llama-spm": "tinyllama"}
    chat = load_tokenizer(shared_data / "tokenizers" / names[family])
    vectors = shared_data / "tokenizers/vectors"
    texts = (vectors / f"{family}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = (vectors / f"{family}.out").read_text().splitlines()
    same = sum(
        chat.tokenizer.encode(text) == [int(i) for i in line.split()]
        for text, line in zip(texts, expected, strict=False)
    )
    assert same >= 0.9 * len(expected)  # a few differ in how they treat a text's first blanks


def test_trained_tokenizer(small: Chat) -> None:
    assert [small.tokenizer.decode([i]) for i in small.tokenizer.encode("345")] == ["3", "4", "5"]
    assert small.tokenizer.eos_id == 0
    assert small.stop_ids == (0,)
    assert small.tokenizer.bos_id is None
    assert small.tokenizer.decode(small.tokenizer.encode("né 👍\n")) == "né 👍\n"


def test_saved_tokenizer_is_read_back_and_by_transformers(small: Chat, tmp_path: Path) -> None:
    small.save(tmp_path)
    again = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.tokenizer.hash == small.tokenizer.hash
    assert again.template.hash == small.template.hash
    expected = list(encode_chat(TALK, small).ids)
    assert list(encode_chat(TALK, again).ids) == expected
    assert theirs.apply_chat_template(TALK, tokenize=True, return_dict=False) == expected
    assert theirs.eos_token_id == small.tokenizer.eos_id
    assert not list(tmp_path.glob(".*"))


def test_hash_is_that_of_the_content(small: Chat, tmp_path: Path) -> None:
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(content, indent=4), encoding="utf-8")
    again = load_tokenizer(tmp_path)
    assert again.tokenizer.hash == small.tokenizer.hash
    assert len(again.tokenizer.encode("Hello there. Hello there.")) > 4, (
        "a file's truncation is not obeyed"
    )
    content["added_tokens"][0]["lstrip"] = True
    file.write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(tmp_path).tokenizer.hash != small.tokenizer.hash


def test_chat_tokens_are_added_once(small: Chat) -> None:
    grown, new = add_chat_tokens(small, "chatml")
    assert new == ["<|im_start|>", "<|im_end|>"]
    assert grown.tokenizer.vocab_size == small.tokenizer.vocab_size + 2
    assert grown.stop_ids == (grown.control["<|im_end|>"], small.tokenizer.eos_id)
    assert add_chat_tokens(grown, "chatml")[1] == []
    assert small.tokenizer.backend.token_to_id("<|im_end|>") is None, "the old one is left as it is"


def test_pickles(small: Chat) -> None:
    grown, _ = add_chat_tokens(small, "chatml")
    again = pickle.loads(pickle.dumps(grown))
    assert list(encode_chat(TALK, again).ids) == list(encode_chat(TALK, grown).ids)
    assert again.tokenizer.hash == grown.tokenizer.hash


def test_where_the_template_comes_from(small: Chat, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path).template.hash == small.template.hash, "plain is the default"
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    config.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    both = load_tokenizer(tmp_path)
    assert both.template.source == "D"
    assert both.tool_template is not None
    assert both.tool_template.source == "T"
    both.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.tool_template is not None
    assert saved.tool_template.source == "T"
    config.write_text(json.dumps({"chat_template": "C"}), encoding="utf-8")
    assert load_tokenizer(tmp_path).template.source == "C"
    (tmp_path / "chat_template.jinja").write_text("J", encoding="utf-8")
    assert load_tokenizer(tmp_path).template.source == "J"
    assert "im_start" in load_tokenizer(tmp_path, "chatml").template.source


@pytest.mark.parametrize("said", ["x", {"a": 1}, [[1]], [1, "x"], True, -1])
def test_an_eos_that_is_no_id_is_told(small: Chat, tmp_path: Path, said: object) -> None:
    small.save(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": said}))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id is .*expected"):
        load_tokenizer(tmp_path)
    file.write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"generation_config.json: cannot be read as JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([{"template": "x"}], r"tokenizer_config.json: chat_template must be .*--chat_template"),
        ([{"name": "default"}], "must be a text or a list"),
        (["x"], "must be a text or a list"),
        ({"default": 1}, "must be a text or a list"),
        (7, "must be a text or a list"),
        ([{"name": "rag", "template": "x"}], "templates rag, but none is called default"),
    ],
)
def test_a_broken_template_is_never_replaced_by_another(
    small: Chat, tmp_path: Path, given: object, reason: str
) -> None:
    small.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": given}), encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, "plain").template.name == "plain"
    config.write_text(json.dumps({"chat_template": {"default": "D"}}), encoding="utf-8")
    assert load_tokenizer(tmp_path).template.source == "D"


def test_eos_from_generation_config(small: Chat, tmp_path: Path) -> None:
    """GLM ends a reply where the next turn's header begins, and says so only there."""
    small.save(tmp_path)
    source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    grown = suite.with_template(small, "{# <|user|><|assistant|><|system|> #}")
    (tmp_path / "tokenizer.json").write_text(grown.tokenizer.json_text, encoding="utf-8")
    stop = grown.control["<|user|>"]
    generation = {"eos_token_id": [small.tokenizer.eos_id, stop]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    chat = load_tokenizer(tmp_path)
    encoded = encode_chat([*TALK, suite.user("b"), suite.said("c")], chat)
    assert encoded.certificate.closed
    trained = encoded.ids[encoded.loss_mask > 0]
    assert chat.tokenizer.decode(trained, skip_special=False) == "Hello<|user|>c<|user|>"
    assert stop in chat.stop_ids


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "holds no tokenizer.json"),
        ("{", "is no tokenizer.json"),
        ("[]", "is no tokenizer.json"),
    ],
)
def test_broken_directories(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="is no directory"):
        load_tokenizer(tmp_path / "missing")


def test_unknown_template_name(small: Chat, tmp_path: Path) -> None:
    small.save(tmp_path)
    with pytest.raises(UserError, match="--chat_template nothing"):
        load_tokenizer(tmp_path, "nothing")


def test_a_named_token_of_the_ordinary_vocabulary_is_one_token(small: Chat, tmp_path: Path) -> None:
    """transformers cuts it out of texts although tokenizer.json does not list it as added."""
    small.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["<s>"] = max(vocab.values()) + 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["bos_token"] = "<s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs("<s>the sum", add_special_tokens=False).input_ids
    assert ours.tokenizer.encode("<s>the sum") == expected
    assert pickle.loads(pickle.dumps(ours)).tokenizer.encode("<s>the sum") == expected
    assert expected[0] == ours.tokenizer.bos_id == vocab["<s>"]


def test_templates_see_every_named_token(small: Chat, tmp_path: Path) -> None:
    """As in transformers: those of extra_special_tokens and each other key of the config."""
    source = "{{ boi }}{{ video_token }}{{ eos_token }}" + small.template.source
    grown = suite.with_template(small, source + "{# <|boi|><|video|> #}")
    config = {"extra_special_tokens": {"boi": "<|boi|>"}, "video_token": "<|video|>"}
    config |= {"add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    grown.save(tmp_path)
    config |= {"eos_token": "</s>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for number in range(2):
        folder = tmp_path / str(number) if number else tmp_path
        ours = load_tokenizer(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        expected = theirs.apply_chat_template(TALK, tokenize=True, return_dict=False)
        assert list(encode_chat(TALK, ours).ids) == expected
        assert ours.tokenizer.decode(expected, skip_special=False).startswith(
            "<|boi|><|video|></s>"
        )
        ours.save(tmp_path / "1")
