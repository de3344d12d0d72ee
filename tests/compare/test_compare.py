"""whet compare: the numbers, the differences between neighbours, and the page."""

import json

import pytest
import torch

from tests import tiny
from tests.pairs import pairs_file
from whet.cli import main
from whet.compare.measure import Measured, measure
from whet.compare.table import as_text, rows_of
from whet.data.store import PackedStore
from whet.flags.compare import Config
from whet.generate.opened import Opened, open_model
from whet.model.embedding import add_score


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    tiny.model_directory(folder / "a" / "sft", seed=1, max_positions=64)
    tiny.model_directory(folder / "b" / "sft", seed=2, max_positions=64)
    lines = [{"question": f"{word}?", "answer": "#### 3"} for word in tiny.WORDS[:5]]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiny.packed_file(folder / "dev.h5", n_rows=3)
    return folder


def test_the_table(world, tmp_path, capsys):
    one, other = world / "a" / "sft", world / "b" / "sft"
    words = ["compare", one, one, other, "--gsm8k", world / "test.jsonl", "--samples", 3]
    words += ["--dev", world / "dev.h5", "--reward", "length=2", "correct", "--max_new_tokens", 6]
    words += ["--json", tmp_path / "out.json", "--html", tmp_path / "page.html"]
    assert main(list(map(str, words))) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    first, same, third = content["models"]
    assert (same["gained"], same["lost"], same["p"]) == (0, 0, 1.0)
    assert first["dev_loss"] == same["dev_loss"] != third["dev_loss"]
    assert first["kl_to_first"] == 0.0
    assert same["kl_to_first"] == pytest.approx(0.0, abs=1e-4), "the same model"
    assert third["kl_to_first"] > 0.01
    assert {"accuracy_low", "pass@1", "pass@2", "pass@3", "reward/length"} <= third.keys()
    assert len(content["replies"][0]["replies"]) == 5
    assert (first["model"], third["model"]) == ("a/sft", "b/sft"), "one name, told apart"
    text = capsys.readouterr().out
    assert "| pass@3 |" in text
    page = (tmp_path / "page.html").read_text()
    assert "default-src 'none'" in page
    assert "{{" not in page


def test_differences_are_between_neighbours():
    pairs = {"pair_accuracy": 0.9, "pair_accuracy_low": 0.8, "pair_accuracy_high": 1}
    measured = [
        Measured("base", {"accuracy": 0.5}, [True, False, True, False]),
        Measured("reward", pairs),
        Measured("sft", {"accuracy": 0.75}, [False, True, True, True]),
    ]
    rows = rows_of(measured)
    assert "gained" not in rows[1]
    assert (rows[2]["gained"], rows[2]["lost"], rows[2]["p"]) == (2, 1, 1.0)
    assert "90.0% (80.0% to 100.0%)" in as_text(rows)


def test_what_is_missing_is_told_at_once(world, capsys):
    assert main(["compare", str(world / "none"), "--samples", "2"]) == 2
    said = capsys.readouterr().err
    assert "none" in said
    assert "--samples: does nothing without --gsm8k" in said
    assert "nothing to compare" in said


def test_a_pt_file_has_no_tokenizer_to_ask_with(world, tmp_path, capsys):
    (tmp_path / "x.pt").touch()
    words = ["compare", tmp_path / "x.pt", "--gsm8k", world / "test.jsonl"]
    assert main(list(map(str, words))) == 2
    assert f"whet export {tmp_path / 'x.pt'} --tokenizer DIR" in capsys.readouterr().err


@pytest.mark.parametrize("score", [False, True])
def test_pairs_are_judged_as_each_reply_alone(tmp_path, score):
    """Packed or alone: the score at the last token, or ln p a token of the reply."""
    tiny.model_directory(tmp_path / "base", max_positions=64)
    model, chat = open_model(tmp_path / "base", device="cpu", precision="float32")
    if score:
        add_score(model)
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    store = PackedStore(pairs_file(tmp_path / "pairs.h5"), kinds=("preferences",))
    values = []
    for document in store.documents:
        rows = store.rows([document["row"]])
        here = slice(document["start"], document["start"] + document["length"])
        tokens = torch.from_numpy(rows.tokens[:, here]).long()
        weight = torch.zeros(tokens.shape)
        if score:
            weight[0, -1] = 1.0
            values.append(model(tokens, weight=weight).sum().item())
            continue
        weight[0, :-1] = torch.from_numpy(rows.loss_mask[0, here][1:])
        found = model(tokens, targets=tokens.roll(-1, 1), weight=weight)
        values.append(-found.nll.sum().item() / weight.sum().item())
    right = [chosen > rejected for chosen, rejected in zip(values[::2], values[1::2], strict=True)]
    assert 0 < sum(right) < len(right)
    config = Config(models=("base",), pairs=tmp_path / "pairs.h5", precision="float32")
    numbers = measure("base", Opened(model, chat), None, config).numbers
    assert numbers["pairs"] == len(right)
    assert numbers["pair_accuracy"] == pytest.approx(sum(right) / len(right))
