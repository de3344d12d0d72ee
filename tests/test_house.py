"""`python -m scripts.house` counts what it says."""

from scripts.house import PACKAGE, import_circles, one_step, source_lines


def test_one_step_calls_the_loop_and_no_other_command() -> None:
    called, passes = one_step()
    files = {code.co_filename.removeprefix(f"{PACKAGE}/") for code in called}
    assert {"train/loop.py", "model/decoder.py", "stages/sft.py"} <= files
    assert not [file for file in files if file.startswith(("doctor/", "demo/", "rl/"))]
    assert "chat/dialect.py" not in files, "stop ids are read from the packed file"
    assert len(files) <= 43, "a plain step walks through more files than it did"
    assert 0 < source_lines(called) <= 4_900
    assert passes == 1


def test_circles_are_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("scripts.house.PACKAGE", tmp_path)
    texts = {"a": "import whet.b", "b": "def f():\n    from whet import a", "c": "import whet.a"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert import_circles(sorted(tmp_path.glob("*.py"))) == [["a", "b"]]
