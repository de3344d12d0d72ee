"""A healthy subject: a tiny model, a packed file and conversations, opened as the command does."""

import json
from pathlib import Path

import pytest

from tests import tiny
from whet.doctor.command import Config, admit
from whet.doctor.subject import Subject


@pytest.fixture(scope="session")
def ward(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    tiny.model_directory(folder / "base")
    tiny.packed_file(folder / "train.h5", n_rows=12, weighted=True)
    talks = [
        {
            "messages": [
                {"role": "system", "content": "one"},
                {"role": "user", "content": f"what is the sum of {i} and three"},
                {"role": "assistant", "content": f"the sum is {i + 3}"},
                {"role": "user", "content": "plus ten"},
                {"role": "assistant", "content": f"{i + 13}"},
            ]
        }
        for i in range(20)
    ]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)) + "\n")
    return folder


@pytest.fixture
def config(ward) -> Config:
    return Config(
        model=str(ward / "base"),
        data=ward / "train.h5",
        conversations=ward / "talks.jsonl",
        precision="float32",
        device="cpu",
    )


@pytest.fixture
def subject(config, tmp_path) -> Subject:
    return admit(config, tmp_path)
