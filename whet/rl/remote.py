"""Rollouts by a running server (`--rollout_url`) in place of the embedded engine.

Before each rollout the server gets the weights of this step through a folder that both see: the
whole model, or an adapter under a name that it never had, since servers remember names. Whether it
answers with them is asked, not believed: `sync` compares its ln p of a prompt's tokens, and of some
that it samples after them, with the trainer's.

The server's kernels and precision are not the trainer's, so its ln p of a token is not quite that
of the model in training; the loss corrects for it (`policy_loss.truncated_ratio`).
"""

import secrets
import shutil
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from whet.errors import UserError
from whet.generate.engine import Reply, evaluating
from whet.generate.sample import log_probabilities
from whet.progress import Progress
from whet.rl.server import Request, Server
from whet.train.distributed import Ranks, from_first

CONNECTIONS = 256
"""Requests under way at once; the server makes its own batches of them."""
PROBE_PROMPT, PROBE_REPLY = 64, 8
"""Tokens of the probe: so many of a prompt, and so many that the server samples after them."""
BOUND = 0.1
"""By how much ln p of a probe token may differ on average: kernels in bf16 differ by hundredths,
other models by whole units."""
MOVED = 0.01
"""The steps of training are small, and stale weights stay below `BOUND` for long. But a server that
says bit for bit what it said when the trainer's ln p were so far away has not loaded anything."""
GROWN = 10.0
"""One that has loaded only a part shows it by a distance that is above `MOVED` and so many times
that of the first rollout: as far as kernels differ. vLLM 0.32.0 on a CPU reloads an embedding, for
one, but not the head that is tied to it."""

Write = Callable[[nn.Module, Path, dict[str, float]], None]


