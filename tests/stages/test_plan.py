"""whet plan and --auto: what is measured, what is proposed, and that the run keeps to it."""

import json
import tomllib

import pytest

from tests import tiny
from tests.numerics.test_layouts import command
from whet.cli import main
from whet.model.attention import seen_pairs


@pytest.fixture
def world(tmp_path):
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8)
    tiny.packed_file(tmp_path / "dev.h5", n_rows=3, seed=1)
    return tmp_path


@pytest.mark.parametrize("window", [None, 1, 3, 7])
def test_pairs(window):
    size = 7
    expected = sum(0 <= a - b < (window or size) for a in range(size) for b in range(size))
    assert seen_pairs(size, window) == expected


@pytest.mark.slow
def test_the_run_measures_what_the_plan_said(world, capsys):
    """Almost all of so small a run is the process itself; docs/performance.md has larger ones."""
    words = command(world, world / "out", auto=True, samples=0)
    flags = [word for word in words[1:] if word != "--auto"]
    assert main(["plan", "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    proposed = plan["proposed"]
    assert sum(proposed["memory_parts_gb"].values()) == pytest.approx(
        proposed["memory_gb"], rel=0.01
    )
    assert main(words) == 0
    saved = tomllib.loads((world / "out" / "config.toml").read_text())
    assert saved["micro_batch_size"] == proposed["micro_batch_size"]
    assert saved["recompute"] == proposed["recompute"] == "none"
    timing = (world / "out" / "timing.jsonl").read_text().splitlines()
    assert proposed["memory_gb"] == pytest.approx(json.loads(timing[-1])["memory_gb"], rel=0.1)


@pytest.mark.slow
def test_nothing_fits(world, capsys):
    assert main(command(world, world / "out", auto=True, memory_gb=0.001)) == 2
    assert "--auto: no setting fits into 0.00 GB" in capsys.readouterr().err
    assert not (world / "out" / "config.toml").exists()
