"""Replies to prompts and their rewards, the same at any number of ranks: sampled groups for
training, and greedy replies to held-out prompts.

What is sampled depends on (seed, rollout, prompt, sample) alone. One thing could still differ from
one number of ranks to another: a matrix product over another number of rows may round differently,
and a draw fall between the two. So the sequences of a rollout are cut into fixed cohorts of whole
groups; a cohort is generated in one call on one rank, wherever that is.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from whet.chat.chat import Chat
from whet.evaluate.answers import wilson
from whet.flags import grpo, ppo
from whet.generate.engine import Reply, sample
from whet.generate.text import opened_thought
from whet.progress import Progress, track
from whet.rl.prompts import Prompts
from whet.rl.remote import Remote
from whet.rl.rewards import Answer, Reward, correct, total_rewards
from whet.train.distributed import Ranks, gather, is_sharded, unwrap
from whet.train.evaluation import Meeting
from whet.train.signals import Stop
from whet.train.stage import Evaluation

PolicyConfig = grpo.Config | ppo.Config
"""The flags of a stage that trains a policy: how it samples, and what becomes of samples."""
BATCH = 32
"""Prompts that an evaluation answers at once."""
PENALTY = 1.0
"""What a cut reply loses under `--truncated penalty`."""


def policy_of(model: nn.Module) -> Any:
    """The policy alone, without wrapper and critic."""
    inner: Any = unwrap(model)
    return getattr(inner, "policy", inner)


@dataclass(frozen=True)
class Sample:
    """One reply and what it is worth."""

    prompt: int
    """Its number in the prompts file."""
    reply: Reply
    reward: float
    parts: dict[str, float]
    """Each reward's own number, without weight."""


@dataclass(frozen=True)
class Sampler:
    """What samples groups of replies to `prompts` and judges them, by the flags `config`."""

    prompts: Prompts
    config: PolicyConfig
    rewards: Sequence[Reward]
    chat: Chat
    quiet: bool = True
    remote: Remote | None = None
    """The server that samples, if it is not this process."""

    def groups(
        self, model: Any, chosen: Sequence[int], rollout: int, share: Ranks, meeting: Meeting
    ) -> list[list[Sample]]:
        """A group of `group_size` samples for each prompt of `chosen`, in order, on every rank.

        `share` says which cohorts this rank generates: all of them where each forward pass is a
        collective of all ranks. They come from `model`, or from `remote`. All ranks call it. Raises
        UserError, on all of them, if a reward or the server fails on one, see `Meeting`.
        """
        size = self.config.group_size
        cohorts = cohorts_of(len(chosen), size, self.config.cohort)
        mine = range(share.rank, len(cohorts), share.size)
        asked = [[chosen[i] for i in cohorts[c]] for c in mine]
        n_mine = sum(map(len, asked)) * size
        found = dict[int, list[list[Sample]]]()
        with (
            meeting.work(model),
            track(f"Rollout {rollout + 1}", n_mine, "replies", self.quiet) as progress,
        ):
            if self.remote is None:
                made = self._generate(model, asked, rollout, progress)
            else:
                made = self._fetch(self.remote, asked, rollout, progress)
            with closing(made):
                # Where each forward pass is a collective, no reward may fail between two of them.
                replied = made if share.size == meeting.ranks.size else iter([*made])
                for c, numbers, replies in zip(mine, asked, replied, strict=True):
                    found[c] = self._judged(numbers, replies)
                    if self.remote is not None:
                        meeting.look()
        whole = {c: groups for part in gather(found, meeting.ranks) for c, groups in part.items()}
        return [group for c in range(len(cohorts)) for group in whole[c]]

    def _generate(
        self, model: Any, cohorts: Sequence[Sequence[int]], rollout: int, progress: Progress
    ) -> Generator[list[Reply]]:
        """The replies to the prompts of each cohort, group by group, by the embedded engine."""
        config = self.config
        for numbers in cohorts:
            each = [(number, k) for number in numbers for k in range(config.group_size)]
            yield sample(
                model,
                [self.prompts.prompts[number].ids for number, _ in each],
                keys=[(config.seed, rollout, number, k) for number, k in each],
                max_new_tokens=config.max_new_tokens,
                stop_ids=self.chat.stop_ids,
                temperature=config.temperature,
                batch_size=len(each),
                progress=progress,
            )

    def _fetch(
        self, remote: Remote, cohorts: Sequence[Sequence[int]], rollout: int, progress: Progress
    ) -> Generator[list[Reply]]:
        """The same by a server."""
        prompts, seed = self.prompts.prompts, self.config.seed
        asked = [
            [(prompts[number].ids, (seed, rollout, number)) for number in numbers]
            for numbers in cohorts
        ]
        return remote.sample(asked, self.config.group_size, progress)

    def _judged(self, numbers: Sequence[int], replies: Sequence[Reply]) -> list[list[Sample]]:
        size = self.config.group_size
        owner = np.repeat(numbers, size).tolist()
        pairs = list(zip(owner, replies, strict=True))
        answers = [answer_of(self.prompts, number, reply, self.chat) for number, reply in pairs]
        sums, parts = self._rewarded(answers)
        samples = [
            Sample(*pair, sums[i], {name: values[i] for name, values in parts.items()})
            for i, pair in enumerate(pairs)
        ]
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def _rewarded(self, answers: Sequence[Answer]) -> tuple[list[float], dict[str, list[float]]]:
        """The reward of each answer, with the penalty of a cut one, and each reward's own number
        without it: in training and on held-out prompts the same."""
        sums, parts = total_rewards(self.rewards, answers) if answers else ([], {})
        if self.config.truncated == "penalty":
            sums = [x - PENALTY * (not a.reply.stopped) for x, a in zip(sums, answers, strict=True)]
        return sums, parts

    def evaluate(self, model: nn.Module, ranks: Ranks, stop: Stop) -> Evaluation:
        """Greedy replies to all prompts, their rewards, and how many are right. All ranks call it.

        Raises Interrupted and UserError on all of them, see `Meeting`.
        """
        policy = policy_of(model)
        share = Ranks(device=ranks.device) if is_sharded(model) else ranks
        mine = range(share.rank, len(self.prompts), share.size)
        given, most = (policy, self.prompts, self.chat, mine), self.config.max_new_tokens
        with Meeting(stop, ranks).work(policy):
            answers = answers_to(*given, max_new_tokens=most, quiet=self.quiet)
            found = dict(zip(mine, self._numbers(answers), strict=True))
        # Sharded ranks have answered all of them.
        found = {i: row for part in gather(found, ranks) for i, row in part.items()}
        rows = [found[i] for i in sorted(found)]
        metrics = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        words = f"held-out reward {metrics['dev_reward']:.4g}"
        right = int(sum(row["dev_accuracy"] for row in rows))
        if all(prompt.gold is not None for prompt in self.prompts.prompts):
            low, high = wilson(right, len(rows))
            metrics |= {"dev_low": low, "dev_high": high}
            words += f", {right} of {len(rows)} right (95 % interval {low:.1%} to {high:.1%})"
        else:
            del metrics["dev_accuracy"]
        words += f", {metrics['dev_reply_tokens']:.0f} tokens a reply"
        if metrics["dev_truncated"]:
            words += f", {metrics['dev_truncated']:.0%} cut at --max_new_tokens"
        samples = [self._sample(answer) for answer in answers[: self.config.samples]]
        return Evaluation(metrics, samples if ranks.first else [], words)

    def _numbers(self, answers: Sequence[Answer]) -> list[dict[str, float]]:
        """The metrics of each answer alone; all have the same names."""
        sums, parts = self._rewarded(answers)
        return [
            {
                "dev_reward": reward,
                **{f"dev_reward/{name}": values[k] for name, values in parts.items()},
                "dev_truncated": float(not answer.reply.stopped),
                "dev_reply_tokens": float(len(answer.reply.ids)),
                "dev_accuracy": right,
            }
            for k, (answer, reward, right) in enumerate(
                zip(answers, sums, correct(answers), strict=True)
            )
        ]

    def _sample(self, answer: Answer) -> dict[str, Any]:
        decode = self.chat.tokenizer.decode
        return {
            "prompt": decode(answer.prompt.ids, skip_special=False),
            "reply": decode(answer.reply.ids, skip_special=False),
            "expected": answer.prompt.gold,
        }


