"""`import whet`: the Python API, its page and its notebook."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import whet
from tests import tiny
from tests.conftest import REPOSITORY

SFT = {"batch_size": 4, "max_steps": 2, "eval_every": 0, "save_every": 0, "samples": 0}


def python(code: str, folder: Path) -> str:
    """What `code`, as a script in `folder`, prints."""
    (folder / "script.py").write_text(code, encoding="utf-8")
    words = [sys.executable, "script.py"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def sft(tmp_path: Path) -> dict:
    """Settings of a short run of `whet sft`, paths as paths."""
    base = tiny.model_directory(tmp_path / "base")
    data = tiny.packed_file(tmp_path / "rows.h5")
    return {**SFT, "model": base, "data": data, "out": tmp_path / "run", "quiet": True}


def test_the_import_takes_no_time_and_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "begin = time.process_time()\n"
        "import whet\n"
        "whet.__version__, whet.train, dir(whet), whet.UserError\n"
        "print(time.process_time() - begin, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    seconds, *loaded = python(code, tmp_path).split()
    assert float(seconds) < 0.1
    assert loaded == ["False", "False"]


def test_every_name_is_there() -> None:
    assert set(whet.__all__) <= set(dir(whet))
    for name in whet.__all__:
        assert getattr(whet, name) is not None
    page = (REPOSITORY / "docs/api.md").read_text(encoding="utf-8")
    assert set(whet.__all__) == set(re.findall(r"^\| `(\w+)", page, flags=re.M))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        whet.trian  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(whet.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: getattr(importlib.import_module(node.module), alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert {*seen, "__version__"} == set(whet.__all__)
    called = {"train", "generate"}  # functions with the names of packages: see there
    assert all(getattr(whet, name) is seen[name] for name in set(seen) - called)


def test_train_gives_the_run_folder_and_what_the_command_gives(sft: dict, tmp_path: Path) -> None:
    from whet.cli import main

    assert whet.train("sft", **sft) == tmp_path / "run"
    flags = [word for name, value in SFT.items() for word in (f"--{name}", str(value))]
    flags += ["--model", str(sft["model"]), "--data", str(sft["data"]), "--quiet"]
    assert main(["sft", *flags, "--out", str(tmp_path / "other")]) == 0
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("run", "other"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_toml_file_comes_first_and_keywords_win(sft: dict, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("lr = 0.5\nmax_steps = 1\n")
    run = whet.train("sft", config=file, **sft)
    saved = (run / "config.toml").read_text()
    assert "lr = 0.5\n" in saved
    assert "max_steps = 2\n" in saved


def test_wrong_settings_are_reported_together_and_nothing_is_written(sft: dict) -> None:
    with pytest.raises(whet.UserError) as error:
        whet.train("sft", **sft | {"learning_rate": 1.0, "epochs": "many", "batch_size": 2.5})
    assert sorted(line.split(";")[0] for line in str(error.value).splitlines()) == [
        "sft: key 'batch_size': expected a whole number, got 2.5",
        "sft: key 'epochs': expected a number, got 'many'",
        "sft: unknown key 'learning_rate'",
    ]
    with pytest.raises(whet.UserError, match=r"--lr -1[.]0: expected a number above 0"):
        whet.train("sft", **sft | {"lr": -1})
    with pytest.raises(whet.UserError, match="--data: is missing"):
        whet.train("sft", model=sft["model"], out=sft["out"])
    with pytest.raises(whet.UserError, match="unknown stage 'stf'; expected one of pretrain, sft"):
        whet.train("stf", **sft)  # type: ignore[arg-type]
    assert not sft["out"].exists()


def test_prepare_takes_objects_and_lists(tmp_path: Path) -> None:
    base = tiny.model_directory(tmp_path / "base")
    row = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "2"}]}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    same = {"tokenizer": base, "context_length": 32}
    data = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    packed = whet.prepare(data=data, out=tmp_path / "rows.h5", **same)
    assert len(whet.PackedStore(packed)) == 1
    with pytest.raises(whet.UserError, match="reads no variable mood"):
        whet.prepare(data=data, template_kwargs={"mood": 1}, **same)
    with pytest.raises(whet.UserError, match="--tokenizer"):
        whet.prepare(data=tmp_path / "a.jsonl", out=tmp_path / "none.h5")
    assert not (tmp_path / "none.h5").exists()


def test_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    tiny.model_directory(tmp_path / "runs/base")
    row = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "2"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n")
    page = (REPOSITORY / "docs/api.md").read_text(encoding="utf-8")
    printed = python("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S)), tmp_path)
    assert re.search(r"^0 .*\n1 ' ?f", printed, flags=re.M), "the first trained token is of `five`"
    assert "loss " in printed
    assert (tmp_path / "runs/sft/model.safetensors").is_file()


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """Its cells hold plain Python, so that they run in their order without a kernel."""
    file = REPOSITORY / "examples/finetune.ipynb"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in cells)
    printed = python("\n".join(code), tmp_path)
    start, end = re.findall(r"loss: ([\d.]+) -> ([\d.]+)", printed)[0]
    assert float(end) < float(start) / 3
    assert printed.count("sft: ") == 3
    assert "<answer>" in printed.split("sft: ")[1]
