"""Every family's files, in both directions, with transformers as the oracle.

`test_parity.py` compares the arithmetic (logits, packed rows, gradients) of the same models.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from tests.model import zoo
from whet.generate.engine import generate
from whet.model.hf.checkpoint import save_model, save_pt
from whet.model.open import load_backbone_from_ckpt

transformers = pytest.importorskip("transformers")
Saved = Callable[[str], Path]
each_case = pytest.mark.parametrize("case", zoo.CASES)


@cache
def original(case: str) -> Any:
    return zoo.oracle(case)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """case -> the model directory that transformers wrote for it."""
    root = tmp_path_factory.mktemp("families")

    def directory(case: str) -> Path:
        if not (root / case).exists():
            original(case).save_pretrained(root / case)
        return root / case

    return directory


def some_tokens(n: int) -> torch.Tensor:
    return torch.randint(3, 96, (1, n), generator=torch.Generator().manual_seed(n))


@each_case
def test_a_directory_of_transformers_opens_with_its_logits(case: str, saved: Saved) -> None:
    tokens = some_tokens(24)
    with torch.no_grad():
        expected = original(case)(tokens).logits
        assert torch.allclose(load_backbone_from_ckpt(saved(case))(tokens), expected, atol=1e-4)


@each_case
def test_greedy_text_equals_token_for_token(case: str, saved: Saved) -> None:
    model = load_backbone_from_ckpt(saved(case))
    prompts = [some_tokens(n)[0].tolist() for n in (9, 4)]
    # dynamic changes with every token, but only beyond max_positions, where Whet ends.
    room = min(14, model.config.max_positions - 9)
    replies = generate(model, prompts, max_new_tokens=room, stop_ids=(1,))
    for prompt, reply in zip(prompts, replies, strict=True):
        expected = original(case).generate(
            torch.tensor([prompt]), max_new_tokens=room, do_sample=False
        )
        assert reply == expected[0, len(prompt) :].tolist()


@each_case
def test_saved_and_opened_again_is_bit_identical(case: str, saved: Saved, tmp_path: Path) -> None:
    model = load_backbone_from_ckpt(saved(case))
    save_model(model, tmp_path / "dir", None, {})
    save_pt(model, tmp_path / "model.pt", "sft", 1, {})
    for path in (tmp_path / "dir", tmp_path / "model.pt"):
        again = load_backbone_from_ckpt(path)
        assert again.config == model.config
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name

    ours = load_file(tmp_path / "dir" / "model.safetensors")
    theirs = load_file(saved(case) / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    opened, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dir", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    tokens = some_tokens(20)
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, original(case)(tokens).logits)


def test_bfloat16_weights_survive_training_precision(saved: Saved, tmp_path: Path) -> None:
    model = load_backbone_from_ckpt(saved("gemma2"), dtype=torch.bfloat16)
    save_model(model, tmp_path / "a", None, {})
    in_float32 = load_backbone_from_ckpt(tmp_path / "a")
    save_model(in_float32, tmp_path / "b", None, {}, torch.bfloat16)
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert all(value.dtype == torch.bfloat16 for value in second.values())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gpt2_without_head_prefix_opens(saved: Saved, tmp_path: Path) -> None:
    """openai's own GPT-2 files leave out `transformer.`, and carry the causal mask as a buffer."""
    from safetensors.torch import save_file

    tensors = load_file(saved("gpt2") / "model.safetensors")
    plain = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    plain["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(plain, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved("gpt2") / "config.json").read_bytes())
    again = load_backbone_from_ckpt(tmp_path).state_dict()
    expected = load_backbone_from_ckpt(saved("gpt2")).state_dict()
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama-biases-tied", "head"),
        ("gpt2", "head"),
        ("llama", "plain"),
        ("llama-biases-tied", "plain head"),
        ("gemma3", "plain head"),
    ],
)
def test_files_that_only_name_things_differently_open(
    case: str, change: str, saved: Saved, tmp_path: Path
) -> None:
    """A tied model stored by its head alone, and names without their prefix."""
    from safetensors.torch import save_file

    tensors = load_file(saved(case) / "model.safetensors")
    if "head" in change:
        embedding = "transformer.wte.weight" if case == "gpt2" else "model.embed_tokens.weight"
        tensors["lm_head.weight"] = tensors.pop(embedding)
    if "plain" in change:
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved(case) / "config.json").read_bytes())
    tokens = some_tokens(12)
    with torch.no_grad():
        expected = original(case)(tokens).logits
        assert torch.allclose(load_backbone_from_ckpt(tmp_path)(tokens), expected, atol=1e-4)


def test_stories260k_continues_text_as_documented(shared_data: Path) -> None:
    directory = shared_data / "models" / "stories260K"
    model = load_backbone_from_ckpt(directory)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt = tokenizer.encode("Once upon a time").ids
    [reply] = generate(model, [prompt], max_new_tokens=22, stop_ids=())
    assert tokenizer.decode(reply).startswith(", there was a little girl named Lily.")
