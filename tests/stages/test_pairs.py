"""whet dpo and whet reward: the commands on real processes, against plain formulas."""

import json
import math
import shutil
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests import tiny
from tests.pairs import pairs_file
from tests.processes import run_ranks, start, wait
from whet.cli import main
from whet.data.store import PackedStore
from whet.model.open import load_backbone_from_ckpt
from whet.train.state import saved_states

LOSSES = ("dpo", "ipo", "simpo", "orpo", "kto")
BETA = {"simpo": 2.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tiny.model_directory(folder / "base", max_positions=64)
    tiny.model_directory(folder / "other", max_positions=64, seed=3)
    pairs_file(folder / "train.h5", n_rows=7, margins=True)
    pairs_file(folder / "dev.h5", n_rows=5, seed=1)
    pairs_file(folder / "labels.h5", n_rows=5, seed=2, kind="labels")
    return folder


def command(world: Path, stage: str, out: Path, **flags) -> list[str]:
    values = {
        "model": world / "base",
        "data": world / "train.h5",
        "dev": world / "dev.h5",
        "out": out,
        "lr": 3e-3,
        "warmup": 0,
        "epochs": 10,
        "max_steps": 6,
        "batch_size": 4,
        "eval_every": 3,
        "precision": "float32",
    } | flags
    words = [stage, "--quiet"]
    for key, value in values.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def document_logp(model, store: PackedStore) -> torch.Tensor:
    """(documents, 2) float64: ln p of the trained tokens of each document run alone, and how many
    they are."""
    found = []
    for entry in store.documents:
        here = slice(entry["start"], entry["start"] + entry["length"])
        read = store.rows([entry["row"]])
        ids = torch.from_numpy(read.tokens[0, here]).long()
        mask = torch.from_numpy(read.loss_mask[0, here])[1:].double()
        logp = F.log_softmax(model(ids[None])[0, :-1].double(), -1)
        found.append(torch.stack([(logp.gather(1, ids[1:, None])[:, 0] * mask).sum(), mask.sum()]))
    return torch.stack(found)


def plain_loss(kind: str, p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """(pairs,) by the papers; p, q (documents, 2) of the model and of the reference."""
    (pc, nc), (pr, nr) = p[0::2].unbind(1), p[1::2].unbind(1)
    qc, qr = q[0::2, 0], q[1::2, 0]
    if kind == "dpo":
        return -F.logsigmoid(beta * ((pc - qc) - (pr - qr)))
    if kind == "ipo":
        return ((pc - qc) / nc - (pr - qr) / nr - 1 / (2 * beta)) ** 2
    if kind == "simpo":
        return -F.logsigmoid(beta * (pc / nc - pr / nr) - beta / 2)
    odds = [m - torch.log1p(-torch.exp(m)) for m in (pc / nc, pr / nr)]
    return -pc / nc - beta * F.logsigmoid(odds[0] - odds[1])


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "kto"])
def test_the_loss_is_its_formula_at_the_start_and_at_the_end(world, tmp_path, kind):
    assert main(command(world, "dpo", tmp_path / "run", loss=kind)) == 0
    dev = [line for line in metrics(tmp_path / "run") if "dev_loss" in line]
    store, beta = PackedStore(world / "dev.h5", ("preferences",)), BETA.get(kind, 0.1)
    with torch.no_grad():
        base = document_logp(load_backbone_from_ckpt(world / "base"), store)
        trained = document_logp(load_backbone_from_ckpt(tmp_path / "run"), store)
    assert dev[0]["dev_loss"] == pytest.approx(float(plain_loss(kind, base, base, beta).mean()))
    expected = plain_loss(kind, trained, base, beta).mean()
    assert dev[-1]["dev_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert dev[-1]["dev_chosen_logp"] == pytest.approx(float(trained[0::2, 0].mean()), rel=1e-5)
    assert dev[-1]["dev_loss"] != pytest.approx(dev[0]["dev_loss"], rel=1e-3), "it has learnt"


@pytest.mark.parametrize(("kind", "start"), [("dpo", math.log(2)), ("ipo", 25.0), ("kto", 1.0)])
def test_it_begins_at_the_reference(world, tmp_path, kind, start):
    """The same code computes reference and policy: nothing differs, not even by rounding."""
    assert main(command(world, "dpo", tmp_path / "run", loss=kind, micro_batch_size=4)) == 0
    evaluated, first = metrics(tmp_path / "run")[:2]
    assert evaluated["dev_loss"] == pytest.approx(start, rel=1e-12)
    assert evaluated["dev_margin"] == evaluated["dev_chosen_less_likely"] == 0
    assert first["train_loss"] == pytest.approx(start, abs=1e-6)
    assert abs(first["margin"]) < 1e-6


def test_the_first_gradient_is_that_of_the_formula(world, tmp_path):
    """-beta/2 x grad(p_c - p_r), over the pairs of the step."""
    words = command(world, "dpo", tmp_path / "run", max_steps=1, batch_size=7, epochs=1, clip=0)
    assert main(words) == 0
    model = load_backbone_from_ckpt(world / "base")
    store = PackedStore(world / "train.h5", ("preferences",))
    p = document_logp(model, store)
    plain_loss("dpo", p, p.detach(), 0.1).mean().backward()
    norm = torch.nn.utils.get_total_norm([x.grad for x in model.parameters()])
    assert metrics(tmp_path / "run")[1]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def assert_same(out: Path, expected: Path) -> None:
    for found, other in zip(metrics(out), metrics(expected), strict=True):
        assert found.keys() == other.keys()
        for key, value in other.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (key, found["step"])
    weights, others = (load_file(run / "model.safetensors") for run in (out, expected))
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, atol=3e-5, rtol=0)


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_micro_batches_and_ranks_change_nothing(world, tmp_path, stage):
    """7 rows in batches of 4, one to two pairs each; two ranks compute the reference together."""
    flags = {"margin": 1.0, "centre": 0.01}
    if stage == "dpo":  # with the loss that looks at the whole batch beforehand
        flags = {"sft_weight": 0.5, "loss": "kto", "lr": 1e-2}
    assert main(command(world, stage, tmp_path / "whole", micro_batch_size=4, **flags)) == 0
    for size in (1, 3):
        out = tmp_path / f"micro_{size}"
        assert main(command(world, stage, out, micro_batch_size=size, **flags)) == 0
        assert_same(out, tmp_path / "whole")
    words = command(world, stage, tmp_path / "ranks", micro_batch_size=2, **flags)
    words += ["--shard"] if stage == "dpo" else []
    assert run_ranks([words], size=2, folder=tmp_path) == [0, 0]
    assert (tmp_path / "rank0.log").read_text() == "", "torch warns of nothing"
    assert_same(tmp_path / "ranks", tmp_path / "whole")
    if stage == "dpo":
        assert max(line.get("kl", 0) for line in metrics(tmp_path / "whole")) > 0.01


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_sharded_ranks_change_nothing(world, tmp_path, stage):
    assert main(command(world, stage, tmp_path / "whole")) == 0
    words = command(world, stage, tmp_path / "ranks", shard=True)
    assert run_ranks([words], size=2, folder=tmp_path) == [0, 0]
    assert_same(tmp_path / "ranks", tmp_path / "whole")


