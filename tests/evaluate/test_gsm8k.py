import json
from collections.abc import Callable

import numpy as np
import pytest

from whet.errors import UserError
from whet.evaluate import gsm8k
from whet.evaluate.gsm8k import Problem, gsm8k_accuracy, load_gsm8k, write_samples

PROBLEMS = [Problem(f"How many eggs are {i} eggs?", str(i), line=i + 1) for i in range(23)]


def replying(monkeypatch, chat, reply: Callable[[int], str], stop: bool = True) -> None:
    """Lets the model answer the problem about i eggs with `reply(i)`."""

    def generate(model, prompts, *, max_new_tokens, stop_ids, batch_size, progress):
        texts = [chat.tokenizer.decode(prompt) for prompt in prompts]
        numbers = [int(text.split(" eggs?")[0].split()[-1]) for text in texts]
        end = [stop_ids[0]] if stop else []
        return [chat.tokenizer.encode(reply(i)) + end for i in numbers]

    monkeypatch.setattr(gsm8k, "generate", generate)


RIGHT = {
    "tag": lambda i: f"<think>{i} - 0 = {i + 5}</think><answer>{i}</answer>",
    "mark": lambda i: f"It is {i}.\n#### {i}",
    "sentence": lambda i: f"That makes ${i}.00.",
}
WRONG = {
    "off by one": lambda i: f"<answer>{i + 1}</answer>",
    "right in its thoughts only": lambda i: f"<think>{i}</think><answer>{i + 3}</answer>",
    "negative": lambda i: f"#### -{i + 1}",
    "silent": lambda i: "",
    "talks": lambda i: "She sells eggs.",
}


@pytest.mark.parametrize("reply", RIGHT.values(), ids=RIGHT)
def test_right_answers_score_all(monkeypatch, model, chat, reply) -> None:
    replying(monkeypatch, chat, reply)
    found = gsm8k_accuracy(model, chat, PROBLEMS, quiet=True)
    assert (found.accuracy, found.correct, found.n) == (1.0, 23, 23)
    assert (found.high, found.unanswered, found.unstopped) == (1.0, 0, 0)
    assert found.low == pytest.approx(0.8569, abs=1e-4)  # 23 / (23 + 1.96^2)


@pytest.mark.parametrize("reply", WRONG.values(), ids=WRONG)
def test_wrong_answers_score_nothing(monkeypatch, model, chat, reply) -> None:
    replying(monkeypatch, chat, reply)
    found = gsm8k_accuracy(model, chat, PROBLEMS, quiet=True)
    assert (found.accuracy, found.low, found.correct, found.n) == (0.0, 0.0, 0, 23)


def test_samples_tell_what_was_said(monkeypatch, model, chat, tmp_path) -> None:
    replying(monkeypatch, chat, lambda i: f"<answer>{min(i, 20)}</answer>", stop=False)
    found = gsm8k_accuracy(model, chat, PROBLEMS, quiet=True)
    assert (found.correct, found.unstopped) == (21, 23)
    write_samples(found.samples, tmp_path / "samples.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines[22] == {
        "line": 23,
        "question": "How many eggs are 22 eggs?",
        "reply": "<answer>20</answer>",
        "extracted": "20",
        "gold": "22",
        "right": False,
        "stopped": False,
    }
    assert sum(line["right"] for line in lines) == 21


@pytest.mark.parametrize("world_size", [2, 5, 40])
def test_distributed_share_the_problems(monkeypatch, model, chat, world_size) -> None:
    replying(monkeypatch, chat, lambda i: f"{i % 4 and i}")
    alone = gsm8k_accuracy(model, chat, PROBLEMS, quiet=True)
    counts = []

    def reduce(mine):
        counts.append(mine)
        return np.sum(counts, axis=0)

    for rank in range(world_size):
        together = gsm8k_accuracy(
            model, chat, PROBLEMS, rank=rank, world_size=world_size, reduce=reduce, quiet=True
        )
    assert (together.correct, together.n) == (alone.correct, alone.n)
    assert (together.low, together.high) == (alone.low, alone.high)


def test_a_question_longer_than_the_model_counts_as_wrong(model, chat) -> None:
    """And the model really answers the other one."""
    problems = [Problem("eggs? " * 100, "1"), Problem("How many eggs?", "1")]
    found = gsm8k_accuracy(model, chat, problems, max_new_tokens=8, quiet=True)
    assert found.n == 2
    assert found.samples[0].reply == ""
    assert not found.samples[0].right
    assert found.samples[1].reply != ""


def test_a_prompt_that_begins_the_thinking(monkeypatch, model, chat) -> None:
    """Some templates write <think> for the model: what it says before </think> is no answer."""
    opened = [*chat.tokenizer.encode("0 eggs? "), *chat.tokenizer.encode("Assistant:\n<think>\n")]
    monkeypatch.setattr(gsm8k, "encode_prompt", lambda *_: opened)
    for reply, right in [("0", 0), ("7</think> It is 0", 1)]:
        replying(monkeypatch, chat, lambda _, reply=reply: reply)
        assert gsm8k_accuracy(model, chat, PROBLEMS[:1], quiet=True).correct == right


def test_nothing_to_answer(model, chat) -> None:
    found = gsm8k_accuracy(model, chat, [], quiet=True)
    assert (found.accuracy, found.low, found.high, found.n) == (0.0, 0.0, 1.0, 0)


def test_real_files(shared_data) -> None:
    problems = load_gsm8k(shared_data / "gsm8k/test.jsonl")
    assert len(problems) == 1319
    assert (problems[0].gold, problems[0].line) == ("18", 1)
    assert problems[0].question.startswith("Janet\u2019s ducks lay 16 eggs per day.")
    assert load_gsm8k(shared_data / "gsm8k/test.jsonl", limit=5) == problems[:5]
    easier = load_gsm8k(shared_data / "evals/svamp.json")
    assert len(easier) == 1000
    assert easier[0].gold == "51.0"
    assert easier[0].question == (
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack. "
        "How much do you have to pay to buy each pack?"
    )


@pytest.mark.parametrize("answer", ["#### 1,200", "<think>9</think><answer>1200</answer>", 1200])
def test_gold_answers_in_three_shapes(tmp_path, answer) -> None:
    file = tmp_path / "test.jsonl"
    lines = [{"question": "q", "answer": answer}, {"prompt": "q", "solution": answer}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_gsm8k(file) == [Problem("q", "1200", 1), Problem("q", "1200", 2)]


GOOD = '{"question": "q", "answer": "#### 1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no problems in it"),
        (GOOD + '{"question": "q", "ans', "jsonl:2: not JSON"),
        (GOOD + "\n" + GOOD, "jsonl:2: is empty"),
        (GOOD + "[1]", "jsonl:2: expected an object, got list"),
        (GOOD + '{"q": 1}', "jsonl:2: expected the fields question or prompt, and answer .* got q"),
        ('{"question": 3, "answer": "#### 1"}', "jsonl:1: the question must be a text, got 3"),
        ('{"question": " ", "answer": "#### 1"}', "jsonl:1: the question must be a text"),
        ('{"question": "q", "answer": "some"}', "jsonl:1: no number in the answer 'some'"),
        ('{"question": "q", "answer": null}', "jsonl:1: no number in the answer None"),
        ('{"question": "q", "answer": "#### 1/0"}', "jsonl:1: no number in the answer"),
    ],
)
def test_bad_files_are_told_with_their_line(tmp_path, text, message) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_gsm8k(file)


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_gsm8k(tmp_path / "none.jsonl")
