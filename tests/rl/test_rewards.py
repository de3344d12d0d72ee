"""Rewards judge a reply alone; a function of the user's can neither hang nor crash the training."""

import os
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import tiny
from whet.errors import UserError
from whet.flags.grpo import Config
from whet.flags.policy import known_reward, named_twice, parse_reward
from whet.generate.engine import Reply
from whet.generate.opened import open_model
from whet.model.embedding import add_score
from whet.model.hf.checkpoint import save_model
from whet.rl.prompts import Prompt
from whet.rl.rewards import (
    Answer,
    Length,
    PythonReward,
    Reward,
    correct,
    in_form,
    open_rewards,
    reward_model,
    total_rewards,
)
from whet.rl.sampling import Sampler

PROMPT = Prompt([1, 2], [{"role": "user", "content": "2 + 3?"}], "5", {"level": "easy"}, 7)


def answer(text, tokens=3, stopped=True):
    return Answer(PROMPT, Reply(list(range(tokens)), [0.0] * tokens, stopped), text)


@pytest.mark.parametrize(
    ("text", "stopped", "right", "form"),
    [
        ("2 + 3 = 5\n#### 5", True, 1, 1),
        ("<answer>5</answer>", True, 1, 1),
        ("It is 5.", True, 1, 0),
        ("#### 5", False, 1, 0),
        ("#### 4", True, 0, 0),
        ("<answer>4</answer> or <answer>5</answer>", True, 1, 0),
        ("<think>5</think>", True, 0, 0),
        ("<think>it may be 5", True, 0, 0),
        ("", True, 0, 0),
    ],
)
def test_right_and_in_form(text, stopped, right, form):
    given = [answer(text, stopped=stopped)]
    assert correct(given) == [right]
    assert in_form(given) == [form]


def test_length_punishes_the_last_quarter():
    given = [answer("", tokens=n) for n in (0, 75, 80, 100, 200)]
    assert Length(100)(given) == pytest.approx([0, 0, -0.2, -1, -1])


def test_a_sum_of_several_with_weights():
    rewards = [Reward("correct", 1.0, correct), Reward("format", 0.5, in_form)]
    sums, parts = total_rewards(rewards, [answer("#### 5"), answer("5"), answer("4")])
    assert sums == [1.5, 1.0, 0.0]
    assert parts == {"correct": [1, 1, 0], "format": [1, 0, 0]}


def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="--reward bad: gave nan for a reply to line 7"):
        total_rewards([Reward("bad", 1.0, lambda given: [float("nan")])], [answer("5")])


def test_flags_are_read_and_refused_together(tmp_path):
    assert parse_reward("format=0.2") == ("format", 0.2)
    assert parse_reward("a.py:score") == ("a.py:score", 1.0)
    (tmp_path / "a.py").touch()
    assert known_reward("correct") == known_reward(f"{tmp_path}/a.py:f=2") == ""
    for text in ("format=x", "corect", "no.py:f", "=2"):
        assert known_reward(text), text


FUNCTIONS = """
import sys, time
print("imported")

def words(completions, level, **others):
    print("judging", file=sys.stdout)
    assert set(others) == {"prompts", "gold", "stopped"}
    assert level == ["easy"] * len(completions)
    return [len(text.split()) for text in completions]

def alone(completions):
    return [0.5 for _ in completions]

def raises(completions):
    raise ValueError("no good")

def hangs(completions):
    time.sleep(60)

def ends(completions):
    sys.stdout.flush()
    import os; os._exit(3)

def forks(completions):
    import os
    os.fork()
    return [1.5 for _ in completions]

def asks(completions):
    return [float(len(sys.stdin.read()) + len(completions)) for _ in completions]

def gives(completions, what):
    return eval(what[0])

async def waits(completions):
    import asyncio
    loops.add(asyncio.get_running_loop())
    await asyncio.sleep(0)
    return [float(len(loops)) for _ in completions]

async def fails(completions):
    raise ValueError("no good")

loops = set()
"""


@pytest.fixture
def functions(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    with ExitStack() as stack:
        yield lambda name, seconds=20.0: stack.enter_context(
            closing(PythonReward(f"{os.path.relpath(file)}:{name}", seconds))
        )


def test_a_function_of_the_users(functions):
    given = [answer("one two"), answer("three")]
    words = functions("words")
    assert words(given) == [2.0, 1.0]
    assert words(given[:1]) == [2.0]
    assert functions("alone")(given) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", r"ValueError: no good \(.*mine.py:15\)"),
        ("ends", r"its process ended \(exit code 3\)"),
    ],
)
def test_a_function_that_fails_is_one_line(functions, name, words):
    with pytest.raises(UserError, match=words) as error:
        functions(name)([answer("5")])
    assert "\n" not in str(error.value)


def test_an_async_function_is_awaited_in_one_loop(functions, capfd):
    waits = functions("waits")
    assert waits([answer("5"), answer("6")]) == [1.0, 1.0]
    assert waits([answer("5")]) == [1.0]
    with pytest.raises(UserError, match=r"ValueError: no good \(.*mine.py:\d+\)"):
        functions("fails")([answer("5")])
    assert "Warning" not in capfd.readouterr().err


