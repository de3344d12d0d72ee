"""Every file in configs/ is one that its command accepts, and its first line says how to use it."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from whet.cli import config_class, main
from whet.command_line import parse
from whet.config import SHIPPED, read_toml
from whet.flags import pretrain
from whet.model.decoder import Transformer
from whet.model.hf.config import from_hf
from whet.stages.pretrain import check

CONFIGS = sorted(SHIPPED.glob("*.toml"))
RECIPES = [path for path in CONFIGS if path.stem.endswith("gb")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_accepted(path, tmp_path, monkeypatch):
    first = path.read_text().splitlines()[0]
    assert re.search(rf"--config {path.stem}\b", first), "the first line is the command"
    flags = config_class("pretrain" if "whet pretrain" in first else "sft")
    monkeypatch.chdir(tmp_path)
    for name, value in read_toml(flags, path).items():
        for place in value if isinstance(value, tuple) else [value]:
            if name in ("tokenizer", "model"):
                Path(place).mkdir(parents=True)
            elif name in ("data", "dev"):
                Path(place).parent.mkdir(parents=True, exist_ok=True)
                Path(place).touch()
    given = shlex.split(first.partition("--config ")[2])[1:]
    for place in (word for word in given if word.endswith(".h5")):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).touch()
    config = parse(flags, ["--config", path.stem, *given], "test")
    if isinstance(config, pretrain.Config):
        check(config)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_is_held_all_the_time_leaves_room_on_the_gpu(path):
    """Weights, gradients and moments, counted; `whet plan` measures the rest."""
    values = read_toml(config_class("sft"), path)
    ranks, gb = map(int, re.fullmatch(r".*_(\d)x(\d+)gb", path.stem).groups())
    billions = float(path.read_text().splitlines()[1].split()[1])
    if "lora_rank" in values:
        held = billions * (0.6 if values.get("lora_4bit") else 2)
    else:
        held = billions * (10 if values.get("optimizer") == "adamw8bit" else 16)
    assert held < 0.75 * gb * (ranks if values.get("shard") else 1)


SHAPES = {
    # model: (family, width, layers, heads, key-value heads, head size, MLP, vocabulary, tied)
    "HuggingFaceTB/SmolLM2-135M": ("llama", 576, 30, 9, 3, 64, 1536, 49152, True),
    "HuggingFaceTB/SmolLM2-360M": ("llama", 960, 32, 15, 5, 64, 2560, 49152, True),
    "HuggingFaceTB/SmolLM2-1.7B": ("llama", 2048, 24, 32, 32, 64, 8192, 49152, True),
    "HuggingFaceTB/SmolLM3-3B-Base": ("smollm3", 2048, 36, 16, 4, 128, 11008, 128256, True),
    "Qwen/Qwen3-0.6B-Base": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True),
    "Qwen/Qwen3-1.7B-Base": ("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True),
    "Qwen/Qwen3-4B-Base": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True),
    "Qwen/Qwen3-8B-Base": ("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False),
    "meta-llama/Llama-3.2-1B": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "meta-llama/Llama-3.2-3B": ("llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
    "google/gemma-3-1b-pt": ("gemma3_text", 1152, 26, 4, 1, 256, 6912, 262144, True),
    "google/gemma-3-4b-pt": ("gemma3_text", 2560, 34, 8, 4, 256, 10240, 262208, True),
}
TOWER = {"google/gemma-3-4b-pt": 417e6}
"""Parameters that look at images, beside the language model."""


def parameters(model: str, layers: int) -> int:
    """Counted in Whet's own decoder, without memory for them."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")
    config = dict(zip((*names, "tie_word_embeddings"), SHAPES[model], strict=True))
    config |= {"num_hidden_layers": layers, "max_position_embeddings": 8}
    if config["model_type"] == "llama":
        config.pop("head_dim")
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(from_hf(config)).parameters())


@pytest.mark.parametrize("model", SHAPES)
def test_the_parameters_that_a_recipe_states_are_those_of_the_model(model):
    one, two = (parameters(model, layers) for layers in (1, 2))
    count = one + (SHAPES[model][2] - 1) * (two - one) + TOWER.get(model, 0)
    texts = [path.read_text() for path in RECIPES]
    stated = [float(t.splitlines()[1].split()[1]) for t in texts if f'model = "{model}"' in t]
    assert stated
    assert stated == pytest.approx([count / 1e9] * len(stated), rel=0.01)


def test_each_model_has_its_recipes():
    """All weights and an adapter on one GPU; from 3 B on, all weights on eight GPUs, too."""
    for model in SHAPES:
        found = [path for path in RECIPES if f'model = "{model}"' in path.read_text()]
        billions = float(found[0].read_text().splitlines()[1].split()[1])
        stems = " ".join(path.stem for path in found)
        assert "full_" in stems
        assert "lora_" in stems or billions < 0.5, model
        assert "full_8x" in stems or billions < 3, model


def test_they_are_listed_and_printed(capsys):
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [path.stem for path in CONFIGS]
    assert main(["configs", "lora"]) == 0
    assert capsys.readouterr().out == (SHIPPED / "lora.toml").read_text()
    assert main(["configs", "nothing"]) == 2
    assert "there are gemma3_1b" in capsys.readouterr().err
