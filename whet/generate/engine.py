"""Batched decoding with a cache.

Each prompt takes one of the running `Rows`. When its reply has ended, the next prompt follows.
Prompts run longest first, since those that start together are padded to the longest of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from whet.errors import UserError
from whet.generate.rows import Piece, Row, Rows, Sampling
from whet.model.decoder import Transformer
from whet.progress import Progress

CHECK_EVERY = {"cpu": 1, "cuda": 16}
"""Steps between two looks at the tokens, by device: on a CPU a look costs nothing."""


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
    pieces = _decode(model, prompts, max_new_tokens, stop_ids, sampling, batch_size)
    return [ids for ids, _ in _whole(pieces, len(prompts), progress)]


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
    sampling = Sampling(temperature)
    pieces = _decode(model, prompts, max_new_tokens, stop_ids, sampling, batch_size, keys=keys)
    return [
        Reply(ids, logp, bool(ids) and ids[-1] in set(stop_ids))
        for ids, logp in _whole(pieces, len(prompts), progress)
    ]


def _whole(
    pieces: Iterable[Piece], count: int, progress: Progress | None
) -> list[tuple[list[int], list[float]]]:
    """The tokens of each reply, and their log-probabilities, of its pieces."""
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in range(count)]
    for piece in pieces:
        ids, logp = found[piece.index]
        ids += piece.tokens
        logp += piece.logp
        if piece.ended and progress is not None:
            progress.advance(1)
    return found


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
) -> Iterator[int]:
    """The tokens of one reply as they come; else as `generate`."""
    for piece in _decode(
        model, [prompt], max_new_tokens, stop_ids, sampling, batch_size=1, check_every=1
    ):
        yield from piece.tokens


def _decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    check_every: int | None = None,
    keys: Sequence[tuple[int, ...]] | None = None,
) -> Iterator[Piece]:
    """The next tokens of some reply, until all have ended; with `keys` their log-probabilities."""
    ends = [
        len(prompt) + _room(model, prompt, i, max_new_tokens) for i, prompt in enumerate(prompts)
    ]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # taken from its end
    measured = sampling.temperature if keys else None
    slots = max(ends, default=0)
    rows = Rows(model, batch_size, slots, max_new_tokens, set(stop_ids), measured)
    keys = keys or [(sampling.seed, i) for i in range(len(prompts))]
    check_every = check_every or CHECK_EVERY.get(rows.device.type, 1)
    if max_new_tokens < 1:
        yield from (Piece(i, [], [], True, []) for i in waiting)
        return
    with evaluating(model):
        while waiting or rows.live:
            first = max(0, len(waiting) + len(rows.live) - batch_size)
            joining = [
                Row(i, keys[i], list(prompts[i]), ends[i], sampling) for i in waiting[first:]
            ]
            del waiting[first:]
            while joining:
                yield from rows.begin(rows.take(joining))
            if rows.live:
                yield from rows.step(check_every)


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