@dataclass
class Remote:
    """A server as the sampler of a run. Every rank has one."""

    server: Server
    config: Any
    """The flags of the stage."""
    write: Write
    """Write the model, or its adapter, into a directory; all ranks call it, rank 0 writes."""
    has_adapter: bool
    probe: Sequence[int]
    """The tokens of a prompt, of which ln p is compared."""
    max_positions: int
    stop_ids: tuple[int, ...]
    before: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    """ln p of the probe's prompt, of server and trainer, when the server's last changed."""
    usual: float | None = None
    """How far apart a token they were at the first rollout."""

    @property
    def folder(self) -> Path:
        """Where weights are handed over; the server must see it under the same path."""
        return self.config.out / "rollouts" / "weights"

    def connect(self, longest: int) -> str:
        """See that the server is there and fits, and name it. `longest`: tokens of a prompt.

        Raises UserError.
        """
        self.server.connect()
        wanted = min(longest + self.config.max_new_tokens, self.max_positions)
        if self.server.room is not None and self.server.room < wanted:
            raise self.server.error(
                f"takes texts of {self.server.room:,} tokens, prompt and reply need {wanted:,}: "
                "start it with a longer context, or lower --max_new_tokens"
            )
        name = {"vllm": "vLLM", "sglang": "SGLang"}[self.server.kind]
        return f"by {name} at {self.server.url}, {self.server.base}"

    def sync(self, policy: nn.Module, rollout: int, ranks: Ranks) -> None:
        """Give the server the weights of `policy`, and see that it answers with them.

        All ranks call it. Raises UserError, on all of them, if it fails or answers with others.
        """
        found: Any = None
        name = f"whet-{secrets.token_hex(4)}-{rollout:07d}" if self.has_adapter else "model"
        name = from_first(name, ranks, ranks.setup)
        directory = (self.folder / name).resolve()
        try:
            self.write(policy, directory, {})
            if ranks.first and self.has_adapter:
                self.server.load_adapter(name, directory)
            elif ranks.first:
                self.server.load_model(directory)
            if ranks.first:
                request = self._request(list(self.probe)[-PROBE_PROMPT:], PROBE_REPLY, 1, 0)
                found = (request.ids, *self.server.judge(request))
        except UserError as error:
            found = str(error)
        found = from_first(found, ranks, ranks.setup)
        if isinstance(found, str):
            raise UserError(found)
        ids, fixed, reply = found
        own = self._own(policy, ids, reply.ids)
        if wrong := from_first(self._verdict(fixed, reply, own), ranks, ranks.setup):
            raise self.server.error(wrong)
        self.server.adapter = name if self.has_adapter else ""
        for old in self.folder.iterdir() if ranks.first else ():  # a killed run has left its own
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)

    def sample(
        self,
        cohorts: Sequence[Sequence[tuple[list[int], tuple[int, ...]]]],
        group_size: int,
        progress: Progress,
    ) -> Generator[list[Reply]]:
        """Of cohorts of (prompt, key) the replies, cohort by cohort; all are asked for at once.

        What is sampled depends on the key, as far as the server keeps to its seed. Raises UserError
        for a server that is dead, slow, or answers something else.
        """
        count, most = sum(map(len, cohorts)), self.config.max_new_tokens
        pool = ThreadPoolExecutor(min(CONNECTIONS, max(1, count)))
        try:
            running = [
                [
                    pool.submit(
                        self.server.sample,
                        self._request(ids, most, group_size, request_seed(key)),
                    )
                    for ids, key in cohort
                ]
                for cohort in cohorts
            ]
            for cohort in running:
                replies = list[Reply]()
                for group in cohort:
                    replies += group.result()
                    progress.advance(group_size)
                yield replies
        except BaseException:  # a signal, too: nobody waits for replies that nobody wants
            self.server.stop()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _request(self, ids: list[int], room: int, n: int, seed: int) -> Request:
        room = min(room, self.max_positions - len(ids))
        return Request(ids, n, room, self.config.temperature, self.stop_ids, seed)

    @torch.no_grad()
    def _own(self, policy: Any, ids: list[int], reply: list[int]) -> list[float]:
        """The trainer's ln p of all but the first token; of the reply's at the temperature."""
        tokens = torch.tensor([ids + reply], device=next(policy.parameters()).device)
        with evaluating(policy):
            logits = policy(tokens)[0, :-1].float()
        cut, targets = len(ids) - 1, tokens[0, 1:]
        fixed = log_probabilities(logits[:cut], targets[:cut], 1.0)
        drawn = log_probabilities(logits[cut:], targets[cut:], self.config.temperature)
        return torch.cat([fixed, drawn]).tolist()

    def _verdict(self, fixed: list[float], reply: Reply, own: list[float]) -> str:
        """What is wrong with the server's numbers; nothing if they are the trainer's."""
        ours, drawn = own[: len(fixed)], own[len(fixed) :]
        if fixed != self.before[0]:
            self.before = fixed, ours
        gap = _distance(fixed, ours)
        self.usual = gap if self.usual is None else self.usual
        unmoved = _distance(ours, self.before[1]) > MOVED
        partly = gap > max(MOVED, GROWN * self.usual)
        if unmoved or partly or not gap <= BOUND:
            base = "; is it the server of --model's base?" if self.has_adapter else ""
            return (
                "the server answers with other weights: its ln p of a prompt's tokens are "
                f"{np.mean(fixed):.4f} on average{', as before' * unmoved}, the trainer's "
                f"{np.mean(ours):.4f}, {gap:.2g} apart a token, {self.usual:.2g} at the first "
                f"rollout{base}"
            )
        if not (gap := _distance(reply.logp, drawn)) <= BOUND:
            return (
                f"the log-probs of its samples are {np.mean(reply.logp):.4f} on average, the "
                f"trainer's at --temperature {self.config.temperature:g} {np.mean(drawn):.4f}: "
                "vLLM needs --logprobs-mode processed_logprobs, SGLang an environment without "
                "SGLANG_RETURN_ORIGINAL_LOGPROB; or it samples by keys cached with other weights"
            )
        return ""


def request_seed(key: Sequence[int]) -> int:
    """The seed of a group from (seed, rollout, prompt), below 2^62."""
    low, high = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return (int(high) & 0x3FFFFFFF) << 32 | int(low)


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference; 0 of nothing."""
    return float(np.abs(np.subtract(one, other)).mean()) if len(one) else 0.0
