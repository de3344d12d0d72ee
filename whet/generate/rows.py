"""The running sequences of batched decoding.

Each sequence takes a row of the cache. A step computes one token for every row. Sequences join at
any time while a row is free (`begin`), and leave when they have ended or are given up (`leave`).
The last row then moves into the gap, so that all computed rows are live. Each row has settings of
its own.

The host looks at the tokens once a `step` only: on a GPU that is the one time it waits. What a row
produced after its stop token is cut then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from whet.errors import UserError
from whet.generate.cache import Cache
from whet.generate.sample import likeliest, log_probabilities, next_tokens, uniforms
from whet.model.decoder import Transformer

PREFILL_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""Prompt tokens, padding included, in one forward, by device: bounds its memory. Few of them, as
fast on a CPU, are padded less, since prompts of about the same length run together."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; see `sample.next_tokens`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Piece:
    """The next tokens of a reply."""

    index: int
    """Of its row's sequence."""
    tokens: list[int]
    logp: list[float]
    """Of each token; empty if none are measured."""
    ended: bool
    top: list[list[tuple[int, float]]]
    """For each token the likeliest ones and their ln p, as many as any running row asks for."""


@dataclass
class Row:
    """One running sequence, as the host knows it."""

    index: int
    """By which its pieces are known."""
    key: tuple[int, ...]
    """What it draws from."""
    text: list[int]
    """Prompt and reply so far."""
    end: int
    """Length of prompt and reply at which it has to end."""
    sampling: Sampling
    top: int = 0
    """How many of the likeliest tokens are wanted at each place."""
    length: int = 0
    """Length of prompt and reply so far."""


class Chosen(NamedTuple):
    """The next T tokens of B rows."""

    tokens: Tensor
    """(B, T)."""
    logp: Tensor
    """(B, T)."""
    top_ids: Tensor
    """(B, T, K)."""
    top_logp: Tensor
    """(B, T, K)."""