def test_a_cut_reply_loses_the_penalty_on_held_out_prompts_as_in_training():
    """Else the best model of a run would be chosen by another number than it is trained on."""
    given = [answer("one two"), answer("three", stopped=False)]
    words = [Reward("words", 2.0, lambda answers: [float(len(a.text.split())) for a in answers])]
    for truncated, expected in (("penalty", [4.0, 1.0]), ("score", [4.0, 2.0])):
        config = Config(model="m", prompts="p", out=Path("o"), group_size=2, truncated=truncated)
        sampler = Sampler(None, config, words, None)
        held_out = sampler._numbers(given)
        assert [numbers["dev_reward"] for numbers in held_out] == expected
        assert [numbers["dev_reward/words"] for numbers in held_out] == [2.0, 1.0]
        assert sampler._rewarded(given)[0] == expected


def test_what_is_no_list_of_numbers_is_refused(functions):
    gives = functions("gives")

    def judged(what):
        return gives([replace(answer("5"), prompt=replace(PROMPT, columns={"what": what}))])

    assert judged("(x for x in [True])") == [1.0]
    for what, shown in (
        ("[]", r"\[\]"),
        ("[1, 2]", r"\[1, 2\]"),
        ("0.5", r"0\.5"),
        ("'1'", "'1'"),
        ("['1']", r"\['1'\]"),
        ("{0: 1}", "{0: 1}"),
        ("[None]", r"\[None\]"),
    ):
        told = f"TypeError: returned {shown}; expected a number for each of the 1 replies"
        with pytest.raises(UserError, match=told):
            judged(what)


def test_a_function_shares_nothing_with_the_training(functions, tmp_path):
    """A fork that returns, too, answers once; stdin is empty; what stands beside is imported."""
    forks = functions("forks")
    assert [forks([answer("5")] * n) for n in (1, 2, 1)] == [[1.5], [1.5] * 2, [1.5]]
    assert functions("asks")([answer("5")]) == [1.0]
    (tmp_path / "helper.py").write_text("def f(completions): return [len(completions)] * 64")
    (tmp_path / "with.py").write_text(
        "import helper\ndef f(completions): return helper.f(completions)[:len(completions)]"
    )
    with closing(PythonReward(f"{tmp_path}/with.py:f", 20.0)) as beside:
        assert beside([answer("5")] * 100) == [64.0] * 64 + [36.0] * 36


def test_rewards_of_one_name_are_told_apart(tmp_path):
    """Each counts with its own weight, and is logged under a name of its own."""
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(f"def f(completions): return [{ord(name)}.0]")
    texts = [f"{tmp_path}/a.py:f=2", f"{tmp_path}/b.py:f", "length"]
    with ExitStack() as stack:
        device = torch.device("cpu")
        rewards = open_rewards(texts, None, stack, max_new_tokens=9, seconds=20.0, device=device)
        sums, parts = total_rewards(rewards, [answer("5")])
    assert sums == [2 * 97.0 + 98.0]
    assert parts == {f"{tmp_path}/a.py:f": [97.0], f"{tmp_path}/b.py:f": [98.0], "length": [0.0]}
    assert "is named more than once" in named_twice(["correct", "correct=2", "length"])[0]


def test_a_function_that_hangs_is_ended(functions):
    slow = functions("hangs", 5.0)
    slow.seconds = 0.2
    with pytest.raises(UserError, match=r"took longer than 0\.2 s to judge 1 replies"):
        slow([answer("5")])


def test_a_function_that_is_not_there(functions):
    with pytest.raises(UserError, match=r"mine\.py has no function nothing"):
        functions("nothing")


def test_a_file_that_does_not_import(tmp_path):
    (tmp_path / "broken.py").write_text("1 +")
    with pytest.raises(UserError, match="SyntaxError"):
        PythonReward(f"{tmp_path}/broken.py:f", 20.0)


def test_a_reward_model_reads_the_last_token(tmp_path):
    tiny.model_directory(tmp_path / "policy")
    model, chat = open_model(tmp_path / "policy", device="cpu")
    with pytest.raises(UserError, match="is no reward model"):
        reward_model(str(tmp_path / "policy"), chat, torch.device("cpu"), "float32")
    add_score(model)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "reward", chat, {"stage": "reward"})
    score = reward_model(str(tmp_path / "reward"), chat, torch.device("cpu"), "float32")
    given = [answer("", tokens=n) for n in (3, 5, 1)]
    together, alone = score(given), [score([each])[0] for each in given]
    assert together == pytest.approx(alone, abs=1e-5)
    tokens = torch.tensor([[*PROMPT.ids, 0, 1, 2]])
    weight = torch.zeros(tokens.shape)
    weight[0, -1] = 1.0
    assert together[0] == pytest.approx(model(tokens, weight=weight)[0, -1].item(), abs=1e-5)
