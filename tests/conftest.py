"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

from tests import processes

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    """Before `whet prepare` starts one of its own, which would not have imported torch."""
    processes.start_server()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, tokenizers, templates and weights that tests may read."""
    folder = Path(os.environ.get("WHET_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set WHET_SHARED_DATA to the folder")
    return folder
