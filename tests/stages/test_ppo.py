"""whet ppo: it learns its toy, and is exact: layouts, kills, what is saved."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch

from tests import tiny
from tests.processes import run_ranks, start, wait
from tests.stages.test_grpo import REWARDS, lines_of, rewards_of
from whet.chat.chat import load_tokenizer
from whet.cli import main
from whet.model.open import load_backbone_from_ckpt
from whet.rl.rollout_file import Rollout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    tiny.model_directory(folder / "base", max_positions=64)
    lines = [{"prompt": f"{a} plus {b}", "gold": 3} for a in tiny.WORDS[:4] for b in tiny.WORDS[:3]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "mine.py").write_text(REWARDS)
    return folder


def command(world, out, **flags):
    values = {"model": world / "base", "prompts": world / "prompts.jsonl", "out": out}
    values |= {"reward": f"{world / 'mine.py'}:vowels", "truncated": "score", "lr": 3e-3}
    values |= {"batch_size": 8, "max_new_tokens": 8, "precision": "float32", "group_size": 2}
    values |= {"cohort": 8, "micro_batch_size": 2, "samples": 1, "updates": 2, "critic_lr": 2}
    words = ["ppo", "--quiet"]
    for key, value in (values | flags).items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def test_it_learns_its_toy(world, tmp_path):
    out = tmp_path / "run"
    flags = {"epochs": 20, "batch_size": 12, "group_size": 4, "lr": 1e-2, "kl": 0}
    assert main(command(world, out, **flags)) == 0
    rewards = rewards_of(out)
    assert np.mean(rewards[-4:]) > 0.4 > 0.2 > np.mean(rewards[:2]), rewards
    values = [line["value"] for line in lines_of(out) if "value" in line]
    assert values[0] == 0.0
    assert values[-1] == pytest.approx(rewards[-1], abs=0.15), "the critic has learnt to expect"


def test_policy_and_critic_are_saved_each_as_a_model(world, tmp_path):
    out = tmp_path / "run"
    assert main(command(world, out, max_steps=2)) == 0
    policy = load_backbone_from_ckpt(out)
    critic = load_backbone_from_ckpt(out / "critic", score=True)
    assert not policy.config.score
    assert critic.config.score
    assert critic.score.weight.any()
    assert load_tokenizer(out).stop_ids
    assert main(command(world, tmp_path / "next", critic=out / "critic", max_steps=1)) == 0


def test_the_first_step_is_where_it_must_be(world, tmp_path):
    """The critic knows nothing yet, and the policy is its own reference."""
    out = tmp_path / "run"
    assert main(command(world, out, max_steps=1, keep_rollouts=9)) == 0
    line = lines_of(out)[0]
    assert line["value"] == 0.0
    assert line["kl"] == pytest.approx(0.0, abs=1e-5)
    assert line["mismatch"] < 1e-4
    rollout = Rollout(out / "rollouts" / "rollout_00000000.h5", 0)
    trained = rollout.store.rows(range(len(rollout.store))).loss_mask != 0
    advantages = rollout.places["token_advantages"][trained]
    assert advantages.mean() == pytest.approx(0.0, abs=1e-5)
    assert advantages.var() == pytest.approx(1.0, abs=1e-4)
    # With values of 0 and gamma 1 the last token's return is the reply's reward.
    for document, reward in zip(
        rollout.store.documents, rollout.store.values("rewards", 1), strict=True
    ):
        end = document["start"] + document["length"] - 1
        assert rollout.places["returns"][document["row"], end] == pytest.approx(reward, abs=1e-5)


def test_micro_batches_and_ranks_change_nothing(world, tmp_path):
    runs = {}
    for micro in (1, 3):
        out = tmp_path / str(micro)
        assert main(command(world, out, max_steps=4, micro_batch_size=micro)) == 0
        runs[micro] = lines_of(out)
    words = command(world, tmp_path / "ranks", max_steps=4)
    assert run_ranks([words], size=2, folder=tmp_path) == [0, 0]
    assert (tmp_path / "rank0.log").read_text() == "", "torch warns of nothing"
    runs["ranks"] = lines_of(tmp_path / "ranks")
    for other in (runs[3], runs["ranks"]):
        for a, b in zip(runs[1], other, strict=True):
            for name in ("train_loss", "grad_norm", "reward", "value_loss"):
                if name in a:
                    assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_killed_between_two_updates(world, tmp_path):
    flags = {"max_steps": 5, "save_every": 1, "updates": 2, "passes": 2}
    alone, killed, log = tmp_path / "alone", tmp_path / "killed", tmp_path / "log"
    assert main(command(world, alone, **flags)) == 0
    process = start([command(world, killed, **flags)], log=log)
    until = time.monotonic() + 120
    while not (killed / "state" / "step_00000003").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    words = command(world, killed, resume=True, **flags)
    assert wait([start([words], log=log)], [log], 120) == [0]
    for name in ("model.safetensors", "critic/model.safetensors", "metrics.jsonl", "ledger.bin"):
        assert (alone / name).read_bytes() == (killed / name).read_bytes(), name


def test_the_critics_gradient_does_not_touch_the_policy(world):
    from whet.model.embedding import add_score
    from whet.rl.critic import ActorCritic

    policy = load_backbone_from_ckpt(world / "base")
    critic = load_backbone_from_ckpt(world / "base")
    add_score(critic)
    torch.nn.init.normal_(critic.score.weight)
    both = ActorCritic(policy, critic)
    tokens = torch.randint(1, 200, (1, 9))
    weight = torch.ones(1, 9)
    _, values = both(tokens, targets=tokens, weight=weight, per_token=True)
    values.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())
    assert any(p.grad is not None and p.grad.any() for p in critic.parameters())


def test_a_critic_of_another_tokenizer(world, shared_data, tmp_path, capsys):
    flags = {"critic": shared_data / "models" / "stories260K"}
    assert main(command(world, tmp_path / "run", **flags)) == 2
    assert "has another tokenizer" in capsys.readouterr().err
