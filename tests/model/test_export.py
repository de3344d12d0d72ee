"""`whet export`: merged adapters, the three kinds of output, the check of names for llama.cpp."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model import zoo
from whet.chat.chat import Chat
from whet.chat.tokenizer import train_tokenizer
from whet.cli import main
from whet.errors import UserError
from whet.model import export
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.export import check_gguf, is_gguf_name
from whet.model.hf.checkpoint import file_places, save_model
from whet.model.hf.config import from_hf, to_hf
from whet.model.lora.lora import LoRA, adapters, apply_lora
from whet.model.lora.write import save_adapter
from whet.model.open import load_backbone_from_ckpt

TOKENS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(["some words, and 12 more words"], 280))


@pytest.fixture
def base(tmp_path: Path, chat: Chat) -> Path:
    model = Transformer(llama(300, 32, 2, 4, max_positions=64))
    init_weights(model, seed=0)
    save_model(model, tmp_path / "base", chat, {"stage": "sft", "step": 4}, torch.bfloat16)
    return tmp_path / "base"


@pytest.fixture
def adapted(base: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An adapter's directory, and the logits of base and adapter."""
    lora = LoRA(rank=3, alpha=6.0, dora=True)
    model = load_backbone_from_ckpt(base)
    apply_lora(model, lora)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.b.normal_(0.0, 0.3)
    save_adapter(model, tmp_path / "adapter", lora, str(base), None, {"step": 9})
    return tmp_path / "adapter", model(TOKENS)


def test_merged_adapters_give_the_same_logits(
    adapted: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, expected = adapted
    out = tmp_path / "merged"
    assert main(["export", str(directory), "--out", str(out)]) == 2
    assert "--merge makes a whole model" in capsys.readouterr().err
    assert main(["export", str(directory), "--merge", "--out", str(out), "--dtype", "float32"]) == 0
    assert torch.allclose(load_backbone_from_ckpt(out)(TOKENS), expected, atol=1e-5)
    assert torch.allclose(load_backbone_from_ckpt(directory)(TOKENS), expected, atol=1e-5)
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "whet.json").read_text())["step"] == 9
    assert main(["export", str(directory), "--merge", "--out", str(tmp_path / "same")]) == 0
    values = json.loads((tmp_path / "same" / "config.json").read_text())
    assert values["torch_dtype"] == "bfloat16"


def test_rounding_that_only_the_configuration_asks_for_is_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((base / "config.json").read_text())
    stored = config["torch_dtype"]
    (tmp_path / "m").mkdir()
    for file in base.iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    model = load_backbone_from_ckpt(base)
    save_model(model, tmp_path / "m", None, {"metrics": {"step": 7}}, torch.float32)
    values = json.loads((tmp_path / "m/config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (tmp_path / "m/config.json").write_text(json.dumps(values))

    def told(*flags: str) -> str:
        out = tmp_path / f"out{len(flags)}.pt"
        command = ["export", str(tmp_path / "m"), "--to", "pt", "--out", str(out), *flags]
        assert main(command) == 0
        assert torch.load(out, weights_only=True)["step"] == 7
        return capsys.readouterr().out

    line = "the weights are float32, config.json says bfloat16: they are saved rounded to bfloat16"
    assert line in told()
    assert line not in told("--dtype", "float32")
    assert stored == "bfloat16"


def test_a_merge_that_changes_the_logits_is_an_error(
    adapted: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = export.merge_lora

    def wrong(model: Any) -> None:
        for _, layer in adapters(model):
            layer.scale *= 1.01
        merge(model)

    monkeypatch.setattr(export, "merge_lora", wrong)
    with pytest.raises(RuntimeError, match="logits differ"):
        main(["export", str(adapted[0]), "--merge", "--out", str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["adapter", "--merge", "--out", "base"], "reads or writes this already"),
        (["adapter", "--merge", "--out", "adapter"], "reads or writes this already"),
        (["base", "--out", "base"], "reads or writes this already"),
        (["base", "--out", "notes.txt"], "is a file; expected a folder"),
        (["base", "--to", "pt", "--out", "notes.txt"], "exists and is no .pt file of torch"),
        (["base", "--to", "pt", "--out", "base/model.safetensors"], "is no .pt file of torch"),
        (["base", "--to", "pt", "--out", "adapter"], "is a directory; expected a file"),
    ],
)
def test_nothing_is_written_over_what_is_read_or_of_another_kind(
    adapted: Any, tmp_path: Path, capsys: Any, monkeypatch: Any, words: list[str], told: str
) -> None:
    (tmp_path / "notes.txt").write_text("dear to somebody")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words]) == 2
    assert f"--out {words[-1]}: " in (error := capsys.readouterr().err)
    assert told in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_one_file_and_back(base: Path, tmp_path: Path) -> None:
    file, again = tmp_path / "model.pt", tmp_path / "again"
    assert main(["export", str(base), "--to", "pt", "--out", str(file)]) == 0
    assert torch.load(file, weights_only=True)["stage"] == "sft"
    assert main(["export", str(file), "--tokenizer", str(base), "--out", str(again)]) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (base / name).read_bytes()


def test_gguf_ready(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "tokenizer.model").write_bytes(b"pieces")
    out = tmp_path / "gguf"
    assert main(["export", str(base), "--to", "gguf-ready", "--out", str(out)]) == 0
    assert "convert_hf_to_gguf.py" in capsys.readouterr().out
    assert (out / "tokenizer.model").read_bytes() == b"pieces"


@pytest.mark.parametrize("case", zoo.CASES)
def test_llama_cpp_knows_the_names_of_every_family(case: str) -> None:
    names = {place.name for place in file_places(zoo.whet_config(case)).values()}
    assert [name for name in names if not is_gguf_name(name)] == []


@pytest.mark.parametrize("case", zoo.CASES)
def test_its_own_table_knows_them_too(case: str) -> None:
    """The table of llama.cpp's converter, as its authors publish it."""
    gguf = pytest.importorskip("gguf", reason="llama.cpp's own table of names is in gguf")
    config = zoo.whet_config(case)
    family = to_hf(config)["model_type"]
    architectures = {"mistral": "llama", "gemma3_text": "gemma3"}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architectures.get(family, family)], config.n_layers)
    for place in file_places(config).values():
        assert table.get_name(place.name, try_suffixes=(".weight", ".bias")), place.name


def test_what_llama_cpp_does_not_know_is_told(base: Path) -> None:
    assert not is_gguf_name("model.layers.0.self_attn.qk_proj.weight")
    assert not is_gguf_name("transformer.h.0.attn.bias")
    values = json.loads((base / "config.json").read_text())
    wrong = from_hf({**values, "architectures": ["LlamaForTokens"]})
    with pytest.raises(UserError, match="converter expects LlamaForCausalLM"):
        check_gguf(wrong, base)
    with pytest.raises(UserError, match=r"needs tokenizer.model or tokenizer.json"):
        check_gguf(from_hf(values), base / "empty")


def test_mistakes_are_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*flags: str) -> str:
        assert main(["export", *flags, "--out", str(tmp_path / "x")]) == 2
        assert not (tmp_path / "x").exists()
        return capsys.readouterr().err

    assert "no adapter to merge" in told(str(base), "--merge")
    assert "no such path" in told(str(tmp_path / "none"))
    assert main(["export", str(base), "--to", "pt", "--out", str(tmp_path / "m.pt")]) == 0
    assert "a .pt has no tokenizer" in told(str(tmp_path / "m.pt"))