@pytest.mark.parametrize(
    ("stage", "flags"), [("dpo", {}), ("dpo", {"lora_rank": 2}), ("reward", {"lora_rank": 2})]
)
def test_a_run_that_goes_on_ends_as_an_untouched_one(world, tmp_path, stage, flags):
    words = command(world, stage, tmp_path / "run", save_every=2, keep=9, **flags)
    assert main(words) == 0
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole)
    for state in saved_states(tmp_path / "run" / "state")[1:]:
        shutil.rmtree(state)
    assert main([*words, "--resume"]) == 0
    names = ["metrics.jsonl", "ledger.bin"]
    names += [path.name for path in whole.glob("*model.safetensors")]
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_a_killed_process_that_is_resumed_ends_as_an_untouched_one(world, tmp_path, stage):
    """SIGKILL after a step's state is there; DPO then reads the reference that it had computed."""
    flags = {"save_every": 1, "max_steps": 30}
    alone, killed, log = tmp_path / "alone", tmp_path / "killed", tmp_path / "log"
    assert main(command(world, stage, alone, **flags)) == 0
    process = start([command(world, stage, killed, **flags)], log=log)
    while not (killed / "state" / "step_00000004").exists() and process.is_alive():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    words = command(world, stage, killed, resume=True, **flags)
    assert wait([start([words], log=log)], [log], 120) == [0]
    for name in ("model.safetensors", "metrics.jsonl", "ledger.bin"):
        assert (alone / name).read_bytes() == (killed / name).read_bytes(), name


