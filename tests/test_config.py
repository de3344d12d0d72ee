"""Defaults < TOML < flags; every problem told at once, in words."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.cli import COMMANDS as CLI
from whet.cli import config_class
from whet.command_line import parse
from whet.config import POSITIONAL, InputFile, OutputFile, With, from_1, read_toml, save
from whet.elsewhere import ELSEWHERE
from whet.errors import UserError


@dataclass(frozen=True)
class Config:
    run: Annotated[str, POSITIONAL]
    """Run folder."""
    data: tuple[str, ...] = ()
    """Files."""
    lr: float = 1e-5
    """Learning rate."""
    epochs: int | None = None
    """Epochs."""
    compile: bool = False
    """Compile."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Precision."""


@dataclass(frozen=True)
class Places:
    out: Path
    """Folder."""
    samples: Path | None = None
    """File."""


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return str(path)


def test_defaults() -> None:
    assert parse(Config, ["r"], "x") == Config(run="r")


def test_toml_wins_over_defaults_and_flags_over_toml(tmp_path: Path) -> None:
    path = toml(tmp_path, 'run = "a"\nlr = 1\nepochs = 2\ndata = ["f", "g"]\ncompile = true\n')
    assert parse(Config, ["--config", path], "x") == Config(
        run="a", lr=1.0, epochs=2, data=("f", "g"), compile=True
    )
    given = parse(Config, [f"--config={path}", "b", "--lr", "0.5", "--no_compile"], "x")
    assert given == Config(run="b", lr=0.5, epochs=2, data=("f", "g"), compile=False)


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    wrong = 'lrr = 1\nepochs = "x"\nprecision = "fp8"\ncompile = 1\ndata = [1]\n'
    path = toml(tmp_path, f"{wrong}[section]\nlr = 1\n")
    with pytest.raises(UserError) as caught:
        read_toml(Config, path)
    lines = str(caught.value).splitlines()
    assert lines == [
        f"{path}: unknown key 'lrr'; did you mean lr?",
        f"{path}: key 'epochs': expected a whole number, got 'x'",
        f"{path}: key 'precision': expected one of 'bf16', 'float32', got 'fp8'",
        f"{path}: key 'compile': expected true or false, got 1",
        f"{path}: key 'data': expected a text, got 1",
        f"{path}: unknown table [section]; the flags stand above all tables",
    ]


def test_the_type_of_a_path_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_toml(Places, toml(tmp_path, "samples = 5\nout = [5]\n"))
    words = [line.split(": ", 1)[1] for line in str(caught.value).splitlines()]
    assert words == [
        "key 'samples': expected a path, got 5",
        "key 'out': expected a path, got [5]",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["r", "--lrr", "1", "--dat=3"], "unknown flag --lrr; did you mean --lr?"),
        (["--config"], "expected a TOML file"),
        (["--config", "nowhere.toml"], "there is no such file"),
    ],
)
def test_wrong_flags(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse(Config, flags, "x")


def test_all_that_is_wrong_with_the_flags_comes_at_once(tmp_path: Path) -> None:
    words = ["--modle", "b", "--lr", "x", "--max_steps", "--resume=3", "--data", "nope.h5"]
    given = toml(tmp_path, "epochs = 'x'\nlrr = 1\n")
    with pytest.raises(UserError) as caught:
        parse(config_class("sft"), [*words, "--config", given], "sft")
    assert str(caught.value).splitlines() == [
        f"{given}: key 'epochs': expected a number, got 'x'",
        f"{given}: unknown key 'lrr'; did you mean lr?",
        "unknown flag --modle; did you mean --model?",  # so --model is not reported as missing
        "--resume=3: takes no value",
        "--lr x: expected a number",
        "--max_steps: expected a value after it; see whet sft --help",
        "--out: is missing; see whet sft --help",
        "--data nope.h5: no such file; `whet prepare` makes packed files",
    ]
    with pytest.raises(UserError) as caught:  # the word after an unknown flag may have been RUN
        parse(config_class("chat"), ["--foo", "run", "--temperature", "x"], "chat")
    lines = ["unknown flag --foo", "--temperature x: expected a number"]
    assert str(caught.value).splitlines() == lines


def test_broken_toml_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not valid TOML.*line 2"):
        read_toml(Config, toml(tmp_path, "lr = 1\nepochs = = 2\n"))


@dataclass(frozen=True)
class AnyConfig:
    text: str = ""
    """Text."""
    number: float = 0.0
    """Number."""
    count: int | None = None
    """Count."""
    flag: bool = False
    """Flag."""
    many: tuple[str, ...] = field(default=())
    """Many."""


@settings(deadline=None)
@given(
    st.builds(
        AnyConfig,
        text=st.text(st.characters(exclude_categories=["Cs"])),
        number=st.floats(allow_nan=False),
        count=st.none() | st.integers(-(2**62), 2**62),
        flag=st.booleans(),
        many=st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
    )
)
def test_a_saved_configuration_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, config: AnyConfig
) -> None:
    path = tmp_path_factory.mktemp("config") / "c.toml"
    save(config, path)
    assert AnyConfig(**read_toml(AnyConfig, path)) == config


