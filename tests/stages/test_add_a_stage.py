"""The example of docs/add_a_stage.md runs, and means what it says."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests import tiny
from whet.stages import sft

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_a_stage.md"


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("precision", "rounding"), [("float32", 1e-5), ("bf16", 5e-3)])
def test_the_example_runs(tmp_path: Path, precision: str, rounding: float) -> None:
    block = PAGE.read_text().split("## Example", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    (tmp_path / "near.py").write_text(block)
    spec = importlib.util.spec_from_file_location("near", tmp_path / "near.py")
    near = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(near)
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8, weighted=True)
    found = {}
    for name, module, more in (
        ("sft", sft, {}),
        ("near", near, {"beta": 0.0}),
        ("kept", near, {"beta": 50.0}),
    ):
        flags = {"model": str(tmp_path / "base"), "data": tmp_path / "train.h5", "quiet": True}
        flags |= {"out": tmp_path / name, "max_steps": 4, "batch_size": 4, "epochs": 4, "lr": 1e-2}
        flags |= {"eval_every": 0, "save_every": 0, "warmup": 0, "precision": precision}
        assert module.main(module.Config(**flags, **more)) == 0
        found[name] = [line["train_loss"] for line in metrics(tmp_path / name)]
    assert found["near"] == pytest.approx(found["sft"], rel=rounding), "without a penalty it is SFT"
    assert found["kept"][0] == pytest.approx(found["sft"][0], rel=rounding), "it begins at the base"
    assert found["kept"][1] != pytest.approx(found["sft"][1], rel=rounding)
