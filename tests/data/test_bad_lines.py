import dataclasses
import json

import pytest

from tests.data.broken_lines import GOOD, broken_lines
from tests.tiny import tokenizer
from whet.cli import main
from whet.data.prepare import Config, prepare
from whet.data.store import PackedStore
from whet.errors import UserError


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A file of broken lines with one good line at its end, and the number of broken ones."""
    folder = tmp_path_factory.mktemp("broken")
    tokenizer().save(folder / "tokenizer")
    lines = broken_lines()
    path = folder / "broken.jsonl"
    path.write_bytes(b"\n".join([*lines, json.dumps(GOOD).encode()]))
    return path, len(lines)


def config(path, **options):
    folder = path.parent
    options = {"tokenizer": str(folder / "tokenizer"), "out": str(folder / "out.h5"), **options}
    return Config(data=(str(path),), context_length=64, **options)


def test_200_kinds_of_broken_lines_are_refused_one_by_one(broken):
    path, n = broken
    assert n >= 200
    (account,) = prepare(config(path, refused="drop"), quiet=True)
    assert account.lines == n + 1
    store = PackedStore(path.parent / "out.h5")
    refusals = [json.loads(text) for text in store.texts("refusals")]
    told = {refusal["line"]: refusal["reason"] for refusal in refusals}
    kept = [line for line in range(1, n + 2) if line not in told]
    assert kept == [n + 1], [path.read_bytes().split(b"\n")[line - 1] for line in kept]
    for line, reason in told.items():
        assert reason.startswith(f"{path}:{line}: ")
        assert "\n" not in reason
        assert len(reason) < 400
    assert len({reason.split(": ", 1)[1] for reason in told.values()}) > 100  # not one for all
    assert account.examples == 1


def test_by_default_the_first_errors_are_shown_and_nothing_is_written(broken):
    path, n = broken
    (path.parent / "out.h5").unlink(missing_ok=True)
    with pytest.raises(UserError) as error:
        prepare(config(path), quiet=True)
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[0].startswith(f"{path}:1: ")
    assert f"first 20; of {n + 1:,} lines" in lines[-1]
    assert "--refused drop" in lines[-1]
    assert "nothing was written" in lines[-1]
    assert sorted(p.name for p in path.parent.iterdir()) == ["broken.jsonl", "tokenizer"]


def test_the_command_exits_with_2_and_no_traceback(broken, capsys):
    path, _ = broken
    flags = ["--data", str(path), "--tokenizer", str(path.parent / "tokenizer")]
    assert main(["prepare", *flags, "--out", str(path.parent / "out.h5")]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert all(line.startswith("whet: error: ") for line in error.splitlines())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer": ""}, "--tokenizer: name the directory"),
        ({"tokenizer": "absent"}, "absent: there is no such path"),
        ({"context_length": 1}, "--context_length 1: expected 2 or more"),
        ({"dev_fraction": 0.1}, "--dev_out and --dev_fraction belong together"),
        ({"dev_fraction": 1.5, "dev_out": "d.h5"}, "--dev_fraction 1.5: expected a number"),
        ({"format": "csv"}, "--format csv: formats are preferences"),
        ({"template_kwargs": "{"}, "--template_kwargs: not JSON"),
        ({"template_kwargs": "[1]"}, "--template_kwargs: expected a JSON object"),
        ({"date": "yesterday"}, "--date yesterday: expected a date"),
        ({"chat_template": "absent.jinja"}, "--chat_template absent.jinja: no such file"),
        ({"workers": -1}, "--workers -1: expected 0 or more"),
        ({"data": ()}, "--data: name at least one file"),
        ({"data": ("absent.jsonl",)}, "absent.jsonl: no such file"),
        ({"decontaminate": ("absent.jsonl",)}, "--decontaminate absent.jsonl: no such file"),
        ({"data": ("a.jsonl:1e9",)}, "above 0 and below a million, got 1e9"),
        ({"out": "broken.jsonl"}, "--out broken.jsonl: the command reads or writes this already"),
        ({"out": "other.txt"}, "--out other.txt: exists and is no HDF5 file"),
        ({"out": "/proc/x.h5"}, "--out /proc/x.h5: cannot be written"),
        ({"dev_out": "out.h5", "dev_fraction": 0.1}, "--dev_out out.h5: the command reads or"),
    ],
)
def test_wrong_flags(broken, monkeypatch, change, told):
    path, _ = broken
    monkeypatch.chdir(path.parent)
    (path.parent / "other.txt").write_text("dear to somebody")
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    wrong = dataclasses.replace(config(path, refused="drop"), **change)
    with pytest.raises(UserError) as error:
        prepare(wrong, quiet=True)
    assert told in str(error.value)
    after = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    assert after == before


def test_all_wrong_flags_are_told_at_once(broken, tmp_path, monkeypatch):
    path, _ = broken
    monkeypatch.chdir(tmp_path)
    wrong = Config(
        data=("a.jsonl", str(path), "b.jsonl:2"), tokenizer="none", date="xx",
        template_kwargs="{", dev_fraction=2, decontaminate=("c.json",), chat_template="d",
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        prepare(wrong, quiet=True)
    lines = str(error.value).splitlines()
    told = ("--data a.jsonl", "--data b.jsonl", "--decontaminate c.json", "--dev_fraction 2")
    told += ("--template_kwargs", "--date xx", "--chat_template d", "none: there is no such path")
    assert len(lines) == len(told)
    assert all(any(line.startswith(start) for line in lines) for start in told)
    assert list(tmp_path.iterdir()) == []
