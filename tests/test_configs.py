"""Every file in configs/ is one that its command accepts, and its first line says how to use it."""

import re
from pathlib import Path

import pytest

from whet.cli import config_class
from whet.command_line import parse
from whet.config import read_toml
from whet.flags import pretrain
from whet.stages.pretrain import check

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_accepted(path, tmp_path, monkeypatch):
    first = path.read_text().splitlines()[0]
    assert re.search(rf"--config configs/{path.name}\b", first), "the first line is the command"
    flags = config_class("pretrain" if "whet pretrain" in first else "sft")
    monkeypatch.chdir(tmp_path)
    for name, value in read_toml(flags, path).items():
        for place in value if isinstance(value, tuple) else [value]:
            if name in ("tokenizer", "model"):
                Path(place).mkdir(parents=True)
            elif name in ("data", "dev"):
                Path(place).parent.mkdir(parents=True, exist_ok=True)
                Path(place).touch()
    config = parse(flags, ["--config", str(path)], "test")
    if isinstance(config, pretrain.Config):
        check(config)


def test_there_are_some():
    assert len(CONFIGS) >= 5
