"""Whether a file can be written is told before the work, and it is written whole or not at all."""

import os

import pytest

from whet.errors import UserError
from whet.files import nearest, replaced, unwritable, unwritable_folder

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
