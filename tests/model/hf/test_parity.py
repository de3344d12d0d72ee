"""Every family against transformers in float32: logits, gradients, packed rows, the cache."""

import pytest
import torch
import torch.nn.functional as F

from tests.model import zoo
from tests.model.list_cache import ListCache

LENGTHS = (23, 1, 14, 9)  # documents of one packed row; 23 is beyond each case's window and stretch


@pytest.fixture(params=zoo.CASES)
def case(request):
    return request.param


def documents(vocab_size=96):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (1, n), generator=generator) for n in LENGTHS]


def packed_row(parts):
    """tokens, segments (1, T) with three places of padding at the end."""
    tokens = torch.cat((*parts, torch.zeros(1, 3, dtype=torch.long)), 1)
    segments = [i + 1 for i, part in enumerate(parts) for _ in range(part.shape[1])] + [0] * 3
    return tokens, torch.tensor([segments])


def test_logits_and_gradients_equal_the_oracles(case):
    theirs = zoo.oracle(case)
    ours = zoo.whet_model(case, theirs)
    parts = documents()
    expected = [theirs(part).logits for part in parts]
    tokens, segments = packed_row(parts)

    logits = ours(tokens, segments=segments)
    alone = [ours(part) for part in parts]

    assert torch.allclose(torch.cat(alone, 1), torch.cat(expected, 1), atol=1e-4)
    assert torch.allclose(logits[:, :-3], torch.cat(expected, 1), atol=1e-4)
    assert expected[0].std() > 0.1  # a model that says nothing would agree with anything

    weight = torch.zeros(tokens.shape).index_fill_(1, torch.arange(4, 21), 0.5)
    weight[:, 26:38] = 1.0
    targets = tokens.roll(-1, 1)
    nll = F.cross_entropy(torch.cat(expected, 1)[0], targets[0, :-3], reduction="none")
    loss = (nll * weight[0, :-3]).sum()
    loss.backward()
    ours.zero_grad()
    result = ours(tokens, segments=segments, targets=targets, weight=weight)
    result.loss.backward()

    assert torch.allclose(result.loss, loss, rtol=1e-5)
    for name, mine, other in zoo.gradient_pairs(ours, theirs):
        assert (mine - other).norm() <= 1e-3 * other.norm() + 1e-7, name


@torch.no_grad()
def test_decoding_by_cache_equals_the_oracle(case):
    """Prompts of 9 and 4 tokens in one batch, then 8 tokens each: past windows, below stretches."""
    theirs = zoo.oracle(case)
    ours = zoo.whet_model(case, theirs)
    tokens = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([9, 4])
    rows = torch.arange(2)
    expected = theirs(tokens[:, :16]).logits  # 16: the shortest text after which a case stretches
    cache = ListCache(2, 24)
    logits = ours(tokens[:, :9], cache=cache, logits_at=lengths[:, None] - 1)
    for _ in range(8):
        assert torch.allclose(logits[:, 0], expected[rows, lengths - 1], atol=1e-4)
        logits = ours(tokens[rows, lengths][:, None], lengths[:, None], cache=cache)
        lengths = lengths + 1
