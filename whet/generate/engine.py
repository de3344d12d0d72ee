"""Batched decoding with a cache.

Each prompt takes a row of the cache. A step computes one token for every row. A row whose reply has
ended is given to the next prompt; when none is left, the last row moves into the gap, so that all
computed rows are live. Prompts run longest first, since those that start together are padded to the
longest of them.

The host looks at the tokens every `CHECK_EVERY` steps only: on a GPU that is the one time it waits.
What a row produced behind its stop token is cut then.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whet.errors import UserError
from whet.generate.cache import Cache
from whet.generate.sample import log_probabilities, next_tokens, uniforms
from whet.model.decoder import Transformer
from whet.progress import Progress

CHECK_EVERY = {"cpu": 1, "cuda": 16}
"""Steps between two looks at the tokens, by device: on a CPU a look costs nothing."""
PREFILL_TOKENS = 16_384
"""Prompt tokens, padding included, in one forward: bounds its memory."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; see `sample.next_tokens`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What `sample` gives for a prompt."""

    ids: list[int]
    """With the stop token, if it was reached."""
    logp: list[float]
    """ln p of each of them under softmax(logits / temperature)."""
    stopped: bool
    """Whether it ends with a stop token; else it was cut."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The reply to each prompt, as ids; the stop token stands at its end if it was reached.

    A reply ends at a token of `stop_ids`, after `max_new_tokens`, or where prompt and reply fill
    the model's `max_positions`. Temperature 0 is greedy. What is sampled for prompt i depends on
    `seed` and i alone, not on the batch. At most `batch_size` prompts run at once. `progress`
    advances by one for each finished prompt.

    Raises UserError for a prompt that leaves no room for a reply.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    replies: list[list[int]] = [[] for _ in prompts]
    for piece in _decode(model, prompts, max_new_tokens, stop_ids, sampling, batch_size):
        replies[piece.index].extend(piece.tokens)
        if piece.ended and progress is not None:
            progress.advance(1)
    return replies


def sample(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Reply]:
    """A reply to each prompt with the log-probability of each token, as training on it needs.

    What is sampled for a prompt depends on its key alone. There is no top-k and no top-p: the
    trainer's probabilities are those of the whole vocabulary. Else as `generate`.
    """
    ids: list[list[int]] = [[] for _ in prompts]
    logp: list[list[float]] = [[] for _ in prompts]
    sampling = Sampling(temperature)
    for piece in _decode(model, prompts, max_new_tokens, stop_ids, sampling, batch_size, keys=keys):
        ids[piece.index] += piece.tokens
        logp[piece.index] += piece.logp
        if piece.ended and progress is not None:
            progress.advance(1)
    stops = set(stop_ids)
    return [
        Reply(reply, numbers, bool(reply) and reply[-1] in stops)
        for reply, numbers in zip(ids, logp, strict=True)
    ]


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
) -> Iterator[int]:
    """The tokens of one reply as they come; as `generate` otherwise."""
    for piece in _decode(
        model, [prompt], max_new_tokens, stop_ids, sampling, batch_size=1, check_every=1
    ):
        yield from piece.tokens


def generate_without_cache(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling = Sampling(),
) -> list[list[int]]:
    """What `generate` must equal: every token from a forward over the whole text so far."""
    device = next(model.parameters()).device
    texts = [list(prompt) for prompt in prompts]
    room = [_room(model, prompt, i, max_new_tokens) for i, prompt in enumerate(prompts)]
    draws = torch.stack([_draws((sampling.seed, i), max_new_tokens) for i in range(len(prompts))])
    live = [i for i in range(len(prompts)) if room[i] > 0]
    with torch.no_grad(), evaluating(model):
        while live:
            tokens, last = _padded([texts[i] for i in live], device)
            segments = torch.arange(tokens.shape[1], device=device) <= last
            logits = model(tokens, segments=segments.long(), logits_at=last)[:, 0]
            step = torch.tensor([len(texts[i]) - len(prompts[i]) for i in live])
            uniform = draws[live].gather(1, step[:, None])[:, 0].to(device)
            chosen = _choose(logits, uniform, sampling).tolist()
            for i, token in zip(live, chosen, strict=True):
                texts[i].append(token)
            live = [
                i
                for i, token in zip(live, chosen, strict=True)
                if token not in stop_ids and len(texts[i]) < len(prompts[i]) + room[i]
            ]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@dataclass(frozen=True)
class _Piece:
    """The next tokens of a reply."""

    index: int
    """Of its prompt."""
    tokens: list[int]
    logp: list[float]
    """Of each token; empty if no keys were given."""
    ended: bool


def _decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    check_every: int | None = None,
    keys: Sequence[tuple[int, ...]] | None = None,
) -> Iterator[_Piece]:
    """The next tokens of some reply, until all have ended; with `keys` their log-probabilities."""
    ends = [
        len(prompt) + _room(model, prompt, i, max_new_tokens) for i, prompt in enumerate(prompts)
    ]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # taken from its end
    rows = _Rows(
        model, sampling, batch_size, max(ends, default=0), max_new_tokens, set(stop_ids), bool(keys)
    )
    keys = keys or [(sampling.seed, i) for i in range(len(prompts))]
    check_every = check_every or CHECK_EVERY.get(rows.device.type, 1)
    if max_new_tokens < 1:
        yield from (_Piece(i, [], [], True) for i in waiting)
        return
    with evaluating(model):
        while waiting or rows.live:
            while waiting and len(rows.live) < batch_size:
                fits = max(1, PREFILL_TOKENS // len(prompts[waiting[-1]]))
                count = min(batch_size - len(rows.live), fits, len(waiting))
                # Padded together, all would count as long as the longest.
                count = sum(len(prompts[i]) > rows.switch for i in waiting[-count:]) or count
                group = [
                    _Row(i, keys[i], list(prompts[i]), ends[i]) for i in reversed(waiting[-count:])
                ]
                del waiting[-count:]
                yield from rows.begin(group)
            if rows.live:
                yield from rows.step(check_every)


@dataclass
class _Row:
    """One running sequence, as the host knows it."""

    index: int
    key: tuple[int, ...]
    """What it draws from."""
    text: list[int]
    """Prompt and reply so far."""
    end: int
    """Length of prompt and reply at which it has to end."""
    length: int = 0
    """Length of prompt and reply so far."""


class _Rows:
    """The running sequences: row b of each tensor and of the cache is sequence `live[b]`."""

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        rows: int,
        slots: int,
        max_new_tokens: int,
        stop_ids: set[int],
        with_logp: bool,
    ) -> None:
        self.model = model
        self.with_logp = with_logp
        self.sampling = sampling
        self.stop_ids = stop_ids
        self.device = next(model.parameters()).device
        self.live: list[_Row] = []
        self.switch = _switch(model)
        self.cache = Cache(rows, slots)
        self.number = torch.arange(rows, device=self.device)
        self.token = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.position = torch.zeros(rows, dtype=torch.long, device=self.device)
        """Where `token` stands, which the next step feeds."""
        self.logp = torch.zeros(rows, device=self.device)
        """ln p of `token`."""
        self.draws = torch.zeros(rows, max_new_tokens, device=self.device)
        self.drawn = torch.zeros(rows, dtype=torch.long, device=self.device)

    @torch.no_grad()
    def begin(self, group: list[_Row]) -> list[_Piece]:
        """Run the prompts of `group` in new rows and choose the first token of each."""
        new = slice(len(self.live), len(self.live) + len(group))
        self.live += group
        tokens, last = _padded([row.text for row in group], self.device)
        cache = self.cache.fill(self.number[new])
        logits = self.model(tokens, cache=cache, logits_at=last)[:, 0]
        if self.sampling.temperature > 0:
            count = self.draws.shape[1]
            draws = torch.stack([_draws(row.key, count) for row in group])
            self.draws[new] = draws.to(self.device)
        self.drawn[new] = 0
        self.position[new] = last[:, 0]
        for row in group:
            row.length = len(row.text)
        self._advance(logits, new)
        return self._settle(self.token[new, None], self.logp[new, None], new.start)

    def step(self, count: int) -> list[_Piece]:
        """Choose at most `count` more tokens for each row; only then look at them."""
        count = min(count, max(row.end - row.length for row in self.live))
        count = self._switched(count)
        return self._settle(*self.run(count))

    @torch.no_grad()
    def _switched(self, count: int) -> int:
        """Make the cache anew for rows that pass `switch` now: their earlier keys turn otherwise.

        Returns how many of `count` steps can be taken before the next row does.
        """
        due = [b for b, row in enumerate(self.live) if row.length == self.switch + 1]
        if due:
            tokens, last = _padded([self.live[b].text for b in due], self.device)
            cache = self.cache.fill(self.number[due])
            self.model(tokens, cache=cache, logits_at=last)
        left = [self.switch + 1 - row.length for row in self.live]
        return min([count, *(n for n in left if n > 0)])

    @torch.no_grad()
    def run(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` tokens (B, count) of each row and their ln p. Never waits for the
        device."""
        longest = max(row.length for row in self.live)
        live = slice(0, len(self.live))
        chosen, logp = list[Tensor](), list[Tensor]()
        for done in range(count):
            seen = min(longest + done, self.cache.slots)
            cache = self.cache.extend(self.number[live], seen)
            logits = self.model(self.token[live, None], self.position[live, None], cache=cache)
            self._advance(logits[:, 0], live)
            chosen.append(self.token[live].clone())
            logp.append(self.logp[live].clone())
        return torch.stack(chosen, dim=1), torch.stack(logp, dim=1)

    def _advance(self, logits: Tensor, rows: slice) -> None:
        """Choose the next token of `rows` from `logits` (B, V)."""
        uniform = self.draws[rows].gather(1, self.drawn[rows, None])[:, 0]
        self.token[rows] = _choose(logits, uniform, self.sampling)
        if self.with_logp:
            temperature = self.sampling.temperature
            self.logp[rows] = log_probabilities(logits, self.token[rows], temperature)
        # A row that has ended goes on until the host looks; it must not leave its buffers.
        self.position[rows] = (self.position[rows] + 1).clamp(max=self.cache.slots - 1)
        self.drawn[rows] = (self.drawn[rows] + 1).clamp(max=self.draws.shape[1] - 1)

    def _settle(self, chosen: Tensor, logp: Tensor, first: int = 0) -> list[_Piece]:
        """Cut what was `chosen` for the rows from `first` on at the replies' ends; drop those."""
        pieces = []
        found = chosen.tolist()
        numbers = logp.tolist() if self.with_logp else [[]] * len(found)
        # Backwards: the last row, which moves into a gap, has then been dealt with.
        for b in reversed(range(first, len(self.live))):
            row = self.live[b]
            tokens = found[b - first][: row.end - row.length]
            stop = next((i for i, t in enumerate(tokens) if t in self.stop_ids), None)
            if stop is not None:
                tokens = tokens[: stop + 1]
            row.length += len(tokens)
            row.text += tokens
            ended = stop is not None or row.length == row.end
            pieces.append(_Piece(row.index, tokens, numbers[b - first][: len(tokens)], ended))
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
        for state in (self.token, self.logp, self.position, self.draws, self.drawn):
            state[b] = state[last]


