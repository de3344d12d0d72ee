"""GGUF files: layouts, metadata and tokenizers. The oracle is transformers' own reader of GGUF; by
hand the files were held against llama.cpp itself (docs/models.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.model import zoo
from whet.chat.chat import Chat
from whet.chat.template import ChatTemplate
from whet.chat.tokenizer import Tokenizer
from whet.cli import main
from whet.errors import UserError
from whet.model.config import ModelConfig, Rope, llama
from whet.model.decoder import Transformer, init_weights
from whet.model.gguf import interleaved, metadata, misfits, notes, write_gguf
from whet.model.gguf_tokenizer import modelfile, ollama_template, tokenizer_metadata
from whet.model.hf.checkpoint import save_model

gguf = pytest.importorskip("gguf")
VOCABULARY = {
    "ggml.model": "gpt2",
    "ggml.pre": "gpt-2",
    "ggml.tokens": ["a"],
    "ggml.merges": ["a b"],
}
EXPORTED = [case for case in zoo.CASES if case not in ("llama-dynamic", "gemma2", "gemma3")]


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def written(case: str, path: Path, kind: str = "F32") -> Transformer:
    model = zoo.whet_model(case, zoo.oracle(case)).eval()
    write_gguf(model, path, kind, "name", VOCABULARY)
    return model


@pytest.mark.parametrize("case", ["llama", "mistral-no-window", "qwen2"])
def test_transformers_reads_the_same_model(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = written(case, tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(tokens).logits, model(tokens), atol=1e-4)


@pytest.mark.parametrize("case", EXPORTED)
def test_every_family_is_written(case: str, tmp_path: Path) -> None:
    model = written(case, tmp_path / "m.gguf")
    found = tensors(tmp_path / "m.gguf")
    assert sum(v.size for k, v in found.items() if not k.startswith("rope_")) == sum(
        p.numel() for p in model.parameters()
    )
    norm = found["output_norm.weight"]
    assert np.allclose(norm, model.norm.weight.detach() + model.config.norm_offset)


def test_rows_of_queries_are_interleaved_for_llama_only(tmp_path: Path) -> None:
    """Number i and i + H/2 of a head, which rotate together, come to stand side by side."""
    rows = torch.arange(8.0)[:, None]
    assert interleaved(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    model = written("llama", tmp_path / "a.gguf")
    expected = interleaved(model.layers[0].attn.q.weight.detach(), 8)
    assert np.array_equal(tensors(tmp_path / "a.gguf")["blk.0.attn_q.weight"], expected)
    model = written("qwen2", tmp_path / "b.gguf")
    expected = model.layers[0].attn.q.weight.detach()
    assert np.array_equal(tensors(tmp_path / "b.gguf")["blk.0.attn_q.weight"], expected)


def test_stretched_positions_are_factors_of_the_plain_ones(tmp_path: Path) -> None:
    written("llama-3.2", tmp_path / "m.gguf")
    factors = tensors(tmp_path / "m.gguf")["rope_freqs.weight"]
    theirs = zoo.oracle("llama-3.2").model.rotary_emb.inv_freq
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    assert np.allclose(plain / factors, theirs, rtol=1e-5)
    assert factors[-1] == pytest.approx(zoo.LLAMA3_ROPE["factor"])
    written("phi3-long", tmp_path / "long.gguf")
    found = tensors(tmp_path / "long.gguf")
    assert np.allclose(found["rope_factors_long.weight"], zoo.LONG_ROPE["long_factor"])
    assert np.allclose(found["rope_factors_short.weight"], zoo.LONG_ROPE["short_factor"])


@pytest.mark.parametrize(("kind", "bound"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 2e-2)])
def test_matrices_are_rounded_and_vectors_are_not(kind: str, bound: float, tmp_path: Path) -> None:
    model = written("qwen2", tmp_path / "m.gguf", kind)
    found = tensors(tmp_path / "m.gguf")
    matrix = model.layers[1].attn.o.weight.detach().numpy()
    difference = np.abs(found["blk.1.attn_output.weight"] - matrix).max() / np.abs(matrix).max()
    assert 0 < difference < bound
    assert np.array_equal(found["blk.1.attn_q.bias"], model.layers[1].attn.q.bias.detach())


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("llama-dynamic", "no rotary positions of kind dynamic"),
        ("gemma2", "divides by the square root of 16"),
        ("gemma3", "divides by the square root of 16"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(case: str, said: str) -> None:
    assert said in "\n".join(misfits(zoo.whet_config(case)))


def test_windows_that_llama_cpp_leaves_out_are_noted() -> None:
    assert "beyond 6 tokens" in notes(zoo.whet_config("mistral"))[0]
    assert notes(zoo.whet_config("llama")) == []


def test_scales_are_in_the_metadata() -> None:
    config = zoo.whet_config("granite")
    values = metadata(config)
    assert values["embedding_scale"] == config.embed_scale
    assert values["logit_scale"] == pytest.approx(1 / config.logit_scale)
    yarn = Rope(theta=1e4, size=16, kind="yarn", factor=4.0, original_positions=16)
    odd = llama(96, 32, 2, 2, max_positions=64)
    odd = ModelConfig(**{**vars(odd), "ropes": (yarn, yarn)})
    assert "settings that llama.cpp does not read" in misfits(odd)[0]


def test_a_tokenizer_and_its_stops(tmp_path: Path) -> None:
    chat = tiny.chat()
    values = tokenizer_metadata(chat, 320)
    assert values["ggml.tokens"][:292] == [
        chat.tokenizer.backend.id_to_token(number) for number in range(292)
    ]
    assert values["ggml.token_type"][300] == 5, "rows without a token are unused"
    assert values["ggml.pre"] == "smollm", "digits one by one"
    assert values["ggml.eos_token_id"] == chat.stop_ids[0]
    assert values["chat_template"] == chat.template.source


def changed(change: dict) -> Chat:
    chat = tiny.chat()
    described = {**json.loads(chat.tokenizer.backend.to_str()), **change}
    backend = type(chat.tokenizer.backend).from_str(json.dumps(described))
    return Chat(Tokenizer(backend, json.dumps(described), chat.tokenizer.named))


def test_a_way_of_splitting_without_a_name_is_refused() -> None:
    with pytest.raises(UserError, match="splits texts in a way"):
        tokenizer_metadata(changed({"pre_tokenizer": {"type": "Whitespace"}}), 300)


def test_sentencepiece_merges_become_scores() -> None:
    model = {
        "type": "BPE",
        "vocab": {"<unk>": 0, "<0x41>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6},
        "merges": [["a", "b"], ["▁", "ab"]],
        "unk_token": "<unk>",
        "byte_fallback": True,
    }
    normal = {"type": "Prepend", "prepend": "▁"}
    change = {"model": model, "normalizer": normal, "pre_tokenizer": None, "decoder": None}
    values = tokenizer_metadata(changed({**change, "added_tokens": [], "post_processor": None}), 7)
    assert values["ggml.model"] == "llama"
    assert values["ggml.scores"][5] == 0.0 > values["ggml.scores"][6] == -1.0
    assert values["ggml.token_type"][:3] == [2, 6, 1]
    assert values["ggml.add_space_prefix"] is True


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_modelfile_says_template_and_stops() -> None:
    chat = tiny.chat()
    text = modelfile(chat, llama(300, 32, 2, 4, max_positions=64), "model.gguf")
    stop = chat.tokenizer.backend.id_to_token(chat.stop_ids[0])
    assert text.startswith(f'FROM ./model.gguf\nPARAMETER stop "{stop}"\nPARAMETER num_ctx 64\n')
    plain = tiny.tokenizer().with_tokens(["<|im_start|>", "<|im_end|>"])
    found = ollama_template(Chat(plain, ChatTemplate(CHATML)))
    assert found == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}'
        '<|im_end|>\n{{ end }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '<|im_start|>assistant\n{{ end }}{{ if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}"
    )
    counted = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ loop.index }}")
    assert ollama_template(Chat(plain, ChatTemplate(counted))) is None


def test_export_writes_a_folder_for_llama_cpp_and_ollama(tmp_path: Path, capsys) -> None:
    model = Transformer(llama(300, 32, 2, 4, max_positions=64))
    init_weights(model, seed=0)
    save_model(model, tmp_path / "base", tiny.chat(), {})
    words = ["export", str(tmp_path / "base"), "--to", "gguf", "--out", str(tmp_path / "g")]
    assert main([*words, "--dtype", "q8_0"]) == 0
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == ["Modelfile", "model.gguf"]
    assert "Q8_0, read back and equal" in capsys.readouterr().out
    fields = gguf.GGUFReader(tmp_path / "g" / "model.gguf").fields
    assert fields["general.architecture"].contents() == "llama"
    assert main([*words[:4], "--dtype", "q8_0", "--to", "hf", "--out", str(tmp_path / "x")]) == 2
    assert "--dtype q8_0: a precision of GGUF files" in capsys.readouterr().err
