"""What a reply is worth: functions of replies that give a number each, and their weighted sum.

A reward is a function of `Answer`s alone: the same reply gets the same number, whatever else is
in the batch. Those that Whet has:

=============  ====================================================================================
correct        1 if the reply states the gold number (the evaluation's own checker), else 0
format         1 if it is right AND in form: it stopped, after exactly one `<answer>…</answer>` or
               one `####`. It never pays a wrong reply: a model learns form without content quickly
length         0 up to three quarters of the longest reply, then falling to -1 (DAPO's soft
               punishment, arXiv:2503.14476 eq. 13)
FILE.py:NAME   a function of yours, in a process of its own, see `PythonReward`
DIRECTORY      a reward model, see `reward_model`
=============  ====================================================================================
"""

import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whet.chat.chat import Chat
from whet.errors import UserError
from whet.evaluate.answers import extract_answer, same_number
from whet.flags.choices import Device, Precision
from whet.flags.policy import parse_reward
from whet.generate.engine import Reply, evaluating
from whet.generate.opened import open_model
from whet.generate.rows import padded
from whet.rl.prompts import Prompt

NEEDS_GOLD = ("correct", "format")
ROWS = 8  # replies that a reward model reads at once
CALLED_WITH = 64  # replies of one call of a function of the user's, which has a time limit
_IN_FORM = re.compile(r"<answer>[^<]*</answer>|####", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """A sampled reply as rewards see it."""

    prompt: Prompt
    reply: Reply
    text: str
    """Without the stop token; begins with `<think>` where the prompt has opened it."""


Score = Callable[[Sequence[Answer]], list[float]]


@dataclass(frozen=True)
class Reward:
    """One term of the sum."""

    name: str
    weight: float
    score: Score


def open_rewards(
    texts: Sequence[str],
    chat: Chat,
    stack: ExitStack,
    *,
    max_new_tokens: int,
    seconds: float,
    device: torch.device,
    precision: Precision = "auto",
) -> list[Reward]:
    """The rewards that `--reward` names. `stack` ends their processes.

    `seconds` is how long a function of the user's may take for one call.
    """
    found = []
    own: dict[str, Score] = {
        "correct": correct,
        "format": in_form,
        "length": Length(max_new_tokens),
    }
    shown = short_names([parse_reward(text)[0] for text in texts])
    for text in texts:
        name, weight = parse_reward(text)
        score: Score
        if name in own:
            score = own[name]
        elif name.rpartition(":")[0].endswith(".py"):
            score = stack.enter_context(closing(PythonReward(name, seconds)))
        else:
            score = reward_model(name, chat, device, precision)
        found.append(Reward(shown[name], weight, score))
    return found


def short_names(names: Sequence[str]) -> dict[str, str]:
    """What each reward is called in the log: its own name without file or folder, unless another
    one has that name, too."""
    short = {name: Path(name).name.rpartition(":")[2] for name in names}
    return {n: s if list(short.values()).count(s) == 1 else n for n, s in short.items()}


def total_rewards(
    rewards: Sequence[Reward], answers: Sequence[Answer]
) -> tuple[list[float], dict[str, list[float]]]:
    """The weighted sum for each answer, and each reward's own numbers by name.

    Raises UserError for a reward that is not finite.
    """
    parts = {reward.name: reward.score(answers) for reward in rewards}
    for name, values in parts.items():
        for answer, value in zip(answers, values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"--reward {name}: gave {value} for a reply to line {answer.prompt.line}; "
                    f"expected a finite number (the reply: {answer.text[:80]!r})"
                )
    count = range(len(answers))
    return [sum(r.weight * parts[r.name][i] for r in rewards) for i in count], parts


def correct(answers: Sequence[Answer]) -> list[float]:
    """1.0 where the reply states the gold number exactly."""
    return [float(same_number(extract_answer(a.text), a.prompt.gold)) for a in answers]


def in_form(answers: Sequence[Answer]) -> list[float]:
    """1.0 where a right reply stopped and marked its answer exactly once."""
    return [
        right * float(answer.reply.stopped and len(_IN_FORM.findall(answer.text)) == 1)
        for answer, right in zip(answers, correct(answers), strict=True)
    ]


@dataclass(frozen=True)
class Length:
    """0 for short replies, falling to -1 at `longest` tokens over the last quarter."""

    longest: int

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        quarter = max(1.0, self.longest / 4)
        over = [(len(a.reply.ids) - (self.longest - quarter)) / quarter for a in answers]
        return [-min(1.0, max(0.0, x)) for x in over]


class PythonReward:
    """A function of the user's, called as TRL calls reward functions.

    It is given, by keyword and as far as it has such parameters, `prompts` (lists of messages),
    `completions` (the replies' texts), `gold`, `stopped` and every other field of the prompts file,
    each a list with an entry for each reply, at most `CALLED_WITH`; it returns as many numbers. It
    runs in a process of its own, with a time limit, so that it can neither hang nor crash the
    training.
    """

    def __init__(self, place: str, seconds: float) -> None:
        self.place, self.seconds = place, seconds
        file, _, name = place.rpartition(":")
        self._process: Any = subprocess.Popen(
            [sys.executable, "-m", "whet.rl.reward_process", file, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is the training's, which saves and then ends this one
        )
        assert self._process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        try:
            self._answer("be imported")
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """End the process, and those that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._selector.close()

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        parts = [answers[i : i + CALLED_WITH] for i in range(0, len(answers), CALLED_WITH)]
        return [reward for part in parts for reward in self._judge(part)]

    def _judge(self, answers: Sequence[Answer]) -> list[float]:
        names = dict.fromkeys(name for answer in answers for name in answer.prompt.columns)
        columns: dict[str, list[Any]] = {
            name: [answer.prompt.columns.get(name) for answer in answers] for name in names
        }
        columns |= {
            "prompts": [answer.prompt.messages for answer in answers],
            "completions": [answer.text for answer in answers],
            "gold": [answer.prompt.gold for answer in answers],
            "stopped": [answer.reply.stopped for answer in answers],
        }
        with suppress(BrokenPipeError):  # a dead process is reported below
            self._process.stdin.write(json.dumps(columns, default=str) + "\n")
            self._process.stdin.flush()
        rewards: list[float] = self._answer(f"judge {len(answers)} replies")["rewards"]
        return rewards

    def _answer(self, task: str) -> dict[str, Any]:
        if not self._selector.select(self.seconds):
            self.close()
            raise UserError(
                f"--reward {self.place}: took longer than {self.seconds:g} s to {task}; make it "
                "faster, or raise --reward_seconds"
            )
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise UserError(
                f"--reward {self.place}: its process ended (exit code {code}); its own "
                "messages stand above"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"--reward {self.place}: {answer['error']}")
        return answer


def reward_model(directory: str, chat: Chat, device: torch.device, precision: Precision) -> Score:
    """The score that a reward model gives to prompt and reply, read at the last token.

    It must have the policy's tokenizer, since it is given the sampled ids and never text that was
    decoded and encoded again. Raises UserError for a model without a score or another tokenizer.
    """
    on_gpu = device.type == "cuda"
    place: Device = "cuda" if on_gpu else "cpu"
    opened = open_model(directory, device=place, precision=precision, score=None)
    if not opened.model.config.score:
        raise UserError(f"--reward {directory}: is no reward model; `whet reward` makes one")
    if not opened.chat.tokenizer.knows_ids_of(chat.tokenizer):
        raise UserError(
            f"--reward {directory}: has another tokenizer than the policy; train a reward model "
            "from a model with the same one"
        )
    limit = opened.model.config.max_positions

    def score(answers: Sequence[Answer]) -> list[float]:
        texts = [[*answer.prompt.ids, *answer.reply.ids] for answer in answers]
        if (longest := max(map(len, texts))) > limit:
            raise UserError(
                f"--reward {directory}: has {limit:,} positions, and a reply with its prompt has "
                f"{longest:,} tokens; use a smaller --max_new_tokens"
            )
        found: list[float] = []
        with torch.no_grad(), evaluating(opened.model):
            for start in range(0, len(texts), ROWS):
                found += _last_scores(opened.model, texts[start : start + ROWS], device)
        return found

    return score


def _last_scores(model: Any, texts: list[list[int]], device: torch.device) -> list[float]:
    """The score at the last token of each text, run together as documents of rows of their own."""
    tokens, last = padded(texts, device)
    places = torch.arange(tokens.shape[1], device=device)
    scores = model(tokens, None, (places <= last).long(), weight=(places == last).float())
    return scores.sum(1).tolist()
