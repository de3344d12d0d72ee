"""A policy on held-out prompts: greedy replies, their rewards, and how many are right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from whet.chat.chat import Chat
from whet.evaluate.answers import wilson
from whet.generate.engine import sample
from whet.progress import track
from whet.rl.critic import policy_of
from whet.rl.prompts import Prompts
from whet.rl.rewards import Answer, Reward, correct, total_rewards
from whet.rl.sampling import answer_of
from whet.train.distributed import Ranks, gather, is_sharded
from whet.train.evaluation import Meeting
from whet.train.signals import Stop
from whet.train.stage import Evaluation

BATCH = 32  # prompts that are answered at once


@dataclass(frozen=True)
class PolicyEvaluator:
    """The evaluation of a stage that trains a policy."""

    dev: Prompts
    chat: Chat
    rewards: Sequence[Reward]
    max_new_tokens: int
    n_samples: int = 3
    quiet: bool = True

    def __call__(self, model: nn.Module, ranks: Ranks, stop: Stop) -> Evaluation:
        """All ranks call it. Raises Interrupted on all of them if one was asked to stop."""
        meeting = Meeting(stop, ranks)
        share = Ranks(device=ranks.device) if is_sharded(model) else ranks
        mine = range(share.rank, len(self.dev), share.size)
        answers = self._answers(policy_of(model), mine, meeting)
        sums, parts = total_rewards(self.rewards, answers) if answers else ([], {})
        meeting.end_part()
        own = [
            (i, reward, {name: values[k] for name, values in parts.items()}, answer.stopped,
             len(answer.ids), right)
            for k, (i, reward, answer, right) in enumerate(
                zip(mine, sums, answers, correct(answers), strict=True)
            )
        ]  # fmt: skip
        rows = sorted(row for part in gather(own, ranks) for row in part)
        rows = list({row[0]: row for row in rows}.values())  # sharded ranks answer all of them
        n = len(rows)
        metrics = {
            "dev_reward": sum(row[1] for row in rows) / n,
            **{f"dev_reward/{name}": sum(row[2][name] for row in rows) / n for name in rows[0][2]},
            "dev_truncated": sum(not row[3] for row in rows) / n,
            "dev_reply_tokens": sum(row[4] for row in rows) / n,
        }
        if all(prompt.gold is not None for prompt in self.dev.prompts):
            right = int(sum(row[5] for row in rows))
            low, high = wilson(right, n)
            metrics |= {"dev_accuracy": right / n, "dev_low": low, "dev_high": high}
        words = f"held-out reward {metrics['dev_reward']:.4g}"
        if "dev_accuracy" in metrics:
            words += f", {right} of {n} right (95 % interval {low:.1%} to {high:.1%})"
        words += f", {metrics['dev_reply_tokens']:.0f} tokens a reply"
        if metrics["dev_truncated"]:
            words += f", {metrics['dev_truncated']:.0%} cut at --max_new_tokens"
        samples = [self._sample(answer) for answer in answers[: self.n_samples]]
        return Evaluation(metrics, samples if ranks.first else [], words)

    def _answers(self, model: Any, numbers: Sequence[int], meeting: Meeting) -> list[Answer]:
        with (
            meeting.after_forwards(model),
            track("Answering", total=len(numbers), unit="prompts", quiet=self.quiet) as progress,
        ):
            replies = sample(
                model,
                [self.dev.prompts[i].ids for i in numbers],
                keys=[(0, i) for i in numbers],  # greedy: nothing is drawn
                max_new_tokens=self.max_new_tokens,
                stop_ids=self.chat.stop_ids,
                temperature=0.0,
                batch_size=BATCH,
                progress=progress,
            )
        return [
            answer_of(self.dev, i, reply, self.chat)
            for i, reply in zip(numbers, replies, strict=True)
        ]

    def _sample(self, answer: Answer) -> dict[str, Any]:
        return {
            "prompt": self.chat.tokenizer.decode(answer.prompt.ids, skip_special=False),
            "reply": self.chat.tokenizer.decode(answer.ids, skip_special=False),
            "expected": answer.prompt.gold,
        }
