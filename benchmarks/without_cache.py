"""The definition of decoding: every token from a forward pass over the whole text."""

from collections.abc import Sequence

import torch

from whet.generate.engine import evaluating
from whet.generate.rows import GREEDY, Sampling, choose, padded
from whet.generate.sample import uniforms
from whet.model.decoder import Transformer


def generate_without_cache(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """What `generate` must equal: every token from a forward over the whole text so far."""
    device = next(model.parameters()).device
    texts = [list(prompt) for prompt in prompts]
    limit = model.config.max_positions
    room = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    draws = torch.stack([uniforms((sampling.seed, i), max_new_tokens) for i in range(len(prompts))])
    live = [i for i in range(len(prompts)) if room[i] > 0]
    with torch.no_grad(), evaluating(model):
        while live:
            tokens, last = padded([texts[i] for i in live], device)
            segments = torch.arange(tokens.shape[1], device=device) <= last
            logits = model(tokens, segments=segments.long(), logits_at=last)[:, 0]
            step = torch.tensor([len(texts[i]) - len(prompts[i]) for i in live])
            uniform = draws[live].gather(1, step[:, None])[:, 0].to(device)
            chosen = choose(logits, uniform, sampling).tolist()
            for i, token in zip(live, chosen, strict=True):
                texts[i].append(token)
            live = [
                i
                for i, token in zip(live, chosen, strict=True)
                if token not in stop_ids and len(texts[i]) < len(prompts[i]) + room[i]
            ]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
