"""Whether a file can be written is told before the work, and it is written whole or not at all."""

import os
import subprocess
from contextlib import suppress

import pytest

from whet.errors import UserError
from whet.files import (
    nearest,
    read_json,
    remove_leftovers,
    replaced,
    replaced_folder,
    unwritable,
    unwritable_folder,
    write_json,
)

READ = "the command reads or writes this already; give another path"
TEXT = ("text", lambda path: path.suffix == ".txt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("read.txt", "mine.md"):
        (tmp_path / name).write_text("words")
    (tmp_path / "empty").touch()
    os.link("read.txt", "hard.txt")
    os.symlink("read.txt", "soft.txt")
    os.mkfifo("pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("new/er/file.txt", None),
        ("empty", None),
        ("read.txt", READ),
        ("folder/../read.txt", READ),
        ("hard.txt", READ),
        ("soft.txt", READ),
        ("too.txt", READ),
        ("folder", "is a directory; expected a file to write"),
        ("pipe", "is a device or pipe; expected a file to write"),
        ("mine.md", "exists and is no text; give another name, or remove it"),
        ("mine.md/file.txt", "cannot be written: Not a directory"),
        ("/proc/file.txt", "cannot be written: No such file or directory"),
    ],
)
def test_what_speaks_against_a_file(folder, path, told):
    found = unwritable("--out", path, ["read.txt", None, folder / "too.txt", "org/name"], TEXT)
    assert found == ([f"--out {path}: {told}"] if told else [])


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("new/er", None),
        ("folder", None),
        ("read.txt", "is a file; expected a folder to write"),
        ("there", READ),
        ("/proc/there", "cannot be written: No such file or directory"),
    ],
)
def test_what_speaks_against_a_folder(folder, path, told):
    found = unwritable_folder("--out", path, ["there"])
    assert found == ([f"--out {path}: {told}"] if told else [])
    assert nearest("new/er") == folder


def test_a_file_is_replaced_or_nothing_is_left(folder):
    with replaced("new/file.txt") as aside:
        aside.write_text("words")
    assert (folder / "new/file.txt").read_text() == "words"
    for error, told in [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), UserError),
    ]:
        with pytest.raises(told):
            write("new/file.txt", error)
        assert (folder / "new/file.txt").read_text() == "words"
        assert os.listdir("new") == ["file.txt"]
    with pytest.raises(UserError, match="folder: cannot be written: Is a directory"):
        write("folder", None)


def write(path, error):
    with replaced(path) as aside:
        aside.write_text("other")
        if error:
            raise error


def test_a_folder_is_replaced_or_stays(folder):
    with replaced_folder(folder / "new", 10) as aside:
        write_json(aside / "a.json", {"a": "ä"})
    assert read_json(folder / "new/a.json") == {"a": "ä"}
    with suppress(KeyError), replaced_folder(folder / "new", 10) as aside:
        write_json(aside / "a.json", {})
        raise KeyError
    assert read_json(folder / "new/a.json") == {"a": "ä"}
    assert os.listdir(folder / "new") == ["a.json"]
    with pytest.raises(UserError, match=r"read\.txt: expected a folder to write into"):  # noqa: SIM117
        with replaced_folder(folder / "read.txt", 10):
            pass


def test_what_a_killed_process_left_is_removed(folder):
    dead = subprocess.Popen(["true"])
    dead.wait()
    leftovers = [f".best.{dead.pid}.saving", f".x.json.{dead.pid}.saving"]
    kept = [f".y.{os.getppid()}.saving", ".notes.saving", "z.1.saving"]
    os.makedirs(folder / leftovers[0] / "deep")
    for name in [leftovers[1], *kept]:
        (folder / name).touch()
    before = set(os.listdir(folder))
    with replaced(folder / "empty") as aside:
        aside.touch()
    assert set(os.listdir(folder)) == before - set(leftovers)
    remove_leftovers(folder, locked=True)
    assert set(os.listdir(folder)) == before - {*leftovers, kept[0]}
