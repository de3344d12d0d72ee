"""The command table, and what a user sees when something is wrong."""

import ast
import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import whet
from whet.cli import COMMANDS, config_class, main
from whet.command_line import help_texts

PACKAGE = Path(whet.__file__).parent


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)


def test_no_command_is_an_error_that_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: whet COMMAND" in capsys.readouterr().out


def test_a_wrong_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sfft"]) == 2
    assert capsys.readouterr().err == ("whet: error: unknown command 'sfft'; did you mean 'sft'?\n")


@pytest.mark.parametrize("words", [["chat"], ["inspect"], ["prepare", "--out", "x", "--data"]])
def test_a_text_in_the_place_of_a_path_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "Tell me a story. " * 20]) == 2
    said = capsys.readouterr().err
    assert said.startswith("whet: error: Tell me a story. Tell")
    assert said.endswith("the name is too long to be that of a file\n")


def test_ctrl_c_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("whet.model.export.main", interrupted)
    assert main(["export", "runs/sft", "--to", "hf", "--out", "out"]) == 130
    assert capsys.readouterr().err == "whet: stopped\n"


def test_under_torchrun_the_first_process_is_heard_before_another_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends all processes when the first of them ends."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["sft", "--lr", "x"]) == 2
        assert "--lr" in capsys.readouterr().err
    assert waits == [15]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_flags_with_help(command: str) -> None:
    """One process for all would hide a missing import of a module that another one made."""
    for part in config_class(command).__mro__[:-1]:
        for name, text in help_texts(part).items():
            assert text, f"{part}: {name} has no help text"


@functools.cache
def attributes_read() -> set[str]:
    return {
        node.attr
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_is_read(command: str) -> None:
    """A key that nothing reads is a defect: look for `.name` outside the class that defines it."""
    read = attributes_read()
    fields = {field.name for field in dataclasses.fields(config_class(command))}
    assert not fields - read, f"whet {command}: nothing reads {sorted(fields - read)}"


def test_help_of_a_command_exits_0() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "whet", "prepare", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--context_length" in done.stdout
