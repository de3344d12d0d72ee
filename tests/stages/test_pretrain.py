"""whet pretrain: text to a model directory; refusals; a kill while it prepares."""

import json

import pytest

from whet.chat.chat import load_tokenizer
from whet.cli import main
from whet.data.store import PackedStore
from whet.model.open import load_backbone_from_ckpt

STORY = "A shop has {} apples. Anna buys {} of them. Now there are {} left.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    rows = [{"text": STORY.format(n, n // 2, n - n // 2)} for n in range(2, 202)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(text, out, **flags):
    values = {"data": text, "out": out, "width": 32, "layers": 2, "heads": 2, "vocab_size": 300}
    values |= {"context_length": 64, "max_steps": 6, "batch_size": 4, "samples": 1}
    words = ["pretrain", "--quiet"]
    for key, value in (values | flags).items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def test_makes_a_model_that_learns(text, tmp_path):
    out = tmp_path / "base"
    assert main(command(text, out, max_steps=30, dev_fraction=0.1, lr=1e-2)) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    dev = [line["dev_loss"] for line in lines if "dev_loss" in line]
    assert dev[-1] < dev[0] - 1
    model, chat = load_backbone_from_ckpt(out), load_tokenizer(out)
    assert model.config.vocab_size == chat.tokenizer.vocab_size <= 300
    assert model.config.max_positions == 64
    assert json.loads((out / "whet.json").read_text())["stage"] == "pretrain"
    sample = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("A shop")


def test_resume_prepares_nothing_again(text, tmp_path, monkeypatch):
    out = tmp_path / "base"
    assert main(command(text, out)) == 0
    before = (out / "packed.h5").stat().st_mtime_ns
    assert main([*command(text, out), "--resume"]) == 0
    assert (out / "packed.h5").stat().st_mtime_ns == before


def test_resume_of_a_run_that_failed_before_it_began_prepares_again(text, tmp_path):
    """Its flags were compared with none: the packed file may be of other data."""
    out = tmp_path / "base"
    assert main(command(text, out, lr_groups="none=1")) == 2, "refused after preparing"
    assert (out / "packed.h5").is_file()
    assert not (out / "config.toml").exists()
    assert main([*command(text, out, context_length=32), "--resume"]) == 0
    assert PackedStore(out / "packed.h5").context_length == 32


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"width": 30, "heads": 4}, "--width 30: must be a multiple of 2 x --heads 4"),
        ({"kv_heads": 3}, "--kv_heads 3: must divide"),
        ({"layers": 0}, "--layers 0"),
        ({"tokenizer": "nowhere"}, "nowhere"),
        ({"data": "nowhere.txt", "tokenizer": "none"}, "--data nowhere.txt: no such file"),
        ({"data": "nowhere.txt", "tokenizer": "none"}, "--tokenizer none: is no directory"),
        ({"context_length": 1, "dev_fraction": 2}, "--context_length 1: expected 2 or more"),
        (
            {"context_length": 1, "dev_fraction": 2},
            "--dev_fraction 2.0: expected",
        ),
        ({"vocab_size": 256}, "--vocab_size 256: expected at least 257"),
        ({"out_ckpt": "tests"}, "--out_ckpt tests: is a directory"),
    ],
)
def test_bad_flags(text, tmp_path, capsys, flags, told):
    assert main(command(text, tmp_path / "base", **flags)) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "a.jsonl",
            b'{"prompt": "a", "completion": "b"}\n',
            "1 cannot be read (mend them, or take",
        ),
        ("a.jsonl", b"", "nothing is left to train on: --data: no record in"),
        ("a.txt", b"word", "of 1 conversations or rows of text, with 1 different openings"),
        ("a.txt", b"\xff\xfe", "a.txt: is UTF-16 or UTF-32"),
    ],
)
def test_refused_data_leave_no_folder(tmp_path, capsys, name, content, told):
    (tmp_path / name).write_bytes(content)
    assert main(command(tmp_path / name, tmp_path / "base")) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "--refused" not in error, "no flag of this command"
    assert [path.name for path in tmp_path.iterdir()] == [name]