def test_the_reference_file_holds_what_the_model_gives(world, tmp_path):
    assert main(command(world, "dpo", tmp_path / "one")) == 0
    made = tmp_path / "one" / "reference.safetensors"
    store = PackedStore(world / "train.h5", ("preferences",))
    with torch.no_grad():
        expected = document_logp(load_backbone_from_ckpt(world / "base"), store)[:, 0]
    torch.testing.assert_close(load_file(made)[store.fingerprint], expected, atol=1e-4, rtol=0)
    assert main(command(world, "dpo", tmp_path / "two", reference=made)) == 0
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() == (
        tmp_path / "two" / "metrics.jsonl"
    ).read_bytes()


def test_a_reference_of_another_model_or_of_other_data_is_refused(world, tmp_path, capsys):
    assert main(command(world, "dpo", tmp_path / "one")) == 0
    made = tmp_path / "one" / "reference.safetensors"
    capsys.readouterr()
    other = command(world, "dpo", tmp_path / "two", reference=made, model=world / "other")
    assert main(other) == 2
    assert "was computed by another model than --model" in capsys.readouterr().err
    other = command(world, "dpo", tmp_path / "two", reference=made, data=world / "dev.h5")
    other[other.index("--dev") + 1] = str(world / "train.h5")
    assert main(other) == 0, "both files are known to it"
    pairs_file(tmp_path / "new.h5", n_rows=4, seed=9)
    other = command(world, "dpo", tmp_path / "three", reference=made, data=tmp_path / "new.h5")
    assert main(other) == 2
    assert "holds no replies of --data" in capsys.readouterr().err
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    other = command(world, "dpo", tmp_path / "four", reference=tmp_path / "broken.safetensors")
    assert main(other) == 2
    assert "is no file of reference log-probabilities" in capsys.readouterr().err
    assert not (tmp_path / "four" / "config.toml").exists()


