"""Evaluation during training: the breakdown against a plain loop, sample prompts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from whet.data.store import PackedStore
from whet.evaluate.dev import dev_loss, turns_of
from whet.model.open import load_backbone_from_ckpt
from whet.train.distributed import Ranks
from whet.train.evaluation import Evaluator, metrics_of, prompts_of
from whet.train.signals import Stop


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    model = load_backbone_from_ckpt(tiny.model_directory(folder / "base"))
    return model.eval(), PackedStore(tiny.packed_file(folder / "dev.h5", n_rows=5))


def plain(model, store, stop):
    """Every trained token: (source, turn, -ln p), and the probability of `stop` inside replies."""
    tokens, inside = [], []
    for document in store.documents:
        here = slice(document["start"], document["start"] + document["length"])
        read = store.rows([document["row"]])
        ids = torch.from_numpy(read.tokens[0, here]).long()
        mask = read.loss_mask[0, here][1:] != 0
        with torch.no_grad():
            logp = F.log_softmax(model(ids[None])[0, :-1].double(), dim=-1)
        turns = turns_of(mask[None], np.ones((1, len(mask)), int))[0]
        for t in np.flatnonzero(mask):
            target = int(ids[t + 1])
            tokens.append((int(document["source"]), int(turns[t]), -float(logp[t, target])))
            if target != stop:
                inside.append(float(logp[t, stop].exp()))
    return tokens, inside


def test_breakdown_equals_a_plain_loop(world):
    model, store = world
    found = metrics_of(dev_loss(model, store, stop_ids=(7,), micro_rows=2))
    tokens, inside = plain(model, store, 7)
    for source, name in enumerate(("a.jsonl", "b.jsonl")):
        expected = np.mean([loss for s, _, loss in tokens if s == source])
        assert found[f"dev_loss/source/{name}"] == pytest.approx(expected, rel=1e-5)
    for turn in (1, 2, 3):
        expected = np.mean([loss for _, t, loss in tokens if t == turn])
        assert found[f"dev_loss/turn/{turn}"] == pytest.approx(expected, rel=1e-5)
    every = np.mean([loss for _, _, loss in tokens])
    assert found["dev_loss/length/to_128"] == pytest.approx(every, rel=1e-5)
    assert found["dev_stop_inside"] == pytest.approx(np.mean(inside), rel=1e-5)


def test_turns():
    """Counted from 1 in each document; between two spans the number is the earlier one's."""
    trained = np.array([[0, 1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 0, 1, 1, 0]], bool)
    segments = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 3, 3, 0]])
    found = np.where(trained, turns_of(trained, segments), 0)
    assert found.tolist() == [[0, 1, 1, 0, 0, 2, 0, 3], [1, 0, 0, 1, 0, 1, 1, 0]]


def test_a_dev_file_is_gone_through_once(world):
    """Loss, its parts, and the stop token inside replies come from the same forward passes."""
    model, store = world
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    Evaluator(store, None, micro_rows=2, n_samples=0)(model, Ranks(), Stop(0.0))
    dev_loss(model, store, stop_ids=(7,), micro_rows=2)
    hook.remove()
    assert len(calls) == 2 * 3, "5 rows, two at a time, for each of the two"


def test_prompts_end_where_the_reply_begins(world):
    _, store = world
    pairs = prompts_of(store, 4)
    assert len(pairs) == 4
    for (prompt, expected), document in zip(pairs, store.documents, strict=False):
        read = store.rows([document["row"]])
        here = slice(document["start"], document["start"] + document["length"])
        ids = read.tokens[0, here].tolist()
        assert ids[: len(prompt)] == prompt
        assert ids[len(prompt) :][: len(expected)] == expected
        trained = read.loss_mask[0, here][len(prompt) :][: len(expected)]
        assert (trained != 0).all()
