"""Sampled groups of replies and their rewards, the same at any number of ranks.

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

from whet.chat.chat import Chat
from whet.flags import grpo, ppo
from whet.generate.engine import Reply, sample
from whet.progress import Progress, track
from whet.rl.prompts import Prompts
from whet.rl.remote import Remote
from whet.rl.rewards import Answer, Reward, total_rewards
from whet.train.distributed import Ranks, gather
from whet.train.evaluation import Meeting

PolicyConfig = grpo.Config | ppo.Config
"""The flags of a stage that trains a policy: how it samples, and what becomes of samples."""
PENALTY = 1.0
"""What a cut reply loses under `--truncated penalty`."""


@dataclass(frozen=True)
class Sample:
    """One reply and what it is worth."""

    prompt: int
    """Its number in the prompts file."""
    reply: Reply
    reward: float
    parts: dict[str, float]
    """Each reward's own number, without weight."""


def sample_groups(
    model: Any,
    prompts: Prompts,
    chosen: Sequence[int],
    rollout: int,
    config: PolicyConfig,
    rewards: Sequence[Reward],
    chat: Chat,
    share: Ranks,
    meeting: Meeting,
    quiet: bool,
    remote: Remote | None = None,
) -> list[list[Sample]]:
    """A group of `group_size` samples for each prompt of `chosen`, in order, on every rank.

    `share` says which cohorts this rank generates: all of them where each forward pass is a
    collective of all ranks. They come from `model`, or from `remote`. All ranks call it. Raises
    UserError, on all of them, if a reward or the server fails on one, see `Meeting`.
    """
    size = config.group_size
    cohorts = cohorts_of(len(chosen), size, config.cohort)
    mine = range(share.rank, len(cohorts), share.size)
    found = dict[int, list[list[Sample]]]()
    n_mine = sum(len(cohorts[c]) for c in mine) * size
    with (
        meeting.work(model),
        track(f"Rollout {rollout + 1}", total=n_mine, unit="replies", quiet=quiet) as progress,
    ):
        asked = [[chosen[i] for i in cohorts[c]] for c in mine]
        if remote is None:
            made = _generate(model, prompts, asked, rollout, config, chat, progress)
        else:
            made = _fetch(remote, prompts, asked, rollout, config, progress)
        with closing(made):
            # Where each forward pass is a collective, no reward may fail between two of them.
            replied = made if share.size == meeting.ranks.size else iter([*made])
            for c, numbers, replies in zip(mine, asked, replied, strict=True):
                found[c] = _judged(numbers, replies, prompts, config, rewards, chat)
                if remote is not None:
                    meeting.look()
    whole = {c: groups for part in gather(found, meeting.ranks) for c, groups in part.items()}
    return [group for c in range(len(cohorts)) for group in whole[c]]


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


def _generate(
    model: Any,
    prompts: Prompts,
    cohorts: Sequence[Sequence[int]],
    rollout: int,
    config: PolicyConfig,
    chat: Chat,
    progress: Progress,
) -> Generator[list[Reply]]:
    """The replies to the prompts of each cohort, group by group, by the embedded engine."""
    for numbers in cohorts:
        each = [(number, k) for number in numbers for k in range(config.group_size)]
        yield sample(
            model,
            [prompts.prompts[number].ids for number, _ in each],
            keys=[(config.seed, rollout, number, k) for number, k in each],
            max_new_tokens=config.max_new_tokens,
            stop_ids=chat.stop_ids,
            temperature=config.temperature,
            batch_size=len(each),
            progress=progress,
        )


def _fetch(
    remote: Remote,
    prompts: Prompts,
    cohorts: Sequence[Sequence[int]],
    rollout: int,
    config: PolicyConfig,
    progress: Progress,
) -> Generator[list[Reply]]:
    """The same by a server."""
    asked = [
        [(prompts.prompts[number].ids, (config.seed, rollout, number)) for number in numbers]
        for numbers in cohorts
    ]
    return remote.sample(asked, config.group_size, progress)


def _judged(
    numbers: Sequence[int],
    replies: Sequence[Reply],
    prompts: Prompts,
    config: PolicyConfig,
    rewards: Sequence[Reward],
    chat: Chat,
) -> list[list[Sample]]:
    owner = np.repeat(numbers, config.group_size).tolist()
    answers = [
        answer_of(prompts, number, reply, chat)
        for number, reply in zip(owner, replies, strict=True)
    ]
    sums, parts = total_rewards(rewards, answers)
    if config.truncated == "penalty":
        sums = [x - PENALTY * (not a.stopped) for x, a in zip(sums, answers, strict=True)]
    samples = [
        Sample(number, reply, reward, {name: values[i] for name, values in parts.items()})
        for i, (number, reply, reward) in enumerate(zip(owner, replies, sums, strict=True))
    ]
    size = config.group_size
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def answer_of(prompts: Prompts, number: int, reply: Reply, chat: Chat) -> Answer:
    """A reply to prompt `number` as rewards see it."""
    prompt = prompts.prompts[number]
    ids = reply.ids[:-1] if reply.stopped else reply.ids
    text = chat.tokenizer.decode(ids, skip_special=False)
    # A template may begin the thinking for the model; then the reply holds its end only.
    asked = chat.tokenizer.decode(prompt.ids[-16:], skip_special=False)
    if asked.rstrip().endswith("<think>"):
        text = f"<think>{text}"
    return Answer(prompt, reply.ids, text, reply.stopped)