def test_an_adapter_trains_from_the_same_reference(world, tmp_path):
    """It begins where its base is, so the reference is the base's."""
    flags = {"lora_rank": 2, "lr": 1e-2}
    assert main(command(world, "dpo", tmp_path / "run", **flags)) == 0
    lines = [line for line in metrics(tmp_path / "run") if "dev_loss" in line]
    assert lines[0]["dev_loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert lines[-1]["dev_loss"] != lines[0]["dev_loss"]
    assert (tmp_path / "run" / "adapter_config.json").exists()


def test_samples_are_replies_to_the_prompts_of_the_pairs(world, tmp_path):
    assert main(command(world, "dpo", tmp_path / "run", samples=2, max_steps=1)) == 0
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [sample["step"] for sample in found] == [0, 0, 1, 1]
    assert found[0]["prompt"] != found[1]["prompt"], "one of each pair"


@pytest.mark.parametrize("kind", ["preferences", "labels"])
def test_the_baseline_of_kto_is_the_mean_over_replies_to_other_prompts(world, tmp_path, kind):
    """Of the dev file, after training: each reply after the prompt of the unit before it."""
    data = world / ("train.h5" if kind == "preferences" else "labels.h5")
    flags = {"data": data, "dev": data, "loss": "kto", "lr": 3e-2, "max_steps": 2}
    assert main(command(world, "dpo", tmp_path / "run", **flags)) == 0
    store, size = PackedStore(data, (kind,)), 2 if kind == "preferences" else 1
    changes, trained, base = (
        [],
        *(load_backbone_from_ckpt(path) for path in (tmp_path / "run", world / "base")),
    )
    for row in range(len(store)):
        read, own = store.rows([row]), store.documents[store.documents["row"] == row]
        texts = []
        for d in own:
            here = slice(d["start"], d["start"] + d["length"])
            border = int(np.flatnonzero(read.loss_mask[0, here])[0])
            ids = read.tokens[0, here].tolist()
            texts.append((ids[:border], ids[border:]))
        for i in range(len(texts) if len(texts) > size else 0):
            prompt, reply = texts[i][0], texts[(i + size) % len(texts)][1]
            ids = torch.tensor([prompt + reply])
            with torch.no_grad():
                p, q = (
                    model(ids)[0, len(prompt) - 1 : -1]
                    .log_softmax(-1)
                    .gather(1, ids[0, len(prompt) :, None])
                    .sum()
                    for model in (trained, base)
                )
            changes.append(float(p - q))
    assert len(changes) > 5
    z = max(0.0, float(np.mean(changes)))
    with torch.no_grad():
        change = (document_logp(trained, store) - document_logp(base, store))[:, 0]
    signs = torch.tensor([1.0, -1.0]).repeat(len(change) // 2)
    if kind == "labels":
        signs = torch.from_numpy(np.where(store.values("labels", 1) > 0, 1.0, -1.0))
    losses = 1 - torch.sigmoid(signs * 0.1 * (change - z))
    last = [line for line in metrics(tmp_path / "run") if "dev_loss" in line][-1]
    expected = float(losses.mean()) * (2 if kind == "preferences" else 1)
    assert last["dev_loss"] == pytest.approx(expected, rel=1e-5)


def test_labelled_replies_train_by_kto(world, tmp_path, capsys):
    data = {"data": world / "labels.h5", "dev": world / "labels.h5"}
    assert main(command(world, "dpo", tmp_path / "run", loss="kto", lr=1e-2, **data)) == 0
    lines = [line for line in metrics(tmp_path / "run") if "dev_loss" in line]
    assert lines[0]["dev_loss"] == 0.5
    assert lines[-1]["dev_loss"] < 0.49
    steps = [line for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert all("replies" in line for line in steps)
    assert main(command(world, "dpo", tmp_path / "no", **data)) == 2
    assert "holds replies labelled good or bad" in capsys.readouterr().err


def test_rows_of_a_single_pair_leave_kto_without_a_baseline(world, tmp_path, capsys):
    """The rows of the mismatched replies are empty then; a note says so."""
    data = pairs_file(tmp_path / "one.h5", n_rows=1, seed=1)
    for path, is_noted in ((data, True), (world / "train.h5", False)):
        words = command(world, "dpo", tmp_path / path.stem, loss="kto", data=path, max_steps=2)
        assert main([word for word in words if word != "--quiet"]) == 0
        assert ("KTO's baseline stays 0" in capsys.readouterr().out) == is_noted
    kl = [line["kl"] for line in metrics(tmp_path / "one") if "kl" in line]
    assert kl == [0, 0]


def test_a_model_that_forgets_is_said_in_words(world, tmp_path, capsys):
    """Far too high a learning rate: both replies become unlikely, the rejected one sooner."""
    words = command(world, "dpo", tmp_path / "run", lr=0.1, max_steps=20, epochs=20)
    words.remove("--quiet")
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "0 % of the chosen replies have become less likely" in said
    assert "the model forgets how to write them" in said


@pytest.mark.parametrize(
    ("kind", "lr", "warnings"), [("dpo", 1e-6, 0), ("dpo", 0.1, 1), ("kto", 0.1, 1)]
)
def test_a_model_that_forgets_is_noticed_without_a_dev_file(
    world, tmp_path, capsys, kind, lr, warnings
):
    """Once a run, by pairs that its steps have not seen; and not where nothing is forgotten."""
    data = pairs_file(tmp_path / "many.h5", n_rows=60)
    flags = {"loss": kind, "lr": lr, "max_steps": 9, "epochs": 1, "data": data}
    words = command(world, "dpo", tmp_path / "run", **flags)
    at = words.index("--dev")
    assert main([word for word in words[:at] + words[at + 2 :] if word != "--quiet"]) == 0
    said = capsys.readouterr().out
    assert said.count("the model forgets how to write them") == warnings, said


def test_a_reference_of_another_loss_says_what_to_do(world, tmp_path, capsys):
    """KTO needs the numbers of replies to other prompts, which DPO's file has not."""
    assert main(command(world, "dpo", tmp_path / "one", max_steps=1)) == 0
    made = tmp_path / "one" / "reference.safetensors"
    capsys.readouterr()
    assert main(command(world, "dpo", tmp_path / "two", loss="kto", reference=made)) == 2
    said = capsys.readouterr().err
    assert "to other prompts, which --loss kto needs; leave out --reference" in said
    # A run's own file, as an older Whet has left it: there is no flag to leave out.
    words = command(world, "dpo", tmp_path / "kto", loss="kto", save_every=1, max_steps=1)
    assert main(words) == 0
    shutil.copy(made, tmp_path / "kto" / "reference.safetensors")
    assert main([*words, "--resume"]) == 2
    assert "needs; remove it, and they are computed again" in capsys.readouterr().err
    (tmp_path / "kto" / "reference.safetensors").unlink()
    assert main([*words, "--resume"]) == 0


@pytest.mark.parametrize(
    ("kind", "name", "value", "told"),
    [
        ("preferences", "margins", True, "is damaged or not a packed file (margins holds bool"),
        ("labels", "labels", np.nan, "labels must be 1 for each good reply and 0 for each bad"),
        ("labels", "labels", -1, "labels must be 1 for each good reply and 0 for each bad"),
        ("preferences", "margins", np.inf, "margins must be finite"),
    ],
)
def test_numbers_of_a_strangers_file_are_refused(world, tmp_path, capsys, kind, name, value, told):
    data = pairs_file(tmp_path / "data.h5", kind=kind, margins=True)
    with h5py.File(data, "r+") as file:
        numbers = file[name][...].astype(type(value))
        numbers[1] = value
        del file[name]
        file[name] = numbers
    assert main(command(world, "dpo", tmp_path / "run", loss="kto", data=data)) == 2
    said = capsys.readouterr().err
    assert f"{data}: {told}" in said
    assert said.count("\n") == 1


def test_the_ledger_and_the_replay_know_the_pairs(world, tmp_path, capsys):
    assert main(command(world, "dpo", tmp_path / "run", save_every=2)) == 0
    capsys.readouterr()
    assert main(["ledger", str(tmp_path / "run"), "--step", "2"]) == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any("data/a.jsonl:" in words[0] for words in said)
    assert {words[1] for words in said} == {"chosen", "rejected"}
    assert main(["ledger", str(tmp_path / "run"), "--document", said[0][0]]) == 0
    sides = {line.split()[2] for line in capsys.readouterr().out.splitlines()}
    assert sides == {"chosen", "rejected"}
    assert main(["replay", str(tmp_path / "run"), "--step", "5", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    step = next(x for x in metrics(tmp_path / "run") if x["step"] == 5 and "train_loss" in x)
    assert replayed["train_loss"] == step["train_loss"]
    labelled = PackedStore(world / "labels.h5", ["labels"])
    named = [place["side"] for place in labelled.places(np.arange(len(labelled.documents)))]
    assert named == ["good" if good else "bad" for good in labelled.values("labels", 1)]


@pytest.mark.parametrize(
    ("stage", "flags", "told"),
    [
        ("dpo", {"gamma": 1}, "--gamma: --loss dpo has no such margin"),
        ("dpo", {"loss": "ipo", "label_smoothing": 0.1}, "--label_smoothing: only dpo and simpo"),
        ("dpo", {"label_smoothing": 0.5}, "expected a number from 0 to below 0.5"),
        ("dpo", {"beta": 0}, "--beta 0.0: expected a number above 0"),
        ("reward", {"lora_rank": 2, "lora_4bit": True}, "a reward model is saved whole"),
        ("reward", {"margin": 1, "data": "dev.h5"}, "--margin 1: no pair of"),
    ],
)
def test_flags_that_do_nothing_are_refused(
    world, tmp_path, capsys, monkeypatch, stage, flags, told
):
    monkeypatch.chdir(world)
    assert main(command(world, stage, tmp_path / "run", **flags)) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_a_file_without_pairs_is_refused(world, tmp_path, capsys, stage):
    tiny.packed_file(tmp_path / "text.h5")
    assert main(command(world, stage, tmp_path / "run", data=tmp_path / "text.h5")) == 2
    assert "holds documents that stand alone" in capsys.readouterr().err


# The reward model


def rewards_alone(model, store: PackedStore) -> torch.Tensor:
    """(documents,) each run alone, read at its last token."""
    found = []
    for entry in store.documents:
        here = slice(entry["start"], entry["start"] + entry["length"])
        ids = torch.from_numpy(store.rows([entry["row"]]).tokens[:, here]).long()
        weight = torch.zeros(ids.shape)
        weight[0, -1] = 1
        found.append(model(ids, weight=weight)[0, -1])
    return torch.stack(found)


def test_a_reward_model_learns_and_opens_in_transformers(world, tmp_path):
    transformers = pytest.importorskip("transformers")
    pairs_file(tmp_path / "train.h5", n_rows=24, learnable=True)
    pairs_file(tmp_path / "dev.h5", n_rows=8, seed=1, learnable=True)
    data = {"data": tmp_path / "train.h5", "dev": tmp_path / "dev.h5"}
    for name, flags in (("run", {"lr": 1e-2}), ("lora", {"lr": 3e-2, "lora_rank": 4})):
        words = command(world, "reward", tmp_path / name, max_steps=60, **data, **flags)
        assert main(words) == 0
        lines = [line for line in metrics(tmp_path / name) if "dev_loss" in line]
        assert lines[0]["dev_loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert lines[-1]["dev_pair_accuracy"] > 0.9
        model = load_backbone_from_ckpt(tmp_path / name, score=True)
        store = PackedStore(tmp_path / "dev.h5", ("preferences",))
        with torch.no_grad():
            rewards = rewards_alone(model, store)
        loss = -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
        assert lines[-1]["dev_loss"] == pytest.approx(float(loss), rel=1e-4)
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / name
        ).eval()
        entry = store.documents[0]
        ids = torch.from_numpy(store.rows([0]).tokens[:, : entry["length"]]).long()
        with torch.no_grad():
            assert float(classifier(ids).logits) == pytest.approx(float(rewards[0]), abs=1e-5)


def test_a_reward_does_not_hang_on_what_stands_beside_it(world, tmp_path):
    """Packed with others, padded, and alone."""
    assert main(command(world, "reward", tmp_path / "run", lr=1e-2)) == 0
    model = load_backbone_from_ckpt(tmp_path / "run", score=True)
    store = PackedStore(world / "dev.h5", ("preferences",))
    with torch.no_grad():
        alone = rewards_alone(model, store)
        read = store.rows(range(len(store)))
        segments = torch.from_numpy(read.segment_ids).long()
        weight = torch.zeros(segments.shape)
        ends = [(d["row"], d["start"] + d["length"] - 1) for d in store.documents]
        rows, places = np.array(ends).T
        weight[rows, places] = 1
        packed = model(torch.from_numpy(read.tokens).long(), None, segments, weight=weight)
    torch.testing.assert_close(packed[rows, places], alone, atol=2e-6, rtol=0)


def test_the_margin_and_the_centre_are_in_the_loss(world, tmp_path):
    flags = {"margin": 2.0, "centre": 0.1, "max_steps": 1, "batch_size": 7, "epochs": 1}
    assert main(command(world, "reward", tmp_path / "run", **flags)) == 0
    margins = PackedStore(world / "train.h5", ("preferences",)).values("margins", 2)
    expected = -F.logsigmoid(-2.0 * torch.from_numpy(margins)).mean()
    assert metrics(tmp_path / "run")[1]["train_loss"] == pytest.approx(float(expected), rel=1e-6)
