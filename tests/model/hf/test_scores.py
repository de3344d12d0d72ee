"""Models with one score, as reward models are: the files of transformers, in both directions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.model import zoo
from whet.errors import UserError
from whet.model.decoder import Transformer
from whet.model.hf.checkpoint import save_model
from whet.model.open import load_backbone_from_ckpt

transformers = pytest.importorskip("transformers")
Classifier = transformers.AutoModelForSequenceClassification
CASES = [case for case in zoo.CASES if case != "granite"]  # transformers has no such class of it
LENGTHS = (14, 9, 3, 12, 7, 14, 2, 11)
PAD = 2


def rows(vocab_size: int = 96) -> torch.Tensor:
    """(8, 14): sequences of `LENGTHS` tokens, padded on the right."""
    tokens = torch.randint(3, vocab_size, (8, 14), generator=torch.Generator().manual_seed(0))
    places = torch.arange(14)
    return torch.where(places < torch.tensor(LENGTHS)[:, None], tokens, PAD)


@torch.no_grad()
def scores(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """(B,): Whet's score at the last token of each of the rows."""
    segments = (torch.arange(14) < torch.tensor(LENGTHS)[:, None]).long()[: len(tokens)]
    last = torch.nn.functional.one_hot(torch.tensor(LENGTHS) - 1, 14)[: len(tokens)].float()
    return model(tokens, segments=segments, weight=last).sum(1)


@torch.no_grad()
def their_scores(model: Any, tokens: torch.Tensor, pad: int = PAD) -> torch.Tensor:
    return model(tokens, attention_mask=(tokens != pad).long()).logits[:, 0]


@pytest.mark.parametrize("case", CASES)
def test_reward_models_of_transformers_open_and_are_saved(case: str, tmp_path: Path) -> None:
    theirs = zoo.oracle(case, auto=Classifier, num_labels=1, pad_token_id=PAD)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_backbone_from_ckpt(tmp_path / "theirs", score=True)
    expected = their_scores(theirs, rows())
    if case not in ("llama-dynamic", "phi3-long"):  # theirs go by the longest text of the batch
        assert torch.allclose(scores(ours, rows()), expected, atol=1e-4)
    assert torch.allclose(scores(ours, rows()[:1]), their_scores(theirs, rows()[:1]), atol=1e-4)
    save_model(ours, tmp_path / "ours", None, {})
    again, info = Classifier.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    assert torch.equal(their_scores(again, rows()), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_language_model_gets_a_score_and_transformers_opens_it(case: str, tmp_path: Path) -> None:
    zoo.oracle(case).save_pretrained(tmp_path / "base")
    model = load_backbone_from_ckpt(tmp_path / "base", score=True)
    assert not scores(model, rows()).any()
    model.score.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    save_model(model, tmp_path / "reward", None, {})
    assert set(load_file(tmp_path / "reward/model.safetensors")) >= {"score.weight"}
    theirs, info = Classifier.from_pretrained(
        tmp_path / "reward", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    assert theirs.config.num_labels == 1
    assert torch.allclose(their_scores(theirs, rows()[:1]), scores(model, rows()[:1]), atol=1e-4)
    assert torch.equal(
        load_backbone_from_ckpt(tmp_path / "reward", score=True).score.weight, model.score.weight
    )


def test_padding_is_no_stop_token(tmp_path: Path) -> None:
    """The tiny tokenizer has only an eos: it ends conversations, so something else must pad."""
    tiny.model_directory(tmp_path / "base")
    model = load_backbone_from_ckpt(tmp_path / "base", score=True)
    model.score.weight.data.normal_()
    chat = tiny.chat()
    save_model(model, tmp_path / "reward", chat, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "reward")
    theirs = Classifier.from_pretrained(tmp_path / "reward")
    assert tokenizer.pad_token_id == theirs.config.pad_token_id
    assert tokenizer.pad_token_id not in chat.stop_ids
    texts = ["one two<|endoftext|>", "three four five sum of one<|endoftext|>"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch.input_ids[1, -1] == chat.tokenizer.eos_id
    with torch.no_grad():
        found = theirs(**batch).logits[:, 0]
        for text, score in zip(texts, found, strict=True):
            tokens = torch.tensor([chat.tokenizer.encode(text)])
            assert tokens[0, -1] == chat.tokenizer.eos_id
            expected = model(tokens, weight=torch.ones(tokens.shape))[0, -1]
            assert torch.allclose(score, expected, atol=1e-5)


def test_the_other_kind_is_refused(tmp_path: Path) -> None:
    model = zoo.oracle("llama", auto=Classifier, num_labels=1)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="a reward model, which gives scores; expected a language"):
        load_backbone_from_ckpt(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    for labels in ({"id2label": {"0": "a", "1": "b"}}, {"id2label": None, "num_labels": 3}):
        (tmp_path / "m/config.json").write_text(json.dumps(config | labels))
        with pytest.raises(UserError, match=r"config.json: LlamaFor.* with [23] labels"):
            load_backbone_from_ckpt(tmp_path / "m", score=True)
