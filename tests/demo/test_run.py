"""The demo from end to end: a few steps of it here, the whole in `make soak`."""

import json
from pathlib import Path

import pytest

from whet.demo.run import Config as DemoConfig
from whet.demo.run import main, replacing, run
from whet.demo.world import Size
from whet.errors import UserError

KEYS = {"base_accuracy", "base_prose_accuracy", "sft_accuracy", "n"}
KEYS |= {"base_dev_loss", "sft_dev_loss", "seconds"}


def test_a_minimal_demo_runs_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.demo.world.LARGEST", 12)
    monkeypatch.setattr("whet.demo.world.SUMS", [(2, 3), (4, 5)])
    small = Size(texts=300, pairs=100, test=4, width=16, layers=1)
    summary = run(tmp_path / "demo", 0, small)
    assert set(summary) >= KEYS
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    assert summary["n"] == 4
    printed = capsys.readouterr().out
    assert "whet chat" in printed.replace("\\\n", "")
    assert "4 new problems, asked as questions: right" in printed


def test_an_earlier_demo_comes_back_if_a_new_one_fails(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    (out / "world").mkdir(parents=True)
    (out / "world" / "prose.jsonl").write_text("earlier")

    def fails() -> None:
        with replacing(out):
            out.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert (out / "world" / "prose.jsonl").read_text() == "earlier"


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else than a demo"), replacing(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_keeps_its_promises(tmp_path: Path, seed: int) -> None:
    main(DemoConfig(out=tmp_path / "demo", seed=seed))
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["n"] == 200
    assert summary["base_accuracy"] < 0.05
    assert summary["base_prose_accuracy"] > 0.9
    assert summary["sft_accuracy"] >= 0.9
