"""whet grpo: it learns from rewards, and is exact like every stage: layouts, kills, refusals."""

import json
import os
import shutil
import signal
import sys
import time

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.processes import CONTEXT, free_port, run_ranks, start, start_server, wait
from tests.train.test_distributed import become_a_rank
from whet.cli import main
from whet.data.store import PackedStore
from whet.generate import rows
from whet.rl.rollout_file import Rollout
from whet.stages import grpo, ppo
from whet.train import state as states
from whet.train.distributed import Ranks
from whet.train.signals import Stop

REWARDS = """
import time

def vowels(completions):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]

def seldom(completions):
    return [float(text.count("e") > 1) for text in completions]

def distinct(completions):
    return [float(i) for i, _ in enumerate(completions)]

def equal(completions):
    return [0.3 for _ in completions]

def later(completions, calls=[]):
    calls.append(1)
    if len(calls) > 3:
        raise ValueError("enough")
    return [float(len(text) % 3) for text in completions]

def on_one_rank(completions, calls=[]):
    # In evaluations alone: the rollouts of these tests are judged by rank 0.
    import os
    import pathlib

    calls.append(1)
    how = pathlib.Path(__file__).with_name("how")
    if os.environ.get("RANK") == "1" and len(calls) == 2 and how.exists():
        if how.read_text() == "raises":
            raise ValueError("enough")
        if how.read_text() == "dies":
            os._exit(3)
        if how.read_text() == "hangs":
            time.sleep(60)
        return [float("nan")] * len(completions)
    return [float(len(text) % 3) for text in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    tiny.model_directory(folder / "base", max_positions=64)
    lines = [{"prompt": f"{a} plus {b}", "gold": 3} for a in tiny.WORDS[:4] for b in tiny.WORDS[:3]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "mine.py").write_text(REWARDS)
    return folder


def command(world, out, reward="vowels", **flags):
    values = {"model": world / "base", "prompts": world / "prompts.jsonl", "out": out}
    values |= {"reward": f"{world / 'mine.py'}:{reward}", "truncated": "score", "lr": 3e-3}
    values |= {"group_size": 3, "batch_size": 5, "max_new_tokens": 8, "precision": "float32"}
    values |= {"cohort": 8, "micro_batch_size": 2, "samples": 1}
    words = ["grpo", "--quiet"]
    for key, value in (values | flags).items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def lines_of(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def rewards_of(out):
    return [line["reward"] for line in lines_of(out) if "reward" in line]


def test_it_learns_what_is_rewarded(world, tmp_path):
    flags = {"epochs": 25, "batch_size": 12, "group_size": 4, "lr": 1e-2}
    flags["dev"] = world / "prompts.jsonl"
    assert main(command(world, tmp_path / "run", **flags)) == 0
    rewards = rewards_of(tmp_path / "run")
    assert np.mean(rewards[:4]) < 0.15
    assert np.mean(rewards[-4:]) > 0.4, rewards
    last = [line for line in lines_of(tmp_path / "run") if "dev_reward" in line][-1]
    assert last["dev_reward"] > 0.4
    lineage = json.loads((tmp_path / "run" / "whet.json").read_text())
    assert lineage["stage"] == "grpo"


def test_a_rollout_holds_what_was_sampled(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(world, out, max_steps=1, keep_rollouts=9)) == 0
    rollout = Rollout(out / "rollouts" / "rollout_00000000.h5", 0)
    store = PackedStore(rollout.store.path, kinds=("rollout",))
    assert len(store.documents) == 5 * 3
    line = lines_of(out)[0]
    assert store.values("rewards", 1).mean() == pytest.approx(line["reward"])
    assert line["mismatch"] < 1e-4, "the sampler's log-probabilities are the trainer's"
    advantages = store.values("advantages", 1)
    for number in set(store.documents["line"]):
        assert advantages[store.documents["line"] == number].sum() == pytest.approx(0, abs=1e-5)
    assert rollout.totals == [store.documents["trained"].sum()]
    shutil.copy(rollout.store.path, tmp_path / "no.h5")
    with h5py.File(tmp_path / "no.h5", "r+") as file:
        del file.attrs["places"]
    assert main(["inspect", str(tmp_path / "no.h5")]) == 2
    assert "a rollout without places" in capsys.readouterr().err
    assert main(["inspect", str(rollout.store.path)]) == 0
    assert f"tokenizer {world / 'base'}" in " ".join(capsys.readouterr().out.split())
    assert main(["ledger", str(out), "--step", "1"]) == 0
    assert (
        main(["ledger", str(out), "--document", f"prompts.jsonl:{store.documents['line'][0]}"]) == 0
    )


def test_equal_rewards_change_nothing(world, tmp_path):
    out = tmp_path / "run"
    assert main(command(world, out, "equal", max_steps=2, weight_decay=0.1)) == 0
    assert [line["grad_norm"] for line in lines_of(out) if "grad_norm" in line] == [0.0, 0.0]
    assert lines_of(out)[0]["informative"] == 0.0
    before = load_file(world / "base" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("flags", [{}, {"updates": 2, "loss": "gspo", "kl": 0.1}])
def test_micro_batches_change_nothing(world, tmp_path, flags):
    runs = {}
    for micro in (1, 3):
        out = tmp_path / str(micro)
        assert main(command(world, out, max_steps=4, micro_batch_size=micro, **flags)) == 0
        runs[micro] = lines_of(out)
    for one, other in zip(runs[1], runs[3], strict=True):
        for name in ("train_loss", "grad_norm", "reward", "mismatch", "kl", "clipped"):
            if name in one or name in other:
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_two_ranks_sample_and_train_the_same(world, tmp_path):
    assert main(command(world, tmp_path / "one", max_steps=3, keep_rollouts=9)) == 0
    words = command(world, tmp_path / "two", max_steps=3, keep_rollouts=9)
    assert run_ranks([words], size=2, folder=tmp_path) == [0, 0]
    first = [f"rollouts/rollout_{n:08d}.h5" for n in range(1)]
    for name in first:  # with the same weights; later ones differ by rounding
        one, two = ((tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert one == two
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert a["reward"] == pytest.approx(b["reward"])
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3, abs=1e-6)


def save_late(rank, port, words, log):
    """Be a rank; the saves of rank 1 begin late, while its rollouts go on."""
    become_a_rank(rank, port, log)
    saved = states.save_state
    states.save_state = lambda *args: [time.sleep(0.4 * rank), saved(*args)][1]
    sys.exit(main(words))


def test_a_rollout_and_a_save_at_the_same_time(world, tmp_path):
    """Ranks agree on both, each in its own thread: neither hears what the other says."""
    start_server()
    words = command(world, tmp_path / "run", save_every=1, keep=9)
    port, logs = free_port(), [tmp_path / f"rank{rank}.log" for rank in range(2)]
    ranks = [CONTEXT.Process(target=save_late, args=(r, port, words, logs[r])) for r in range(2)]
    for process in ranks:
        process.start()
    assert wait(ranks, logs, 60) == [0, 0]
    found = states.saved_states(tmp_path / "run" / "state")
    assert len(found) == 3
    assert not any(states.damage(path) for path in found)


def test_killed_between_two_updates_of_a_rollout(world, tmp_path):
    flags = {"updates": 2, "max_steps": 7, "save_every": 1, "eval_every": 3}
    flags["dev"] = world / "prompts.jsonl"
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
    for name in ("model.safetensors", "metrics.jsonl", "ledger.bin", "samples.jsonl"):
        assert (alone / name).read_bytes() == (killed / name).read_bytes(), name


def test_an_older_state_makes_its_rollouts_again(world, tmp_path, capsys):
    """The newest state is damaged, newer rollouts are there; and `whet replay` changes nothing."""
    flags = {"max_steps": 7, "save_every": 3, "keep": 9, "epochs": 9}
    out = tmp_path / "run"
    assert main(command(world, out, **flags)) == 0
    before = {path.name: path.read_bytes() for path in (out / "rollouts").iterdir()}
    capsys.readouterr()
    assert main(["replay", str(out), "--step", "2", "--json"]) == 0
    loss = json.loads(capsys.readouterr().out)["train_loss"]
    assert loss == lines_of(out)[1]["train_loss"]
    assert {path.name: path.read_bytes() for path in (out / "rollouts").iterdir()} == before
    whole = (out / "metrics.jsonl").read_bytes()
    for step in (6, 7):
        state = out / "state" / f"step_{step:08d}"
        next(state.glob("*.safetensors")).write_bytes(b"damaged")
    assert main(command(world, out, resume=True, **flags)) == 0
    assert (out / "metrics.jsonl").read_bytes() == whole


def test_a_damaged_rollout_says_how_to_go_on(world, tmp_path, capsys):
    out, flags = tmp_path / "run", {"updates": 2, "epochs": 9}
    assert main(command(world, out, max_steps=1, **flags)) == 0
    (out / "rollouts" / "rollout_00000000.h5").write_bytes(b"damaged")
    words = command(world, out, max_steps=2, resume=True, **flags)
    assert main(words) == 2
    assert "remove the states after step 0 from" in capsys.readouterr().err
    for state in (out / "state").iterdir():
        shutil.rmtree(state)
    assert main(words) == 0


@pytest.mark.parametrize("module", [grpo, ppo])
def test_a_short_rollout_has_updates_that_train_nothing(world, tmp_path, module):
    """12 prompts in rollouts of 5: the last one has 2 for its 4 updates."""
    words = command(world, tmp_path / "run", "distinct", updates=4)
    assert main([module.__name__.rpartition(".")[2], *words[1:]]) == 0
    steps = [line["trained_tokens"] > 0 for line in lines_of(tmp_path / "run")]
    assert steps == [True] * 10 + [False] * 2


@pytest.mark.parametrize("module", [grpo, ppo])
def test_what_auto_measures_is_the_longest_rollout(world, tmp_path, module):
    """All replies as long as they may be; nothing is written."""
    settings = module.Config(
        model=str(world / "base"), prompts=world / "prompts.jsonl", out=tmp_path / "run",
        reward=("length",), group_size=3, batch_size=5, max_new_tokens=8, updates=2,
        micro_batch_size=1, overfit_rows=5, precision="float32", quiet=True,
    )  # fmt: skip
    stage = module.build(settings, Ranks())
    steps = stage.dry_steps(stage.model)
    trained = [sum(int((b.weight != 0).sum()) for b in micros) for micros in steps]
    assert trained == [3 * 3 * 8, 2 * 3 * 8]
    assert len(stage.documents) == 5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [grpo, ppo])
def test_what_auto_measures_holds_the_cache_of_the_longest_replies(
    world, tmp_path, monkeypatch, module
):
    """Of a cohort, and of an evaluation: as much as any rollout of the run."""
    held = []

    class Watched(rows.Cache):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            held.append(sizes)

    monkeypatch.setattr(rows, "Cache", Watched)
    settings = module.Config(
        model=str(world / "base"), prompts=world / "prompts.jsonl", out=tmp_path / "run",
        reward=("length",), group_size=3, batch_size=5, max_new_tokens=8, updates=1, cohort=6,
        micro_batch_size=1, precision="float32", quiet=True, dev=world / "prompts.jsonl",
    )  # fmt: skip
    stage = module.build(settings, Ranks())
    stage.dry_rollout(stage.model)
    dry, held[:] = [*held], []
    for step in range(3):
        stage.before_step(step, stage.model, Ranks(), Stop(0.0))
    assert dry[0] == (6, max(slots for _, slots in held))
    stage.evaluate(stage.model, Ranks(), Stop(0.0))
    assert dry[1] == held[-1]
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_a_reward_that_fails_later_loses_nothing(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(world, out, "later", cohort=64, epochs=3)) == 2
    assert "enough" in capsys.readouterr().err
    assert (out / "state" / "step_00000003").is_dir()


def test_a_reward_that_fails_in_an_evaluation_loses_nothing(world, tmp_path, capsys):
    """Its fourth call, after those of an evaluation and two steps."""
    flags = {"cohort": 64, "epochs": 3, "dev": world / "prompts.jsonl", "eval_every": 2}
    assert main(command(world, tmp_path / "run", "later", **flags)) == 2
    assert "enough" in capsys.readouterr().err
    assert (tmp_path / "run" / "state" / "step_00000002").is_dir()
    assert len(lines_of(tmp_path / "run", "timing.jsonl")) == 2


SAID = {"raises": "enough", "nan": "gave nan", "hangs": "took longer than 1", "dies": "ended (exit"}


@pytest.mark.parametrize(
    "how",
    ["raises", *(pytest.param(how, marks=pytest.mark.slow) for how in ("nan", "hangs", "dies"))],
)
def test_a_reward_that_fails_in_an_evaluation_of_one_rank_loses_nothing(world, tmp_path, how):
    """Its second call on rank 1, after two steps: all ranks save, leave, and can go on."""
    flags = {"cohort": 64, "max_steps": 3, "epochs": 3, "eval_every": 2, "reward_seconds": 1}
    words = command(world, tmp_path / "run", "on_one_rank", dev=world / "prompts.jsonl", **flags)
    (world / "how").write_text(how)
    assert run_ranks([words], size=2, folder=tmp_path) == [2, 2]
    (world / "how").unlink()
    errors = [(tmp_path / f"rank{rank}.log").read_text().count("error: ") for rank in range(2)]
    assert errors == [1, 0], "one line, not one of each rank"
    assert SAID[how] in (tmp_path / "rank0.log").read_text()
    assert (tmp_path / "run" / "state" / "step_00000002").is_dir()
    assert run_ranks([[*words, "--resume"]], size=2, folder=tmp_path) == [0, 0]
    assert [line["step"] for line in lines_of(tmp_path / "run", "timing.jsonl")] == [1, 2, 3]


def test_refill_draws_until_groups_say_something(world, tmp_path):
    flags = {"reward": "seldom", "max_steps": 1, "group_size": 2}
    assert main(command(world, tmp_path / "a", **flags)) == 0
    assert main(command(world, tmp_path / "b", refill=True, **flags)) == 0
    plain, refilled = (lines_of(tmp_path / name)[0] for name in "ab")
    assert plain["informative"] < 1.0
    assert refilled["informative"] > plain["informative"]
    assert refilled["prompts_asked"] > plain["prompts_asked"]


def test_masked_replies_are_in_neither_sum(world, tmp_path):
    out = tmp_path / "run"
    assert main(command(world, out, max_steps=1, truncated="mask", max_new_tokens=3)) == 0
    path = out / "rollouts" / "rollout_00000000.h5"
    rollout = Rollout(path, 0)
    trained = rollout.store.documents["trained"]
    assert (trained == 0).sum() > 0
    assert rollout.totals == [trained.sum()]


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_rollout_whose_replies_are_all_masked_trains_nothing(world, tmp_path, stage):
    flags = {"max_steps": 2, "truncated": "mask", "max_new_tokens": 1, "updates": 2}
    assert main([stage, *command(world, tmp_path / "run", **flags)[1:]]) == 0
    for line in lines_of(tmp_path / "run"):
        assert line.get("truncated", 1) == 1
        assert line["trained_tokens"] == line["train_loss"] == line["grad_norm"] == 0
        assert "NaN" not in json.dumps(line)


def test_a_lower_bound_that_bounds_nothing_is_refused(world, tmp_path, capsys):
    flags = {"loss": "cispo", "clip_low": 0.1, "updates": 2}
    assert main(command(world, tmp_path / "run", **flags)) == 2
    assert "--clip_low: --loss cispo has no lower bound" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_the_divergence_is_from_where_training_begins(world, tmp_path, stage):
    """Also of an adapter that is trained further: its base is another model."""
    flags = {"lora_rank": 2, "lr": 0.1, "max_steps": 2, "epochs": 9}
    assert main(command(world, tmp_path / "first", **flags)) == 0
    for name in ("base", "first"):
        model = {"model": world / "base", **flags} if name == "base" else {"model": tmp_path / name}
        more = {"kl": 0.1, "updates": 1, **model, "max_steps": 1}
        assert main([stage, *command(world, tmp_path / f"from_{name}", **more)[1:]]) == 0
        assert abs(lines_of(tmp_path / f"from_{name}")[0]["kl"]) < 1e-6, name


def test_what_does_not_fit_is_told_at_once(world, tmp_path, capsys):
    flags = {"prompts": tmp_path / "none.jsonl", "group_size": 1, "temperature": 0, "kl": -1}
    assert main(command(world, tmp_path / "run", **flags)) == 2
    said = capsys.readouterr().err
    for name in ("--prompts", "--group_size", "--temperature", "--kl"):
        assert name in said, name
    assert not (tmp_path / "run").exists()
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "gold": 2}\n')
    words = command(world, tmp_path / "run", prompts=tmp_path / "p.jsonl")
    words[words.index("--reward") + 1] = "correct"
    assert main(words) == 2
    assert "the reward correct needs a gold number" in capsys.readouterr().err
