"""Resume states: whole or not there, damage found and named, the right ones kept."""

import json
import os

import pytest
import torch
from torch import nn

from whet.errors import UserError
from whet.train import state
from whet.train.distributed import Ranks
from whet.train.optim import make_optimizers, parameter_groups
from whet.train.state import Facts


def made(seed: int = 0, width: int = 4):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 3), nn.LayerNorm(3))
    optimizers = make_optimizers("adamw", parameter_groups(model, 0.1), beta2=0.95)
    for optimizer in optimizers:
        model(torch.randn(2, width)).sum().backward()
        optimizer.step()
    return model, optimizers


def save(folder, model, optimizers, step):
    facts = Facts(step=step, recent_norms=[0.1, 1 / 3])
    return state.save_state(folder, state.tensors_of(model, optimizers), facts, Ranks())


def test_round_trip(tmp_path):
    model, optimizers = made(0)
    path = save(tmp_path, model, optimizers, 7)
    assert state.damage(path) is None
    other, others = made(1)
    facts = state.load_state(path, other, others, Ranks())
    assert facts == Facts(step=7, recent_norms=[0.1, 1 / 3])
    saved = state.tensors_of(model, optimizers)
    assert set(saved) == set(state.tensors_of(other, others))
    for name, value in state.tensors_of(other, others).items():
        assert torch.equal(value, saved[name]), name


def test_another_model_is_refused(tmp_path):
    path = save(tmp_path, *made(0), 7)
    with pytest.raises(UserError, match=r"model\.0\.weight is \(3, 4\) there and \(3, 5\) here"):
        state.load_state(path, *made(0, width=5), Ranks())


def shorten(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 2)  # the last byte of JSON is a newline


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["shard", "facts.json", "manifest.json"])
@pytest.mark.parametrize("harm", [shorten, flip, os.remove])
def test_damage_is_named_and_passed_over(tmp_path, name, harm):
    model, optimizers = made(0)
    older, newer = (save(tmp_path, model, optimizers, step) for step in (3, 6))
    harm(next(path for path in newer.iterdir() if path.name.startswith(name)))
    found, passed_over = state.newest_valid(tmp_path)
    assert found == older
    assert len(passed_over) == 1
    assert str(newer) in passed_over[0]


def test_a_manifest_cannot_point_outside(tmp_path):
    path = save(tmp_path, *made(0), 3)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "outside the folder" in state.damage(path)


def test_a_surplus_file_is_damage(tmp_path):
    path = save(tmp_path, *made(0), 3)
    (path / "shard-00009.safetensors").write_bytes(b"")
    assert "not in its manifest" in state.damage(path)


def test_prune_keeps_the_newest_and_the_one_an_incident_needs(tmp_path):
    model, optimizers = made(0)
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, model, optimizers, step)
    state.prune(
        tmp_path, 2, Facts(step=10, incident_step=6)
    )  # step 6 is replayed from the state after step 4
    assert [path.name[-2:] for path in state.saved_states(tmp_path)] == ["04", "08", "10"]
    state.prune(tmp_path, 2, Facts(step=10))
    assert [path.name[-2:] for path in state.saved_states(tmp_path)] == ["08", "10"]


def test_prune_does_not_count_what_the_resume_has_passed_over(tmp_path):
    """A damaged state of a later step must not push out the ones that are saved after it."""
    model, optimizers = made(0)
    for step in (3, 4, 9):
        save(tmp_path, model, optimizers, step)
    state.prune(tmp_path, 1, Facts(step=4))
    assert [path.name[-2:] for path in state.saved_states(tmp_path)] == ["04", "09"]


def test_a_state_before_the_first_step_is_resumed(tmp_path):
    """Then the optimizer has no state yet; as when the first evaluation is interrupted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizers = make_optimizers("adamw", parameter_groups(model, 0.1), beta2=0.95)
    path = save(tmp_path, model, optimizers, 0)
    other, others = made(1)
    assert state.load_state(path, other, others, Ranks()).step == 0
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert all(not optimizer.state for optimizer in others), "as fresh as the saved ones"


def test_leftovers_of_a_killed_save_are_no_states(tmp_path):
    model, optimizers = made(0)
    path = save(tmp_path, model, optimizers, 2)
    os.rename(path, tmp_path / ".saving_step_00000002")
    assert state.newest_valid(tmp_path) == (None, [])
    state.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_a_state_is_a_pickle(tmp_path):
    path = save(tmp_path, *made(0), 3)
    kinds = {item.suffix for item in path.iterdir()}
    assert kinds == {".safetensors", ".json"}


def test_a_state_is_written_in_files_of_bounded_size(tmp_path, monkeypatch):
    """Each is put together in memory; a tensor larger than the bound has a file of its own."""
    monkeypatch.setattr(state, "FILE_BYTES", 60)
    model, optimizers = made(0)
    path = save(tmp_path, model, optimizers, 7)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 3
    assert state.damage(path) is None
    assert state.files_of({"a": torch.zeros(20), "b": torch.zeros(1)}) == {"a": 1, "b": 2}
    other, others = made(1)
    state.load_state(path, other, others, Ranks())
    for name, value in state.tensors_of(other, others).items():
        assert torch.equal(value, state.tensors_of(model, optimizers)[name]), name


def test_the_copy_that_is_saved_stays_when_training_goes_on():
    model, optimizers = made(0)
    live = state.tensors_of(model, optimizers)
    copied = state.copied(live)
    before = {name: value.clone() for name, value in live.items()}
    for value in live.values():
        value += 1
    for name, value in copied.items():
        assert torch.equal(value, before[name]), name
