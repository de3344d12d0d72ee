"""The numbers of one model for the table across the stages."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from whet.chat.chat import Chat
from whet.config import problems
from whet.data.batches import Batch
from whet.data.reference import Reference
from whet.data.store import PackedStore
from whet.evaluate.answers import pass_at_k, wilson
from whet.evaluate.dev import dev_loss
from whet.flags.compare import Config
from whet.generate.engine import evaluating
from whet.generate.opened import Opened
from whet.model.open import misfits
from whet.rl.preference_loss import Objective
from whet.rl.prompts import Prompts, load_prompts
from whet.rl.rewards import Answer, Reward, correct, open_rewards, total_rewards
from whet.rl.sampling import answers_to
from whet.stages.dpo import judge_replies, with_reference
from whet.stages.pairs import Judge, PairEvaluator
from whet.stages.reward import at_last_tokens, judge_rewards
from whet.train.distributed import Ranks
from whet.train.signals import Stop

ROWS = 4  # of a packed file in one forward


@dataclass(frozen=True)
class Measured:
    """What was found of one model."""

    name: str
    numbers: dict[str, float]
    right: list[bool] = field(default_factory=list)
    """Of each problem, by greedy decoding."""
    replies: list[str] = field(default_factory=list)
    """The greedy reply to each problem."""
    questions: list[str] = field(default_factory=list)


def measure(name: str, opened: Opened, first: Opened | None, config: Config) -> Measured:
    """All numbers that `config` asks for; `first` is the first model, None for itself.

    Raises UserError for files that do not fit the model.
    """
    if opened.model.config.score:
        return Measured(name, _pairs(opened, first, config))
    numbers = _dev(opened, config) | _pairs(opened, first, config)
    if config.gsm8k is None:
        return Measured(name, numbers)
    prompts, notes = prompts_of(config, opened.chat, opened.model.config.max_positions - 1)
    problems(notes)  # models are compared on the same problems or not at all
    with ExitStack() as stack:
        terms = open_rewards(
            config.reward,
            opened.chat,
            stack,
            max_new_tokens=config.max_new_tokens,
            seconds=config.reward_seconds,
            device=opened.device,
            precision=config.precision,
        )
        answers = _answers(opened, prompts, config)
        right = [value == 1.0 for value in correct(answers)]
        numbers |= _accuracy(right, answers) | _rewards(answers, terms)
        if config.samples:
            numbers |= _sampled(opened, first, prompts, config, terms)
    return Measured(
        name,
        numbers,
        right,
        [answer.text for answer in answers],
        [prompt.messages[-1]["content"] for prompt in prompts.prompts],
    )


def prompts_of(config: Config, chat: Chat, longest: int | None = None) -> tuple[Prompts, list[str]]:
    """The problems as this chat asks them, and a note if one has more than `longest` tokens."""
    assert config.gsm8k is not None
    return load_prompts(
        config.gsm8k,
        chat,
        longest=longest,
        limit=config.limit,
        needs_gold="correct",
        flag="--gsm8k",
    )


def _answers(
    opened: Opened, prompts: Prompts, config: Config, copies: int = 1, temperature: float = 0.0
) -> list[Answer]:
    """The greedy reply to each prompt, or some sampled ones."""
    return answers_to(
        opened.model,
        prompts,
        opened.chat,
        range(len(prompts)),
        copies=copies,
        seed=config.seed,
        temperature=temperature,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )


def _accuracy(right: Sequence[bool], answers: Sequence[Answer]) -> dict[str, float]:
    low, high = wilson(sum(right), len(right))
    return {
        "problems": len(right),
        "accuracy": sum(right) / len(right),
        "accuracy_low": low,
        "accuracy_high": high,
        "unstopped": sum(not answer.reply.stopped for answer in answers) / len(answers),
        "reply_tokens": sum(len(answer.reply.ids) for answer in answers) / len(answers),
    }


def _rewards(answers: Sequence[Answer], terms: Sequence[Reward]) -> dict[str, float]:
    if not terms:
        return {}
    sums, parts = total_rewards(terms, answers)
    means = {f"reward/{name}": float(np.mean(values)) for name, values in parts.items()}
    return {"reward": float(np.mean(sums)), **means}


def _sampled(
    opened: Opened, first: Opened | None, prompts: Prompts, config: Config, terms: Sequence[Reward]
) -> dict[str, float]:
    """pass@k of the samples, and how far they are from the first model."""
    n = config.samples
    answers = _answers(opened, prompts, config, n, config.temperature)
    right = np.reshape(correct(answers), (-1, n)).sum(1).astype(int)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < n] + [n]
    found = {f"pass@{k}": float(np.mean([pass_at_k(n, int(c), k) for c in right])) for k in ks}
    found |= {f"sampled_{name}": value for name, value in _rewards(answers, terms).items()}
    if first is None:
        return {**found, "kl_to_first": 0.0}
    if first.chat.tokenizer.knows_ids_of(opened.chat.tokenizer):
        found["kl_to_first"] = _divergence(answers, first, config.temperature)
    return found


def _divergence(answers: Sequence[Answer], first: Opened, temperature: float) -> float:
    """Nats a reply: the mean of ln p - ln p_first over the model's own samples, which is an
    estimate of KL(model || first)."""
    device, sums = first.device, list[float]()
    with torch.no_grad(), evaluating(first.model):
        for answer in answers:
            reply = answer.reply
            tokens = torch.tensor([[*answer.prompt.ids, *reply.ids]], device=device)
            weight = torch.zeros(tokens.shape, device=device)
            weight[0, len(answer.prompt.ids) - 1 : -1] = 1.0
            targets = tokens.roll(-1, 1)
            found: Any = first.model(
                tokens, targets=targets, weight=weight, temperature=temperature
            )
            sums.append(sum(reply.logp) + float(found.nll.sum()))
    return float(np.mean(sums))


def _dev(opened: Opened, config: Config) -> dict[str, float]:
    if config.dev is None:
        return {}
    store = PackedStore(config.dev)
    problems(misfits(opened.model, opened.chat, store, "--dev"))
    found = dev_loss(opened.model, store, micro_rows=ROWS, device=opened.device, quiet=False)
    return {"dev_loss": found.loss}


def _pairs(opened: Opened, first: Opened | None, config: Config) -> dict[str, float]:
    """How often the chosen reply of a pair is put first: by its score, or by its ln p a token."""
    if config.pairs is None:
        return {}
    store = PackedStore(config.pairs, kinds=("preferences",))
    # A reward model may have a padding token more than the tokenizer that made the file.
    extends = first and opened.chat.tokenizer.knows_ids_of(first.chat.tokenizer)
    chat = first.chat if first and extends else opened.chat
    problems(misfits(opened.model, chat, store, "--pairs"))
    complete: Callable[[PackedStore, Batch], Batch] = at_last_tokens
    judge: Judge = partial(judge_rewards, margin=0.0, centre=0.0)
    if not opened.model.config.score:
        complete = partial(with_reference, reference=Reference(""))
        judge = partial(judge_replies, objective=Objective("simpo", beta=1.0))
    evaluate = PairEvaluator(store, judge, complete, ROWS, quiet=False)
    found = evaluate(opened.model, Ranks(device=opened.device), Stop(0.0)).metrics
    names = ("pair_accuracy", "pair_accuracy_low", "pair_accuracy_high")
    pairs = len(store.document_rows) // 2
    return {"pairs": pairs, **{name: found[f"dev_{name}"] for name in names}}
