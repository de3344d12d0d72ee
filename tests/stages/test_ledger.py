"""The step ledger: every trained token of every step, by file and line."""

import json

import h5py
import numpy as np
import pytest

from tests import tiny
from tests.numerics.test_layouts import command
from whet.cli import main
from whet.data.batches import global_batch_rows
from whet.data.store import PackedStore, new_store
from whet.stages.ledger import open_ledger


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger")
    tiny.model_directory(folder / "base")
    tiny.packed_file(folder / "train.h5", n_rows=7, weighted=True)
    tiny.packed_file(folder / "dev.h5", n_rows=3, seed=1)
    # More steps than wait on the device before the ledger is written.
    flags = {"max_steps": 36, "epochs": 20, "eval_every": 0, "micro_batch_size": 3}
    assert main(command(folder, folder / "out", **flags)) == 0
    return folder


def test_every_step_has_the_documents_of_its_batch(world):
    records, store = open_ledger(world / "out")
    for step in range(1, 37):
        found = records[records["step"] == step]
        rows = global_batch_rows(7, 4, 0, step - 1)
        wanted = [i for i in store.documents_in(rows)[2] if store.documents[i]["trained"]]
        assert sorted(found["document"]) == sorted(wanted)
        assert (found["trained"] == store.documents[found["document"]]["trained"]).all()
    assert (np.diff(records["step"].astype(int)) >= 0).all()


def test_a_file_without_a_table_of_documents(world, tmp_path, capsys):
    """Rows are its places; two documents of a row are two records of it."""
    with h5py.File(world / "train.h5") as whole, h5py.File(tmp_path / "x.h5", "w") as bare:
        for name in ("tokens", "loss_mask", "segment_ids"):
            bare[name] = whole[name][...]
    words = command(world, tmp_path / "out", data=tmp_path / "x.h5", max_steps=2, eval_every=0)
    assert main(words) == 0
    records, store = open_ledger(tmp_path / "out")
    capsys.readouterr()
    for step in (1, 2):
        rows = global_batch_rows(7, 4, 0, step - 1)
        found = records[records["step"] == step]
        assert set(store.document_rows[found["document"]]) <= set(rows)
        assert len(set(found["document"])) == len(found)
        assert main(["ledger", str(tmp_path / "out"), "--step", str(step)]) == 0
        told = {line.split()[0].rpartition(":")[2] for line in capsys.readouterr().out.splitlines()}
        assert told == {str(row + 1) for row in rows}
    assert main(["ledger", str(tmp_path / "out"), "--document", f"x.h5:{rows[0] + 1}"]) == 0
    assert "step 2" in capsys.readouterr().out


def test_losses_add_up_to_the_train_loss(tmp_path, world):
    """With a 0/1 mask the step's loss is the mean over its documents, weighted by their tokens."""
    tiny.packed_file(tmp_path / "train.h5", n_rows=5)
    words = command(world, tmp_path / "out", data=tmp_path / "train.h5", eval_every=0)
    assert main(words) == 0
    records, _ = open_ledger(tmp_path / "out")
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        logged = json.loads(line)
        if "train_loss" in logged:
            mine = records[records["step"] == logged["step"]]
            mean = np.average(mine["loss"].astype(float), weights=mine["trained"])
            assert mean == pytest.approx(logged["train_loss"], rel=1e-6)


def test_command_finds_steps_and_documents(world, capsys):
    run = str(world / "out")
    assert main(["ledger", run, "--step", "5"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert lines
    place = lines[0].split()[0]
    assert place.startswith("data/")
    assert main(["ledger", run, "--document", place]) == 0
    assert "step 5 " in capsys.readouterr().out
    assert main(["ledger", run, "--document", place.removeprefix("data/")]) == 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "either --step N or --document"),
        (["--step", "99"], "has steps 1 to 36"),
        (["--document", "a.jsonl"], "expected FILE:LINE"),
        (["--document", "c.jsonl:1"], "there are data/a.jsonl, data/b.jsonl"),
        (["--document", "a.jsonl:9999"], "no document"),
    ],
)
def test_bad_questions(world, capsys, flags, told):
    assert main(["ledger", str(world / "out"), *flags]) == 2
    assert told in capsys.readouterr().err


def test_no_run(tmp_path, capsys):
    assert main(["ledger", str(tmp_path), "--step", "1"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_a_file_without_documents_is_named_by_row(world, tmp_path, capsys):
    store = PackedStore(world / "train.h5")
    read = store.rows(range(len(store)))
    with new_store(tmp_path / "bare.h5", len(store), store.context_length) as writer:
        writer.write_rows(read.tokens, read.loss_mask != 0, read.segment_ids != 0)
    words = command(world, tmp_path / "out", data=tmp_path / "bare.h5", max_steps=2)
    assert main(words) == 0
    assert main(["ledger", str(tmp_path / "out"), "--step", "1"]) == 0
    assert "bare.h5:" in capsys.readouterr().out