def test_names_of_other_tools_lead_to_flags_that_exist() -> None:
    flags = {f.name for name in CLI for f in dataclasses.fields(config_class(name))}
    for name, target in ELSEWHERE.items():
        assert target in flags or " " in target, f"{name}: {target}"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--learning_rate", "unknown flag --learning_rate; here it is --lr"),
        ("--num-train-epochs", "unknown flag --num-train-epochs; here it is --epochs"),
        ("--gradient_accumulation_steps", "; --batch_size is the whole step"),
        ("--max_seq_length", "; rows are made by whet prepare: it has --context_length"),
        ("--val_size", "; rows are made by whet prepare: it has --dev_fraction"),
        ("--packing", "; whet prepare always packs"),
        ("--num_generations", "; here it is --group_size"),
        ("--max_completion_length", "; here it is --max_new_tokens"),
        ("--reward_weights", "; --reward takes NAME=WEIGHT"),
        ("--pref_beta", "; here it is --beta"),
    ],
)
def test_the_names_of_other_tools_are_known(flag: str, message: str) -> None:
    commands = {"--pref_beta": "dpo"} | dict.fromkeys(
        ("--num_generations", "--max_completion_length", "--reward_weights"), "grpo"
    )
    command = commands.get(flag, "sft")
    with pytest.raises(UserError) as caught:
        parse(config_class(command), [flag, "1"], command)
    assert message in str(caught.value)


def test_a_byte_order_mark_and_a_home_directory_in_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "c.toml"
    path.write_bytes(b'\xef\xbb\xbfout = "~/runs"\nsamples = "~/s.jsonl"\n')
    found = parse(Places, ["--config", "~/c.toml"], "x")
    assert found == Places(out=tmp_path / "runs", samples=tmp_path / "s.jsonl")
    model = tmp_path / "base"
    model.mkdir()
    (tmp_path / "rows.h5").touch()
    path.write_text('model = "~/base"\ndata = "~/rows.h5"\nout = "o"\n')
    assert parse(config_class("sft"), ["--config", str(path)], "sft").model == str(model)


@dataclass(frozen=True)
class Checked:
    count: Annotated[int, from_1] = 1
    """Count."""
    source: InputFile | None = None
    """Read."""
    out: OutputFile | None = None
    """Written."""


@dataclass(frozen=True)
class Belonging:
    problems: str | None = None
    """Problems."""
    limit: Annotated[int, With("problems")] = 5
    """Limit."""


def test_a_flag_that_would_do_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--limit: does nothing without --problems"):
        parse(Belonging, ["--limit", "6"], "x")
    assert parse(Belonging, ["--limit", "6", "--problems", "p"], "x").limit == 6
    path = toml(tmp_path, "limit = 5\n")  # a saved configuration holds the defaults, too
    assert parse(Belonging, ["--config", path], "x") == Belonging()


def test_everything_that_is_wrong_is_reported_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse(Checked, ["--count", "0", "--source", "none", "--out", str(tmp_path)], "x")
    assert str(caught.value).splitlines() == [
        "--count 0: expected 1 or more",
        "--source none: no such file",
        f"--out {tmp_path}: is a directory; expected a file to write",
    ]
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="reads or writes this already"):
        parse(Checked, ["--source", str(file), "--out", str(file)], "x")
    with pytest.raises(UserError, match="--count x: expected a whole number"):
        parse(Checked, ["--count", "x"], "x")


def test_help_groups_its_flags_and_begins_with_those_that_matter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(config_class("sft"), ["--help"], "sft")
    text = capsys.readouterr().out
    titles = re.findall(r"(?m)^(\w[\w ,]+):$", text)
    assert titles[1:4] == ["most used", "the model that is trained", "data"]
    first = re.findall(r"(?m)^  --(\w+)", text.partition("most used:")[2].partition("\n\n")[0])
    assert set(first) == {"model", "data", "dev", "out", "lr", "epochs", "batch_size"}
    assert "example:" in text


def test_what_is_wrong_is_said_beside_what_is_missing() -> None:
    with pytest.raises(UserError) as error:
        parse(config_class("sft"), ["--seed", "4294967296", "--lr", "-1"], "sft")
    words = str(error.value)
    assert "--model: is missing" in words
    assert "--seed 4294967296: expected 0 or more, below 2^31" in words
    assert "--lr -1.0" in words


def test_a_whole_number_that_no_float_holds(tmp_path: Path) -> None:
    for value in (10**400, -(10**309)):
        with pytest.raises(UserError, match=r"key 'lr': expected a number, got -?10"):
            read_toml(Config, toml(tmp_path, f"lr = {value}\n"))


@dataclass
class Fixed:
    """A command that others' flag would mean something for."""

    passes: ClassVar[int] = 1
    lr: float = 0.1
    """Learning rate."""


def test_what_a_class_has_fixed_is_no_flag(tmp_path):
    (tmp_path / "x.toml").write_text("passes = 2")
    with pytest.raises(UserError, match="unknown key 'passes'"):
        read_toml(Fixed, tmp_path / "x.toml")
    with pytest.raises(UserError, match="unknown flag --passes"):
        parse(Fixed, ["--passes", "2"], "grpo", lambda config: [])
