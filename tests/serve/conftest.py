"""A server of two tiny models, in a process of its own as a user starts it."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.bench_serve import start
from tests.tiny import model_directory

pytest.importorskip("starlette", reason="whet[serve] is not installed")


class Running(NamedTuple):
    url: str
    folder: Path
    """Of the models."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(("one", "two")):
        model_directory(folder / name, seed=seed, width=32, max_positions=256, init_std=0.4)
    return folder


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[Running]:
    flags = ["--batch_size", "8", "--queue", "100", "--context_length", "200"]
    process, url = start(str(models / "one"), str(models / "two"), *flags)
    yield Running(url, models)
    process.terminate()
    process.wait(20)