class Rows:
    """The running sequences: row b of each tensor and of the cache is sequence `live[b]`.

    `slots` bounds prompt and reply, `max_new_tokens` the reply. ln p is that of
    softmax(logits / `measured`), and is not computed if that is None.
    """

    def __init__(
        self,
        model: Transformer,
        rows: int,
        slots: int,
        max_new_tokens: int,
        stop_ids: set[int],
        measured: float | None = None,
    ) -> None:
        self.model = model
        self.measured = measured
        self.stop_ids = stop_ids
        self.device = next(model.parameters()).device
        self.live: list[Row] = []
        self.switch = _switch(model)
        self.cache = Cache(rows, slots)
        self.number = torch.arange(rows, device=self.device)
        self.token = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.position = torch.zeros(rows, dtype=torch.long, device=self.device)
        """Where `token` stands, which the next step feeds."""
        self.draws = torch.zeros(rows, max_new_tokens, device=self.device)
        self.drawn = torch.zeros(rows, dtype=torch.long, device=self.device)

    def take(self, waiting: list[Row]) -> list[Row]:
        """Take from the end of `waiting`, shortest first, those that begin in one forward."""
        most = PREFILL_TOKENS.get(self.device.type, 2_048)
        fits = max(1, most // len(waiting[-1].text))
        # Padded together, all would count as long as the longest.
        count = sum(len(row.text) > self.switch for row in waiting[-fits:]) or fits
        group = waiting[-count:][::-1]
        del waiting[-count:]
        return group

    @torch.no_grad()
    def begin(self, group: list[Row]) -> list[Piece]:
        """Run the prompts of `group` in new rows and choose the first token of each.

        Raises UserError for a model whose weights are NaN.
        """
        new = slice(len(self.live), len(self.live) + len(group))
        texts = list(dict.fromkeys(tuple(row.text) for row in group))  # those of a group are alike
        number = {text: i for i, text in enumerate(texts)}
        each = torch.tensor([number[tuple(row.text)] for row in group], device=self.device)
        tokens, last = padded(texts, self.device)
        cache = self.cache.fill(self.number[new], each)
        logits = self.model(tokens, cache=cache, logits_at=last)[each, 0]
        if logits.isnan().any():
            raise UserError(
                "the model's logits are no numbers (NaN): its files are damaged, or its training "
                "has diverged"
            )
        if any(row.sampling.temperature > 0 for row in group):
            count = self.draws.shape[1]
            draws = torch.stack([uniforms(row.key, count) for row in group])
            self.draws[new] = draws.to(self.device)
        self.drawn[new] = 0
        self.position[new] = last[each, 0]
        self.live += group
        for row in group:
            row.length = len(row.text)
        return self._settle(_joined([self._advance(logits, new, self._alike(new))]), new.start)

    def step(self, count: int) -> list[Piece]:
        """Choose at most `count` more tokens for each row; only then look at them."""
        count = min(count, max(row.end - row.length for row in self.live))
        count = self._switched(count)
        return self._settle(self.run(count))

    def leave(self, index: int) -> None:
        """Give up the sequence `index`, if it still runs."""
        for b, row in enumerate(self.live):
            if row.index == index:
                return self._drop(b)
        return None

    @torch.no_grad()
    def _switched(self, count: int) -> int:
        """Recompute the cache of rows that pass `switch` now: their earlier keys differ then.

        Returns how many of `count` steps can be taken before the next row does.
        """
        due = [b for b, row in enumerate(self.live) if row.length == self.switch + 1]
        if due:
            tokens, last = padded([self.live[b].text for b in due], self.device)
            cache = self.cache.fill(self.number[due], self.number[: len(due)])
            self.model(tokens, cache=cache, logits_at=last)
        left = [self.switch + 1 - row.length for row in self.live]
        return min([count, *(n for n in left if n > 0)])

    @torch.no_grad()
    def run(self, count: int) -> Chosen:
        """The next `count` tokens of each row. Never waits for the device."""
        longest = max(row.length for row in self.live)
        live = slice(0, len(self.live))
        alike = self._alike(live)
        chosen = []
        for done in range(count):
            seen = min(longest + done, self.cache.slots)
            cache = self.cache.extend(self.number[live], seen)
            logits = self.model(self.token[live, None], self.position[live, None], cache=cache)
            chosen.append(self._advance(logits[:, 0], live, alike))
        return _joined(chosen)

    def _alike(self, rows: slice) -> list[tuple[Sampling, slice | Tensor]]:
        """The settings of `rows`, and which of these rows have them."""
        found: dict[Sampling, list[int]] = {}
        for place, row in enumerate(self.live[rows]):
            found.setdefault(row.sampling, []).append(place)
        if len(found) == 1:  # without a tensor, for which the host would wait
            return [(sampling, slice(None)) for sampling in found]
        return [(each, torch.tensor(at, device=self.device)) for each, at in found.items()]

    def _advance(
        self, logits: Tensor, rows: slice, alike: list[tuple[Sampling, slice | Tensor]]
    ) -> Chosen:
        """Choose the next token of `rows` from `logits` (B, V)."""
        uniform = self.draws[rows].gather(1, self.drawn[rows, None])[:, 0]
        token = self.token.new_empty(len(logits))
        for sampling, places in alike:
            token[places] = choose(logits[places], uniform[places], sampling)
        self.token[rows] = token
        # A row that has ended goes on until the host looks; it must not leave its buffers.
        self.position[rows] = (self.position[rows] + 1).clamp(max=self.cache.slots - 1)
        self.drawn[rows] = (self.drawn[rows] + 1).clamp(max=self.draws.shape[1] - 1)
        logp = logits.new_zeros(len(logits), dtype=torch.float32)
        if self.measured is not None:
            logp = log_probabilities(logits, token, self.measured)
        top = max(row.top for row in self.live[rows])
        return Chosen(token, logp, *likeliest(logits, top, self.measured or 1.0))

    def _settle(self, chosen: Chosen, first: int = 0) -> list[Piece]:
        """Cut what was `chosen` for the rows from `first` on at the replies' ends; drop those."""
        pieces = []
        found = chosen.tokens.tolist()
        numbers = [[]] * len(found) if self.measured is None else chosen.logp.tolist()
        ids, logp = chosen.top_ids.tolist(), chosen.top_logp.tolist()
        # Backwards: the last row, which moves into a gap, has then been dealt with.
        for b in reversed(range(first, len(self.live))):
            row, place = self.live[b], b - first
            tokens = found[place][: row.end - row.length]
            stop = next((i for i, t in enumerate(tokens) if t in self.stop_ids), None)
            if stop is not None:
                tokens = tokens[: stop + 1]
            row.length += len(tokens)
            row.text += tokens
            ended = stop is not None or row.length == row.end
            count = len(tokens)
            pairs = zip(ids[place][:count], logp[place][:count], strict=True)
            top = [list(zip(*each, strict=True)) for each in pairs]
            pieces.append(Piece(row.index, tokens, numbers[place][:count], ended, top))
            if ended:
                self._drop(b)
        return pieces

    def _drop(self, b: int) -> None:
        moved = self.live.pop()
        last = len(self.live)
        if b == last:
            return
        self.live[b] = moved
        self.cache.move(last, b, moved.length)
        for state in (self.token, self.position, self.draws, self.drawn):
            state[b] = state[last]


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row: logits (B, V), uniform (B,) -> ids (B,)."""
    return next_tokens(
        logits,
        uniform,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens (B, T), padded on the right with 0, and the place of each text's last, (B, 1)."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
    return tokens, torch.tensor([[len(text) - 1] for text in texts], device=device)


def _joined(steps: list[Chosen]) -> Chosen:
    """Steps (B,) and (B, K), one after another."""
    return Chosen(*(torch.stack(parts, dim=1) for parts in zip(*steps, strict=True)))


def _switch(model: Transformer) -> int:
    """The length beyond which rotary positions of all tokens of a text, earlier ones too, differ
    (longrope)."""
    ropes = getattr(model.config, "ropes", ())
    found = [rope.original_positions for rope in ropes if rope and rope.kind == "longrope"]
    return min(found, default=1 << 62)
