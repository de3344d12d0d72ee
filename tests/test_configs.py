"""Every file in configs/ is one that its command accepts, and its first line says how to use it."""

import re
import shlex
from pathlib import Path

import pytest

from whet.cli import config_class, main
from whet.command_line import parse
from whet.config import SHIPPED, read_toml
from whet.flags import pretrain
from whet.stages.pretrain import check

CONFIGS = sorted(SHIPPED.glob("*.toml"))


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


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem.endswith("gb")], ids=lambda path: path.stem
)
def test_what_is_held_all_the_time_leaves_room_on_the_gpu(path):
    """Weights, gradients and moments, counted; `whet plan` measures the rest."""
    values = read_toml(config_class("sft"), path)
    ranks, gb = map(int, re.fullmatch(r".*_(\d)x(\d+)gb", path.stem).groups())
    billions = float(path.read_text().splitlines()[1].split()[1])
    if "lora_rank" in values:
        held = billions * (0.6 if values.get("lora_4bit") else 2)
    else:
        held = billions * (10 if values.get("optimizer") == "adamw8bit" else 16)
    assert held < (0.75 * gb * ranks if values.get("shard") or ranks == 1 else 0)


def test_they_are_listed_and_printed(capsys):
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [path.stem for path in CONFIGS]
    assert main(["configs", "lora"]) == 0
    assert capsys.readouterr().out == (SHIPPED / "lora.toml").read_text()
    assert main(["configs", "nothing"]) == 2
    assert "there are gemma3_1b" in capsys.readouterr().err