def fill_cache(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> None:
    """Hold what `sample` holds when all replies are as long as they may be: begun with all but the
    last two tokens, since the cache is what counts."""
    most = model.config.max_positions
    ends = [min(len(prompt) + max_new_tokens, most) for prompt in prompts]
    sample(
        model,
        [[*p, *p[-1:] * (end - 2 - len(p))] for p, end in zip(prompts, ends, strict=True)],
        keys=[(i,) for i in range(len(prompts))],
        max_new_tokens=2,
        stop_ids=(),
        temperature=temperature,
        batch_size=batch_size,
    )


def cohorts_of(n_prompts: int, group_size: int, cohort: int) -> list[range]:
    """The prompts of each cohort: whole groups, at most `cohort` sequences if a group fits."""
    groups = max(1, cohort // group_size)
    return [range(i, min(i + groups, n_prompts)) for i in range(0, n_prompts, groups)]


def answers_to(
    model: Any,
    prompts: Prompts,
    chat: Chat,
    numbers: Sequence[int],
    *,
    copies: int = 1,
    seed: int = 0,
    temperature: float = 0.0,
    max_new_tokens: int,
    batch_size: int = BATCH,
    quiet: bool = False,
) -> list[Answer]:
    """The model's replies to the prompts `numbers`, `copies` of each, as rewards see them;
    temperature 0 is greedy. What is sampled depends on the seed, the prompt and the copy alone."""
    each = [(number, k) for number in numbers for k in range(copies)]
    title = "Sampling" if temperature else "Answering"
    with track(title, len(each), "replies", quiet) as progress:
        replies = sample(
            model,
            [prompts.prompts[number].ids for number, _ in each],
            keys=[(seed, *pair) for pair in each],
            max_new_tokens=max_new_tokens,
            stop_ids=chat.stop_ids,
            temperature=temperature,
            batch_size=batch_size,
            progress=progress,
        )
    pairs = zip(each, replies, strict=True)
    return [answer_of(prompts, number, reply, chat) for (number, _), reply in pairs]


def answer_of(prompts: Prompts, number: int, reply: Reply, chat: Chat) -> Answer:
    """A reply to prompt `number` as rewards see it."""
    prompt, tokenizer = prompts.prompts[number], chat.tokenizer
    ids = reply.ids[:-1] if reply.stopped else reply.ids
    text = tokenizer.decode(ids, skip_special=False)
    return Answer(prompt, reply, opened_thought(tokenizer, prompt.ids) + text)
