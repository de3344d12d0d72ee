"""The rollouts of a run: made with the current weights, kept as files, and dealt to the steps.

Step s (from 0) is update s % per_rollout of rollout s // per_rollout. A rollout's prompts are a
pure function of (seed, rollout), its samples of these and the weights. So a run that is killed
makes the same rollouts again; in the middle of one it reads its file.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from whet.data.batches import Batch, global_batch_rows, steps_per_epoch
from whet.errors import UserError
from whet.generate.engine import Reply
from whet.progress import say
from whet.rl.critic import Completed
from whet.rl.prompts import Prompts
from whet.rl.rewards import Answer, PythonReward
from whet.rl.rollout_file import (
    ROWS,
    Layout,
    Rollout,
    lay_out,
    rollout_files,
    rollout_path,
    write_rollout,
)
from whet.rl.sampling import PolicyConfig, Sample, Sampler, cohorts_of, fill_cache, policy_of
from whet.train.distributed import Ranks, from_first, is_sharded
from whet.train.evaluation import Meeting
from whet.train.signals import Stop
from whet.train.state import saved_states

Complete = Callable[[Layout, nn.Module, Ranks], Completed]
REFILLS = 4
"""How often more prompts are drawn for a rollout at most, to make up for uninformative groups."""
MANY = 0.5
"""A larger share of cut replies is reported in words."""


@dataclass
class Rollouts:
    """The `documents`, `before_step` and `batches` of a stage that trains a policy."""

    sampler: Sampler
    ranks: Ranks
    complete: Complete | None = None
    """What else a stage needs of each token: numbers (rows, T) by name, and some for the log."""
    current: Rollout | None = None
    known: dict[int, np.ndarray] = field(default_factory=dict)
    """The prompt of each document of rollouts whose steps the ledger may not have written yet."""
    reported_cut: bool = False

    @property
    def prompts(self) -> Prompts:
        return self.sampler.prompts

    @property
    def config(self) -> PolicyConfig:
        return self.sampler.config

    @property
    def folder(self) -> Path:
        """Where the files go."""
        return self.config.out / "rollouts"

    @property
    def per_rollout(self) -> int:
        """Optimizer steps of a rollout."""
        return self.config.updates * self.config.passes

    @property
    def rollouts_per_epoch(self) -> int:
        """Rollouts in which each prompt is asked once."""
        return steps_per_epoch(len(self.prompts), self.config.batch_size)

    def before_step(
        self, step: int, model: nn.Module, ranks: Ranks, stop: Stop
    ) -> Mapping[str, float]:
        """Make the step's rollout if it is the first of one; numbers for the log."""
        number, update = divmod(step, self.per_rollout)
        path, made = rollout_path(self.folder, number), dict[str, float]()
        if update == 0:
            made = self._make(number, path, model, ranks, stop)
        if self.current is None or self.current.number != number:
            try:
                self.current = Rollout(path, number)
            except UserError as error:
                raise UserError(
                    f"{error}; step {step + 1} trains it, and the weights that sampled it are "
                    f"gone: remove the states after step {step - update} from "
                    f"{self.folder.parent / 'state'}, and --resume makes it again"
                ) from None
            lines = self.current.store.documents["line"]
            self.known[number] = self.current.by_segment(lines)
        return made

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        number, update = divmod(step, self.per_rollout)
        assert self.current is not None
        assert self.current.number == number, "before_step opens the rollout"
        return self._batches(self.current, update, number // self.rollouts_per_epoch)

    def _batches(self, rollout: Rollout, update: int, epoch: int) -> list[Batch]:
        update %= self.config.updates
        return rollout.batches(update, self.ranks, self.config.micro_rows, epoch)

    def dry_steps(self, model: nn.Module) -> list[list[Batch]]:
        """This rank's micro-batches of a rollout whose replies are all as long as they may be."""
        most = policy_of(model).config.max_positions
        groups = list[list[Sample]]()
        for number in self._chosen(0):
            n = min(self.config.max_new_tokens, most - len(self.prompts.prompts[number].ids))
            reply = Reply([self._pad_id] * n, [0.0] * n, True)
            worth = [float(k % 2) for k in range(self.config.group_size)]
            groups.append([Sample(number, reply, reward, {}) for reward in worth])
        layout = self._lay_out(groups)
        places, _ = self._completed(layout, model, Ranks(device=self.ranks.device))
        with tempfile.TemporaryDirectory() as folder:
            path = rollout_path(Path(folder), 0)
            write_rollout(path, layout, self.prompts, places, {})
            rollout = Rollout(path, 0)
            return [self._batches(rollout, update, 0) for update in range(len(layout.ends))]

    def dry_rollout(self, model: nn.Module) -> None:
        """Generate and judge a cohort of the longest replies to the longest prompts."""
        policy, config, size = policy_of(model), self.config, self.config.group_size
        n_prompts = min(config.batch_size, len(self.prompts))
        longest = sorted(self.prompts.prompts, key=lambda prompt: -len(prompt.ids))
        cohort = longest[: len(cohorts_of(n_prompts, size, config.cohort)[0])]
        if self.sampler.remote is None:
            ids = [prompt.ids for prompt in cohort for _ in range(size)]
            fill_cache(policy, ids, config.max_new_tokens, config.temperature, len(ids))
        for prompt in cohort:
            n = min(config.max_new_tokens, policy.config.max_positions - len(prompt.ids))
            reply = Reply([self._pad_id] * n, [0.0] * n, True)
            answers = [Answer(prompt, reply, "")] * size
            for reward in self.sampler.rewards:
                if not isinstance(reward.score, PythonReward):  # which others may count
                    reward.score(answers)

    def _make(
        self, number: int, path: Path, model: nn.Module, ranks: Ranks, stop: Stop
    ) -> dict[str, float]:
        self.current = None
        policy, meeting, remote = policy_of(model), Meeting(stop, ranks), self.sampler.remote
        whole = remote is None and is_sharded(model)  # then all ranks make each forward pass
        share = Ranks(device=ranks.device) if whole else ranks
        if remote is not None:
            remote.sync(policy, number, ranks)
        chosen = self._chosen(number)
        groups = self.sampler.groups(policy, chosen, number, share, meeting)
        asked = {*chosen}
        for turn in range(REFILLS if self.config.refill else 0):
            wanted = len(chosen) - len(live := [g for g in groups if _is_informative(g)])
            others = self._others(number, turn, asked, wanted)
            if not others:
                break
            groups = live + self.sampler.groups(policy, others, number, share, meeting)
            asked.update(others)
        metrics = numbers_of(groups, len(asked))
        layout = self._lay_out(groups[: len(chosen)])
        places, more = self._completed(layout, model, ranks)
        metrics |= more
        failed = ""
        if ranks.first:
            try:
                self._write(path, number, layout, places)
            except UserError as error:
                failed = str(error)
        if failed := from_first(failed, ranks, ranks.setup):
            raise UserError(failed)
        self._report(metrics)
        return metrics

    @property
    def _pad_id(self) -> int:
        tokenizer = self.sampler.chat.tokenizer
        return tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id or 0

    def _lay_out(self, groups: Sequence[Sequence[Sample]]) -> Layout:
        return lay_out(groups, self.prompts, self.config, self._pad_id)

    def _completed(self, layout: Layout, model: nn.Module, ranks: Ranks) -> Completed:
        return ({}, {}) if self.complete is None else self.complete(layout, model, ranks)

    def _chosen(self, number: int) -> list[int]:
        """The prompts of a rollout."""
        size, seed = self.config.batch_size, self.config.seed
        return global_batch_rows(len(self.prompts), size, seed, number).tolist()

    def _others(self, number: int, turn: int, used: set[int], wanted: int) -> list[int]:
        """Further prompts for a rollout, by (seed, rollout, turn)."""
        order = np.random.default_rng((self.config.seed, number, turn)).permutation(
            len(self.prompts)
        )
        return [int(i) for i in order if int(i) not in used][:wanted]

    def _write(
        self, path: Path, number: int, layout: Layout, places: Mapping[str, np.ndarray]
    ) -> None:
        """Write rollout `number`, and remove those that are neither among the newest so many up to
        it nor needed by a saved state."""
        tokenizer = self.sampler.chat.tokenizer
        attrs = {
            "tokenizer_hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": self._pad_id,
            # where `whet inspect` finds the tokens' texts
            "settings": {"tokenizer": str(self.config.tokenizer or self.config.model)},
        }
        write_rollout(path, layout, self.prompts, places, attrs)
        steps = [int(state.name[5:]) for state in saved_states(self.folder.parent / "state")]
        needed = {step // self.per_rollout for step in steps if step % self.per_rollout}
        for old, file in rollout_files(self.folder):
            if old <= number - self.config.keep_rollouts and old not in needed:
                file.unlink(missing_ok=True)

    def _report(self, metrics: Mapping[str, float]) -> None:
        if metrics["truncated"] > MANY and not self.reported_cut and not self.sampler.quiet:
            self.reported_cut = True
            say(
                f"note: {metrics['truncated']:.0%} of the replies were cut at --max_new_tokens "
                f"{self.config.max_new_tokens}; if they need more, raise it"
            )

    # What the ledger asks: documents are the prompts.

    @property
    def fingerprint(self) -> str:
        """Of the prompts."""
        return self.prompts.fingerprint

    def __len__(self) -> int:
        return len(self.prompts)

    def numbers(self, rows: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """The prompt of document `segments[i]`, from 1, of row `rows[i]`."""
        found = np.zeros(len(rows), np.int64)
        for number in np.unique(rows // ROWS):
            here = rows // ROWS == number
            table = self.known[int(number)]
            found[here] = table[rows[here] % ROWS, segments[here]]
        for old in sorted(self.known)[:-64]:
            del self.known[old]
        return found

    def places(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """File and line of prompts."""
        return self.prompts.places(numbers)

    def find(self, file: str, line: int) -> np.ndarray:
        """The prompts of a line."""
        return self.prompts.find(file, line)


def numbers_of(groups: Sequence[Sequence[Sample]], asked: int) -> dict[str, float]:
    """What is logged of a rollout's samples; `asked` groups were sampled for it."""
    samples = [sample for group in groups for sample in group]
    rewards = np.array([sample.reward for sample in samples])
    lengths = [len(sample.reply.ids) for sample in samples]
    live = sum(_is_informative(group) for group in groups)
    parts = {
        f"reward/{name}": float(np.mean([sample.parts[name] for sample in samples]))
        for name in samples[0].parts
    }
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        **parts,
        "informative": live / len(groups),
        "prompts_asked": float(asked),
        "truncated": float(np.mean([not sample.reply.stopped for sample in samples])),
        "reply_tokens": float(np.mean(lengths)),
        "entropy": -float(np.mean([x for sample in samples for x in sample.reply.logp])),
    }


def _is_informative(group: Sequence[Sample]) -> bool:
    return len({sample.reward for sample in group}) > 1
