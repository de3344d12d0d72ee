"""Every file in configs/ is one that its command accepts, and its first line says how to use it."""

import re
from pathlib import Path

import pytest

from whet.config import parse
from whet.stages import pretrain, sft
from whet.train.distributed import Ranks
from whet.train.session import check_settings, resolve

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_accepted(path, tmp_path, monkeypatch):
    first = path.read_text().splitlines()[0]
    assert re.search(rf"--config configs/{path.name}\b", first), "the first line is the command"
    stage = pretrain if "whet pretrain" in first else sft
    config = parse(stage.Config, ["--config", str(path)], "test")
    check_settings(resolve(config, Ranks()))
    if isinstance(config, pretrain.Config):
        monkeypatch.chdir(tmp_path)
        (tmp_path / (config.tokenizer or "")).mkdir(parents=True)
        for name in config.data:
            (tmp_path / name).touch()
        pretrain.check(config)


def test_there_are_some():
    assert len(CONFIGS) >= 5
