"""Accuracy on grade-school word problems: GSM8K, and any file of questions with a number as answer.

A problem is put to the model as one user turn, exactly as in training, and decoded greedily. The
reply counts as right if the number it states (`answers.py`) is the gold number exactly.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whet.chat.chat import Chat
from whet.chat.conversation import Origin
from whet.chat.encode import encode_prompt
from whet.data.reader import read_each, read_units
from whet.data.record import first_of
from whet.errors import UserError
from whet.evaluate.answers import extract_answer, gold_of, same_number, wilson
from whet.files import replaced
from whet.generate.engine import generate
from whet.generate.text import opened_thought
from whet.model.decoder import Transformer
from whet.progress import track

ASKED = ("question", "prompt")
GOLD_FIELDS = ("gold", "answer", "solution", "ground_truth")
"""Where the gold number may stand; the first that a line has counts."""


@dataclass(frozen=True)
class Problem:
    """A question, its gold number in plain form, and its line (in `.json`: its number), from 1."""

    question: str
    gold: str
    line: int = 0


@dataclass(frozen=True)
class Sample:
    """One problem as the model answered it."""

    line: int
    question: str
    reply: str
    extracted: str | None
    gold: str
    right: bool
    stopped: bool
    """Whether the reply ended with a stop token, rather than being cut."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right replies, with Wilson's 95 % interval; all shares are 0..1."""

    accuracy: float
    low: float
    high: float
    correct: int
    n: int
    unanswered: int
    """Replies that state no number."""
    unstopped: int
    """Replies without a stop token: cut at `max_new_tokens` or at the model's positions."""
    samples: list[Sample] = field(default_factory=list, repr=False)
    """This rank's."""


def gsm8k_accuracy(
    model: Transformer,
    chat: Chat,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Sequence[float]], Sequence[float]] | None = None,
    quiet: bool = False,
) -> Accuracy:
    """Let the model answer `problems`.

    Each of `world_size` ranks answers its share, and `reduce` sums numbers over the ranks. Where
    every forward is a collective of all ranks (FSDP2), leave `world_size` at 1: then all of them
    answer all problems, in step. A question that leaves no room for a reply counts as wrong.
    """
    share = problems[rank::world_size]
    prompts = [
        encode_prompt([{"role": "user", "content": problem.question}], chat) for problem in share
    ]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) < model.config.max_positions]
    replies: list[list[int]] = [[] for _ in share]
    with track("Answering", total=len(fits), unit="problems", quiet=quiet) as progress:
        generated = generate(
            model,
            [prompts[i] for i in fits],
            max_new_tokens=max_new_tokens,
            stop_ids=chat.stop_ids,
            batch_size=batch_size,
            progress=progress,
        )
    for i, reply in zip(fits, generated, strict=True):
        replies[i] = reply
    samples = [_judge(*each, chat) for each in zip(share, prompts, replies, strict=True)]
    counts: Sequence[float] = (
        len(samples),
        sum(sample.right for sample in samples),
        sum(sample.extracted is None for sample in samples),
        sum(not sample.stopped for sample in samples),
    )
    n, correct, unanswered, unstopped = map(int, reduce(counts) if reduce else counts)
    accuracy = correct / n if n else 0.0
    return Accuracy(accuracy, *wilson(correct, n), correct, n, unanswered, unstopped, samples)


def _judge(problem: Problem, prompt: Sequence[int], reply: list[int], chat: Chat) -> Sample:
    stopped = bool(reply) and reply[-1] in chat.stop_ids
    text = chat.tokenizer.decode(reply[:-1] if stopped else reply, skip_special=False)
    extracted = extract_answer(opened_thought(chat.tokenizer, prompt) + text)
    right = same_number(extracted, problem.gold)
    return Sample(problem.line, problem.question, text, extracted, problem.gold, right, stopped)


def load_gsm8k(path: str | Path, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a file, all by default.

    JSON lines, or one JSON list, of objects with a question in one of ASKED and an answer in one of
    GOLD_FIELDS (the gold number stands after `####`, or in `<answer>`, or alone) or with `Body`,
    `Question` and `Answer` (SVAMP). Raises UserError that names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a file of problems, such as GSM8K's test")
    problems = read_each(path, itertools.islice(read_units(str(path)), limit), _problem)
    if not problems:
        raise UserError(f"{path}: no problems in it; expected JSON lines with question and answer")
    return problems


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """One JSON object a line, in the problems' order."""
    with replaced(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")


def _problem(record: dict[str, Any], at: Origin) -> Problem:
    asked, states = first_of(record, ASKED), first_of(record, GOLD_FIELDS)
    states = states or next((name for name in GOLD_FIELDS if name in record), None)
    if asked and states:
        question, answer = record[asked], record[states]
    elif {"Body", "Question", "Answer"} <= record.keys():
        question, answer = svamp_question(record), record["Answer"]
    else:
        raise UserError(
            "expected the fields question or prompt, and answer (or SVAMP's Body, Question and "
            f"Answer), got {', '.join(map(str, record)) or 'none'}"
        )
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"the question must be a text, got {question!r}")
    gold = gold_of(answer)
    if gold is None or not same_number(gold, gold):
        raise UserError(f"no number in the answer {answer!r}; expected, say, '#### 18'")
    return Problem(question, gold, at.line)


def svamp_question(record: dict[str, Any]) -> str:
    """SVAMP's two parts, Body and Question, as one text; many bodies lack their full stop."""
    body, question = str(record["Body"]).strip(), str(record["Question"]).strip()
    return f"{body}{'' if body.endswith(('.', ',', '?', '!')) else '.'} {question}"
