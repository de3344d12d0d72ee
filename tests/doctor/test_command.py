"""The command: its table, its exit code, its JSON; and what it says of broken input."""

import json

import numpy as np
import pytest
import torch

from tests import tiny
from tests.doctor.test_checks import ALL, REWARD, leaking
from whet.chat.certificate import Refusal
from whet.cli import main
from whet.data.store import new_store
from whet.doctor import command, runs
from whet.doctor import subject as subject_module
from whet.doctor.command import CHECKS, examine
from whet.errors import UserError


def words(ward, *more: str) -> list[str]:
    flags = ["--model", str(ward / "base"), "--device", "cpu", "--precision", "float32"]
    return ["doctor", *flags, "--no_processes", *more]


def test_healthy(ward, tmp_path, capsys):
    """All that needs no processes passes, and the table and the JSON tell the same."""
    path = tmp_path / "found.json"
    data = ["--data", str(ward / "train.h5"), "--conversations", str(ward / "talks.jsonl")]
    assert main(words(ward, *data, "--json", str(path))) == 0
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    assert written["fail"] == written["skipped"] == 0, written["claims"]
    assert written["pass"] == len(written["claims"]) == printed.count("\npass ")
    assert f"{written['pass']} passed, 0 failed" in printed
    assert written["machine"]["torch"]
    claims = {row["claim"] for row in written["claims"]}
    assert claims == ALL
    for row in written["claims"]:
        assert row["measured"] <= row["bound"]


def test_a_failure_is_told_by_the_exit_code(ward, tmp_path, capsys, monkeypatch):
    leaking(monkeypatch)
    path = tmp_path / "found.json"
    assert main(words(ward, "--data", str(ward / "train.h5"), "--json", str(path))) == 1
    assert "fail    packed equals separate: loss" in capsys.readouterr().out
    assert json.loads(path.read_text())["fail"] > 0


def test_without_data(ward, capsys):
    """A model alone is examined on random tokens; what cannot be tried says why."""
    assert main(words(ward)) == 0
    out = capsys.readouterr().out
    assert "random tokens, as no data were given" in out
    assert "no conversations; give --conversations FILE" in out
    assert "no packed file; give --data FILE.h5" in out


def test_conversations_alone_and_fewer_layers(ward, capsys):
    talks = ["--conversations", str(ward / "talks.jsonl"), "--layers", "1"]
    assert main(words(ward, *talks)) == 0
    out = capsys.readouterr().out
    assert "7,024 parameters" in out, "one layer instead of two"
    assert "made of documents of" in out


def test_another_architecture(ward, tmp_path, capsys, monkeypatch):
    """What it cannot have is skipped, with the reason; the rest passes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "vocab_size": 292, "max_position_embeddings": 64}
    config = transformers.AutoConfig.for_model("gpt_neox", **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    tiny.chat().save(tmp_path / "other")
    path = tmp_path / "found.json"
    model = ["--model", str(tmp_path / "other")]
    data = ["--data", str(ward / "train.h5"), "--conversations", str(ward / "talks.jsonl")]
    flags = ["--device", "cpu", "--precision", "float32", "--json", str(path)]
    monkeypatch.setattr(subject_module, "LARGE", 0)
    assert main(["doctor", *model, *data, *flags]) == 0, capsys.readouterr().out
    rows = json.loads(path.read_text())["claims"]
    skipped = {row["claim"]: row["note"] for row in rows if row["verdict"] == "skipped"}
    assert skipped.keys() == {REWARD, runs.AGREE, runs.RESUMED}
    assert all("Whet's own families" in note for note in skipped.values())
    assert {row["claim"] for row in rows} >= ALL
    assert main(["doctor", *model, "--layers", "1"]) == 2
    assert "--layers: only Whet's own families" in capsys.readouterr().err


def test_a_file_of_tokens_and_mask_only(ward, tmp_path):
    rng = np.random.default_rng(0)
    with new_store(tmp_path / "plain.h5", 6, 24) as store:
        mask = np.tile(np.arange(24) >= 12, (6, 1)).astype(np.float32)
        store.write_rows(rng.integers(1, 290, (6, 24)), mask, np.ones((6, 24), np.int32))
    assert main(words(ward, "--data", str(tmp_path / "plain.h5"))) == 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--layers", "0", "--row_tokens", "3"], ["--layers 0", "--row_tokens 3"]),
        (["--json", "/no/such/folder/x.json"], ["its folder /no/such/folder does not exist"]),
        (["--json", "/proc/x.json"], ["--json /proc/x.json: cannot be written"]),
        (["--json", "."], ["--json .: is a directory"]),
        (["--data", "missing.h5"], ["no such file"]),
        (["--conversations", "missing.jsonl"], ["no such file"]),
    ],
)
def test_bad_flags(ward, capsys, flags, told):
    assert main(words(ward, *flags)) == 2
    err = capsys.readouterr().err
    assert all(line in err for line in told)


def test_untrained_data_and_foreign_ids(ward, tmp_path, capsys):
    blank = np.zeros((2, 24), np.int32)
    with new_store(tmp_path / "blank.h5", 2, 24) as store:
        store.write_rows(blank, blank, blank + 1)
    assert main(words(ward, "--data", str(tmp_path / "blank.h5"))) == 2
    assert "no document with a trained token" in capsys.readouterr().err
    with new_store(tmp_path / "far.h5", 2, 24) as store:
        store.write_rows(blank + 70_000, blank + 1, blank + 1)
    assert main(words(ward, "--data", str(tmp_path / "far.h5"))) == 2
    assert "holds the id 70000" in capsys.readouterr().err


def test_why_nothing_can_be_examined_is_told(monkeypatch):
    refusal = Refusal("unfit", "chats.jsonl:1: no token of the tokenizer ends the reply")
    monkeypatch.setattr(subject_module, "encode_many", lambda *arguments: [refusal])
    with pytest.raises(UserError, match="first was refused: chats"):
        subject_module.sample_rows(9, 48, None, [object()], object())


def test_a_check_that_breaks_has_failed_and_the_others_go_on(subject, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("as an example")

    monkeypatch.setattr(command.saving, "load", broken)
    rows = examine(subject, CHECKS)
    (bad,) = [row for row in rows if row["verdict"] == "fail"]
    assert bad["note"] == "ZeroDivisionError: as an example"
    assert "Traceback" in bad["traceback"]
    assert rows[-1]["claim"].startswith("replies of equal reward")