def _choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    return next_tokens(
        logits,
        uniform,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )


def _draws(key: tuple[int, ...], count: int) -> Tensor:
    return torch.from_numpy(uniforms(key, count))


def _padded(texts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens (B, T), padded on the right with 0, and the place of each text's last, (B, 1)."""
    longest = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
    return tokens, torch.tensor([[len(text) - 1] for text in texts], device=device)


def _switch(model: Transformer) -> int:
    """The length after which all tokens of a text, earlier ones too, turn otherwise (longrope)."""
    ropes = getattr(model.config, "ropes", ())
    found = [rope.original_positions for rope in ropes if rope and rope.kind == "longrope"]
    return min(found, default=1 << 62)


def _room(model: Transformer, prompt: Sequence[int], index: int, max_new_tokens: int) -> int:
    """How many tokens the reply may have."""
    if not prompt:
        raise UserError(
            f"prompt {index} has no tokens, so there is nothing to continue: the template writes "
            "nothing for it, or the tokenizer drops its text"
        )
    limit = model.config.max_positions
    if len(prompt) >= limit:
        raise UserError(
            f"prompt {index} has {len(prompt):,} tokens; prompt and reply together must fit the "
            f"model's {limit:,} positions: shorten it"
        )
    return min(max_new_tokens, limit - len(prompt))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and back to how it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
