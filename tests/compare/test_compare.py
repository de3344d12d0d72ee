"""whet compare: the numbers, the differences between neighbours, and the page."""

import json

import pytest

from tests import tiny
from whet.cli import main
from whet.compare.measure import Measured
from whet.compare.table import as_text, rows_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    tiny.model_directory(folder / "a" / "sft", seed=1, max_positions=64)
    tiny.model_directory(folder / "b" / "sft", seed=2, max_positions=64)
    lines = [{"question": f"{word}?", "answer": "#### 3"} for word in tiny.WORDS[:5]]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiny.packed_file(folder / "dev.h5", n_rows=3)
    return folder


def test_the_table(world, tmp_path, capsys):
    one, other = world / "a" / "sft", world / "b" / "sft"
    words = ["compare", one, one, other, "--gsm8k", world / "test.jsonl", "--samples", 3]
    words += ["--dev", world / "dev.h5", "--reward", "length=2", "correct", "--max_new_tokens", 6]
    words += ["--json", tmp_path / "out.json", "--html", tmp_path / "page.html"]
    assert main(list(map(str, words))) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    first, same, third = content["models"]
    assert (same["gained"], same["lost"], same["p"]) == (0, 0, 1.0)
    assert first["dev_loss"] == same["dev_loss"] != third["dev_loss"]
    assert first["kl_to_first"] == 0.0
    assert same["kl_to_first"] == pytest.approx(0.0, abs=1e-4), "the same model"
    assert third["kl_to_first"] > 0.01
    assert {"accuracy_low", "pass@1", "pass@2", "pass@3", "reward/length"} <= third.keys()
    assert len(content["replies"][0]["replies"]) == 5
    assert third["model"] == str(other), "two folders of one name are told apart"
    text = capsys.readouterr().out
    assert "| pass@3 |" in text
    page = (tmp_path / "page.html").read_text()
    assert "default-src 'none'" in page
    assert "{{" not in page


def test_differences_are_between_neighbours():
    pairs = {"pair_accuracy": 0.9, "pair_accuracy_low": 0.8, "pair_accuracy_high": 1}
    measured = [
        Measured("base", {"accuracy": 0.5}, [True, False, True, False]),
        Measured("reward", pairs),
        Measured("sft", {"accuracy": 0.75}, [False, True, True, True]),
    ]
    rows = rows_of(measured)
    assert "gained" not in rows[1]
    assert (rows[2]["gained"], rows[2]["lost"], rows[2]["p"]) == (2, 1, 1.0)
    assert "90.0% (80.0% to 100.0%)" in as_text(rows)


def test_what_is_missing_is_told_at_once(world, capsys):
    assert main(["compare", str(world / "none"), "--samples", "2"]) == 2
    said = capsys.readouterr().err
    assert "none" in said
    assert "--samples: needs the problems" in said
    assert "nothing to compare" in said
