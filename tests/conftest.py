"""Fixtures that every test may use, and the processor that the tests pretend to run on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes
from whet.model.precision import BF16_SWITCH, multiplies_bf16

REPOSITORY = Path(__file__).resolve().parent.parent
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bf16",
        choices=["yes", "no", "auto", "other"],
        default="auto",
        help="whether the CPU is taken to multiply bf16; `other` than this one really does",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before any process of the tests starts, so that all of them inherit the answer."""
    answer = config.getoption("--bf16")
    if answer == "other":
        answer = "no" if multiplies_bf16(torch.device("cpu")) else "yes"
    if answer != "auto":
        os.environ[BF16_SWITCH] = answer


def pytest_report_header() -> str:
    answer = "multiplies bf16" if multiplies_bf16(torch.device("cpu")) else "has no bf16 products"
    return f"the CPU {answer}" + (" (by --bf16)" if BF16_SWITCH in os.environ else "")


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


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, started once: a process bears one Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()
