"""Generation with the cache gives what a forward pass over the whole text gives."""

from collections.abc import Callable, Iterator

import torch

from whet.doctor.finding import Finding, judge, worse
from whet.doctor.subject import Subject, prompt_of
from whet.generate.engine import evaluating, generate

NEW_TOKENS = 16
PROMPTS = 5
BOUND = 1e-3
"""By how much, in natural logarithms, a chosen token may lie below the likeliest: where two are
equally likely, rounding chooses."""


@torch.no_grad()
def cache_equals_none(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Greedy replies of the batched engine, judged by the logits of a forward without cache."""
    device = subject.settings[0].device
    model = subject.model.to(device)
    room = max(1, model.config.max_positions - NEW_TOKENS)
    prompts = [prompt_of(document)[:room] for document in subject.trained[:PROMPTS]]
    # Fewer rows than prompts: rows of the cache are used again.
    replies = generate(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=(), batch_size=2)
    worst = 0.0
    with evaluating(model):
        for prompt, reply in zip(prompts, replies, strict=True):
            text = torch.tensor([prompt + reply], device=device)
            logits = model(text)[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, text[0, len(prompt) :, None])[:, 0]
            worst = worse(worst, float((logits.amax(1) - chosen).max()))
    count = sum(map(len, replies))
    note = f"{count} tokens of {len(prompts)} replies, {subject.settings[0].name}"
    yield judge("the cache chooses the tokens that no cache would", worst, BOUND, note)
