import json
import math
import re

import h5py
import numpy as np
import pytest
import torch

from whet.cli import main
from whet.data.store import new_store
from whet.model.loss import sft_loss

PROBLEMS = [{"question": f"How many eggs are {i}?", "answer": f"#### {i}"} for i in range(6)]


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return file


def packed(path, chat, **attrs):
    """A packed file of 5 rows of 16 tokens of `tokenizer`."""
    tokens = np.random.default_rng(0).integers(0, chat.tokenizer.vocab_size, (5, 16))
    ones = np.ones((5, 16), np.int32)
    attrs = {
        "tokenizer_hash": chat.tokenizer.hash,
        "vocab_size": chat.tokenizer.vocab_size,
        **attrs,
    }
    with new_store(path, 5, 16, attrs=attrs) as writer:
        writer.write_rows(tokens, ones, ones)
    return path


def formula(model, path) -> float:
    """The dev loss by its definition; every token but a row's first is trained."""
    with h5py.File(path) as file, torch.no_grad():
        tokens = torch.from_numpy(file["tokens"][:].astype(np.int64))
        return float(sft_loss(model(tokens), tokens, torch.ones_like(tokens)))


def test_both_measures_at_once(run, model, chat, problems, tmp_path, capsys) -> None:
    dev = packed(tmp_path / "dev.h5", chat)
    out, samples = tmp_path / "out.json", tmp_path / "samples.jsonl"
    flags = ["--gsm8k", problems, "--limit", "4", "--max_new_tokens", "5", "--dev", dev]
    flags += ["--json", out, "--samples", samples]
    assert main(["eval", str(run), *map(str, flags)]) == 0
    numbers = json.loads(out.read_text())
    assert (numbers["n"], numbers["trained_tokens"]) == (4, 5 * 15)
    assert numbers["accuracy"] == numbers["correct"] / 4
    assert numbers["interval_95"][0] <= numbers["accuracy"] <= numbers["interval_95"][1]
    assert numbers["dev_loss"] == pytest.approx(formula(model, dev), rel=1e-5)
    assert numbers["ppl"] == pytest.approx(math.exp(numbers["dev_loss"]))
    assert len(samples.read_text().splitlines()) == 4
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    assert "dev loss:" in printed
    assert {file.name for file in tmp_path.iterdir()} == {
        "dev.h5", "out.json", "samples.jsonl", "test.jsonl"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to measure: give --gsm8k FILE, --dev FILE, or both"),
        (["--gsm8k", "none.jsonl"], "none.jsonl: no such file"),
        (["--dev", "none.h5"], "none.h5: no such file"),
        (["--gsm8k", "{problems}", "--limit", "0"], "--limit 0: expected 1 or more"),
        (["--gsm8k", "{problems}", "--json", "no/where/out.json"], "folder .*no/where does not"),
        (["--dev", "{dev}", "--samples", "s.jsonl"], "--samples: does nothing without --gsm8k"),
        (["--dev", "{dev}", "--limit", "5"], "--limit: does nothing without --gsm8k"),
        (["--dev", "{dev}", "--json", "{dev}"], "--json .*dev.h5: .* reads or writes this already"),
        (["--gsm8k", "{problems}", "--samples", "{problems}"], "--samples .* writes this already"),
        (["--gsm8k", "{problems}", "--samples", "x", "--json", "x"], "--samples x: .* already"),
        (["--gsm8k", "{problems}", "--samples", "/proc/x"], "--samples /proc/x: cannot be written"),
    ],
)
def test_bad_input_is_told_in_a_line(run, chat, problems, tmp_path, capsys, flags, message):
    dev = packed(tmp_path / "dev.h5", chat)
    flags = [flag.format(problems=problems, dev=dev) for flag in flags]
    assert main(["eval", str(run), *flags]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert_matches(told[0], message)


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        (
            {"tokenizer_hash": "0" * 64},
            r"--dev .*dev\.h5: was made with another tokenizer than the model's",
        ),
        ({"vocab_size": 9999}, "its tokenizer has 9,999 ids, the model's embedding"),
    ],
)
def test_a_packed_file_that_is_not_the_models(run, chat, tmp_path, capsys, attrs, message):
    dev = packed(tmp_path / "dev.h5", chat, **attrs)
    out = tmp_path / "out.json"
    assert main(["eval", str(run), "--dev", str(dev), "--json", str(out)]) == 2
    assert_matches(capsys.readouterr().err, message)
    assert not out.exists()


def test_a_model_that_cannot_be_opened(run, problems, tmp_path, capsys) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(b"")
    for model, message in [
        (tmp_path / "none", "none: there is no such path"),
        (file, "model.pt: a .pt file has no tokenizer; name its directory with --tokenizer"),
        (tmp_path, "holds no tokenizer.json"),
    ]:
        assert main(["eval", str(model), "--gsm8k", str(problems)]) == 2
        assert_matches(capsys.readouterr().err, message)


def test_a_tokenizer_too_large_for_the_model(run, problems, shared_data, capsys) -> None:
    other = shared_data / "tokenizers/gpt2"
    assert main(["eval", str(run), "--gsm8k", str(problems), "--tokenizer", str(other)]) == 2
    assert_matches(capsys.readouterr().err, "this tokenizer has 50,257 ids, the model")


def test_torchrun_is_refused(run, problems, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", str(run), "--gsm8k", str(problems)]) == 2
    assert_matches(capsys.readouterr().err, "one process")


def assert_matches(text: str, message: str) -> None:
    assert re.search(message, text), text
