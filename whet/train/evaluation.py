"""What is measured while a run trains: dev loss, where it comes from, answers, sample replies."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from whet.chat.chat import Chat
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.evaluate.dev import DevLoss, dev_loss
from whet.evaluate.gsm8k import Problem, gsm8k_accuracy
from whet.generate.engine import generate
from whet.train.distributed import Ranks, gather, is_sharded, sum_over_ranks, unwrap
from whet.train.signals import Interrupted, Stop
from whet.train.stage import Evaluation

MEET_EVERY = {"cuda": 8}
"""Forward passes between two meetings of the ranks, by device, so that a GPU is not kept waiting;
else 1."""
SAMPLE_TOKENS = 128
"""New tokens of a sample reply."""
TEXT_PROMPT_TOKENS = 16
"""What a sample starts with where every token is trained, as in plain text."""


class _SharedError(UserError):
    """The UserErrors that some ranks have met, raised on all of them."""


@dataclass
class Meeting:
    """Where the ranks of an evaluation or rollout hear what ends it for all of them: that one was
    asked to stop, or has met a UserError, say in a reward.

    A single rank needs none: there a signal cuts the work short wherever it is. Of several, all
    must leave at the same place. So they meet after forward passes; one that is done with a part,
    and may have had fewer of them, goes on meeting the others until all are.
    """

    stop: Stop
    ranks: Ranks
    forwards: int = 0
    """Since the last part."""

    @contextmanager
    def work(self, model: nn.Module) -> Iterator[None]:
        """A block in which all ranks meet after forward passes of `model`, and at its end; what
        they exchange in it follows an `end_part`. Raises Interrupted on all ranks if one was asked
        to stop, and on all of them the UserErrors that some have met."""
        hook = model.register_forward_hook(lambda *_: self.look())
        try:
            yield
            self.end_part()
        except UserError as error:
            if not isinstance(error, _SharedError):
                self._meet(said=str(error))
            raise
        finally:
            hook.remove()

    def look(self) -> None:
        """Count a forward pass, and meet if it is time."""
        self.forwards += 1
        if self.forwards % MEET_EVERY.get(self.ranks.device.type, 1) == 0:
            self._meet()

    def end_part(self) -> None:
        """Return when all ranks are here."""
        self.forwards = 0
        while self._meet(done=True) < self.ranks.size:
            pass

    def _meet(self, *, done: bool = False, said: str = "") -> float:
        if self.ranks.size == 1:
            return 1
        asked, ready, failed = sum_over_ranks([self.stop.number, done, said != ""], self.ranks)
        if asked:
            raise Interrupted
        if failed:
            lines = "\n".join(filter(None, gather(said, self.ranks))).splitlines()
            raise _SharedError("\n".join(dict.fromkeys(lines)))
        return ready


@dataclass(frozen=True)
class Evaluator:
    """The evaluation of a run. Its parts follow each other in the same order on all ranks."""

    dev: PackedStore | None
    chat: Chat | None
    micro_rows: int
    questions: Sequence[Problem] = ()
    n_samples: int = 3
    quiet: bool = True
    """Show no progress."""

    def __call__(self, model: nn.Module, ranks: Ranks, stop: Stop) -> Evaluation:
        """All ranks call it. Raises Interrupted and UserError on all of them, see `Meeting`."""
        inner: Any = unwrap(model)
        meeting = Meeting(stop, ranks)
        metrics: dict[str, float] = {}
        words: list[str] = []

        def reduce(values: Sequence[float]) -> list[float]:
            meeting.end_part()
            return sum_over_ranks(values, ranks)

        # Where every forward is a collective, all ranks generate the same; else each its share.
        share = Ranks(device=ranks.device) if is_sharded(model) else ranks
        stop_ids = self.chat.stop_ids if self.chat else ()
        with meeting.work(inner):
            if self.dev is not None:
                found = dev_loss(
                    inner,
                    self.dev,
                    micro_rows=self.micro_rows,
                    device=ranks.device,
                    rank=ranks.rank,
                    world_size=ranks.size,
                    reduce=reduce,
                    stop_ids=stop_ids,
                    quiet=self.quiet,
                )
                metrics |= metrics_of(found)
                words += in_words(found)
            if self.questions and self.chat is not None:
                answers = gsm8k_accuracy(
                    inner,
                    self.chat,
                    self.questions,
                    rank=share.rank,
                    world_size=share.size,
                    reduce=reduce if share.size > 1 else None,
                    quiet=self.quiet,
                )
                metrics |= {
                    "gsm8k_accuracy": answers.accuracy,
                    "gsm8k_low": answers.low,
                    "gsm8k_high": answers.high,
                }
                interval = f"{100 * answers.low:.1f} to {100 * answers.high:.1f} %"
                words.append(f"{answers.correct} of {answers.n} problems right ({interval})")
            count = self.n_samples if share.first else 0
            samples = sample_replies(inner, self.dev, self.chat, count)
        return Evaluation(metrics, samples, ", ".join(words))


def sample_replies(
    model: Any, dev: PackedStore | None, chat: Chat | None, count: int, every: int = 1
) -> list[dict[str, Any]]:
    """Replies to the first prompts of the dev file, next to what stands there; see `prompts_of`."""
    if dev is None or chat is None or count == 0:
        return []
    room = model.config.max_positions - 1
    pairs = [pair for pair in prompts_of(dev, count, every) if len(pair[0]) <= room]
    prompts = [prompt for prompt, _ in pairs]
    replies = generate(model, prompts, max_new_tokens=SAMPLE_TOKENS, stop_ids=chat.stop_ids)
    return [
        {
            "prompt": chat.tokenizer.decode(prompt, skip_special=False),
            "reply": chat.tokenizer.decode(reply, skip_special=False),
            "expected": chat.tokenizer.decode(expected, skip_special=False),
        }
        for (prompt, expected), reply in zip(pairs, replies, strict=True)
    ]


def metrics_of(found: DevLoss) -> dict[str, float]:
    """The numbers of a dev pass as they are logged."""
    metrics = {"dev_loss": found.loss, "dev_ppl": found.ppl}
    if found.stop_probability is not None:
        metrics["dev_stop_probability"] = found.stop_probability
    metrics |= {f"dev_loss/{name}": value for name, value in found.parts.items()}
    if found.stop_inside is not None:
        metrics["dev_stop_inside"] = found.stop_inside
    return metrics


def in_words(found: DevLoss) -> list[str]:
    """The numbers of a dev pass for people."""
    words = [f"dev loss {found.loss:.4f} nats a token (perplexity {found.ppl:.4g})"]
    if found.stop_probability is not None:
        inside = "" if found.stop_inside is None else f", {found.stop_inside:.2g} before them"
        words.append(f"the stop token has probability {found.stop_probability:.3f} at ends{inside}")
    return words


def prompts_of(store: PackedStore, count: int, every: int = 1) -> list[tuple[list[int], list[int]]]:
    """The first `count` documents, each cut before its first trained span: (prompt, that span).
    `every`: 2 takes the first of each pair of a row only."""
    found: list[tuple[list[int], list[int]]] = []
    for row in range(len(store)):
        read = store.rows([row])
        for segment in range(1, int(read.segment_ids.max()) + 1, every):
            if len(found) == count:
                return found
            here = read.segment_ids[0] == segment
            tokens, trained = read.tokens[0, here], read.loss_mask[0, here] != 0
            if not trained[1:].any():
                continue
            start = int(np.argmax(trained[1:])) + 1
            if start == 1:  # plain text: all of it is trained
                start = min(TEXT_PROMPT_TOKENS, len(tokens) - 1)
            rest = ~trained[start:]
            end = start + (int(np.argmax(rest)) if rest.any() else len(rest))
            found.append((tokens[:start].tolist(), tokens[start:end][:SAMPLE_TOKENS].tolist()))
    return found
