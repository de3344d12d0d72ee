"""The run folder: files that a full disk cannot tear, and what a continued run cuts away."""

import json
import resource
import shutil

import pytest

from tests import tiny
from tests.numerics.test_layouts import command
from tests.processes import start, wait
from whet.cli import main
from whet.errors import UserError
from whet.train.distributed import Ranks
from whet.train.run import Journal, RunFolder
from whet.train.state import Facts, newest_valid, read_facts, saved_states


def test_journal_delays_what_the_disk_refuses(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j")
    journal.cut(0)
    assert journal.append(b"one\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
    try:
        assert not journal.append(b"two\n")
        assert not journal.append(b"three\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert journal.append(b"four\n")
    assert (tmp_path / "j").read_bytes() == b"one\ntwo\nthree\nfour\n"


def test_journal_cut(tmp_path):
    (tmp_path / "j").write_bytes(b"one\ntwo\nhal")
    journal = Journal(tmp_path / "j")
    journal.cut(4)
    journal.append(b"2\n")
    assert (tmp_path / "j").read_bytes() == b"one\n2\n"


@pytest.mark.parametrize(
    ("content", "record", "kept"),
    [(b"one\ntwo\nhal", 0, b"one\ntwo\n"), (b"12345678123", 4, b"12345678"), (b"", 4, b"")],
)
def test_a_journal_that_lost_its_end_is_not_made_longer(tmp_path, content, record, kept):
    """Zeros in it would be no JSON, and no records."""
    (tmp_path / "j").write_bytes(content)
    journal = Journal(tmp_path / "j", record=record)
    assert not journal.cut(100)
    assert (tmp_path / "j").read_bytes() == kept
    assert journal.append(b"next")
    assert (tmp_path / "j").read_bytes() == kept + b"next"


def test_two_processes_in_one_folder(tmp_path):
    """The second one is told; the lock goes with the first, however it ends."""
    first, second = RunFolder(tmp_path, Ranks()), RunFolder(tmp_path, Ranks())
    first.open({"command": "sft"}, Facts())
    with pytest.raises(UserError, match="another process trains in it"):
        second.open({"command": "sft"}, Facts())
    first.close()
    second.open({"command": "sft"}, Facts())
    second.close()


def test_opening_forgets_what_came_after_the_state(tmp_path):
    (tmp_path / "incidents").mkdir()
    for step in (4, 5, 6):
        (tmp_path / "incidents" / f"step_{step:08d}.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_bytes(b"1\n2\n3\n")
    run = RunFolder(tmp_path, Ranks(), Facts(step=5, lengths={"metrics.jsonl": 4}))
    run.open({}, Facts())
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"1\n2\n"
    assert sorted(p.stem[-1] for p in (tmp_path / "incidents").iterdir()) == ["4", "5"]


def test_metrics_are_valid_json(tmp_path):
    run = RunFolder(tmp_path, Ranks())
    run.open({}, Facts())
    run.metrics(1, {"train_loss": float("nan"), "lr": 0.1}, {})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "train_loss": "nan",
        "lr": 0.1,
    }


def test_a_full_disk_ends_neither_the_run_nor_older_states(tmp_path):
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8)
    tiny.packed_file(tmp_path / "dev.h5", n_rows=3, seed=1)
    out, log = tmp_path / "out", tmp_path / "log"
    # Two steps first, so that a state exists; then no file may be as long as a state's tensors.
    flags = {"max_steps": 8, "epochs": 8, "save_every": 2, "eval_every": 0}
    process = start([command(tmp_path, out, **flags, grace_seconds=60)], log=log)
    wait([process], [log], 60)
    for path in saved_states(out / "state")[1:]:
        shutil.rmtree(path)
    kept = saved_states(out / "state")[0]
    words = [*command(tmp_path, out, **flags), "--resume"]
    process = start([words], log=log, file_limit=60_000)  # the model has 38 KB, a state 114 KB
    assert wait([process], [log], 60) == [0]
    assert "could not be saved" in log.read_text()
    assert newest_valid(out / "state") == (kept, [])
    steps = (out / "metrics.jsonl").read_text().count("train_loss")
    assert steps == 8
    assert read_facts(kept).step < 8
    assert main([*words]) == 0


def test_a_resume_leaves_the_state_that_it_goes_on_from(tmp_path):
    """Writing it again would begin with removing it: a kill then could cost the last one."""
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8)
    tiny.packed_file(tmp_path / "dev.h5", n_rows=3, seed=1)
    out = tmp_path / "out"
    words = command(tmp_path, out, max_steps=4, save_every=2, keep=1)
    assert main(words) == 0
    (last,) = saved_states(out / "state")
    folder = last.stat().st_ino
    (out / "model.safetensors").unlink()
    assert main([*words, "--resume"]) == 0
    assert (out / "model.safetensors").is_file()
    assert [path.stat().st_ino for path in saved_states(out / "state")] == [folder]
