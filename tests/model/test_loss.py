"""The definition against float64 by hand; the fused loss against the definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.model.loss import (
    Head,
    chunk_tokens,
    linear_cross_entropy,
    linear_nll,
    linear_probability,
    sft_loss,
)


def random_logits(rows=2, length=7, vocab=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, vocab, generator=generator, requires_grad=True)
    return logits, torch.randint(vocab, (rows, length), generator=generator)


def plain_formula(logits, tokens, mask):
    """sft_loss in Python's own float64, token by token."""
    total = weight = 0.0
    for row in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            scores = logits[row, t - 1].double().tolist()
            normaliser = math.log(math.fsum(math.exp(s) for s in scores))
            total += float(mask[row, t]) * (normaliser - scores[tokens[row, t]])
            weight += float(mask[row, t])
    return total / weight if weight else 0.0


@given(
    st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=14, max_size=14), st.integers(0, 9)
)
@settings(max_examples=30, deadline=None)
def test_sft_loss_is_the_plain_formula(weights, seed):
    logits, tokens = random_logits(seed=seed)
    mask = torch.tensor(weights).view(2, 7)
    assert float(sft_loss(logits, tokens, mask)) == pytest.approx(
        plain_formula(logits, tokens, mask), rel=1e-5
    )


def test_the_first_token_is_never_a_target():
    logits, tokens = random_logits()
    mask = torch.zeros(2, 7)
    mask[:, 0] = 1.0
    assert float(sft_loss(logits, tokens, mask)) == 0.0


def test_nothing_trained_is_zero_with_a_gradient_of_zero():
    logits, tokens = random_logits()
    loss = sft_loss(logits, tokens, torch.zeros(2, 7))
    loss.backward()
    assert float(loss) == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_an_infinite_loss_outside_the_mask_does_not_count():
    logits, tokens = random_logits()
    with torch.no_grad():
        logits[0, 2, tokens[0, 3]] = -torch.inf
    mask = torch.ones(2, 7)
    mask[0, 3] = 0.0
    assert sft_loss(logits, tokens, mask).isfinite()


def test_half_precision_logits_are_summed_in_float32():
    logits, tokens = random_logits()
    mask = torch.ones(2, 7)
    half = logits.detach().bfloat16()
    loss = sft_loss(half, tokens, mask)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(plain_formula(half, tokens, mask), rel=1e-6)


def head(tokens=13, width=6, vocab=17, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    offsets = torch.randn(vocab, generator=generator).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(vocab, (tokens,), generator=generator)
    token_weight = torch.rand(tokens, generator=generator)
    token_weight[::4] = 0.0
    return hidden, weight, offsets, targets, token_weight


def reference(hidden, weight, bias, targets, token_weight, softcap=None, logit_scale=1.0):
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits.float(), targets, reduction="none")
    return (nll * token_weight).sum(), nll.detach() * (token_weight != 0)


@pytest.mark.parametrize("chunk", [None, 1, 5, 13])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("softcap", "logit_scale"), [(None, 1.0), (2.0, 1.0), (None, 0.25), (3.0, 2.0)]
)
def test_fused_equals_full_logits(chunk, bias, softcap, logit_scale):
    inputs = head(bias=bias)
    leaves = [t for t in inputs[:3] if t is not None]
    expected, expected_nll = reference(*inputs, softcap, logit_scale)
    hidden, weight, offsets, targets, token_weight = inputs
    loss, nll = linear_cross_entropy(
        hidden, Head(weight, offsets, softcap, logit_scale), targets, token_weight, chunk=chunk
    )
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(nll, expected_nll, atol=1e-5)
    assert not nll.requires_grad
    wanted = torch.autograd.grad(expected * 0.3, leaves)
    for mine, other in zip(torch.autograd.grad(loss * 0.3, leaves), wanted, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_fused_gradient_agrees_with_finite_differences():
    hidden, weight, bias, targets, token_weight = head(tokens=4, dtype=torch.float64)
    leaves = (hidden, weight, bias)

    def loss(h, w, b):
        return linear_cross_entropy(h, Head(w, b), targets, token_weight, chunk=3)[0]

    for leaf, found in zip(leaves, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        for place in range(leaf.numel()):
            step = torch.zeros(leaf.numel(), dtype=leaf.dtype)
            step[place] = 1e-2  # wide, as the sum is float32 by contract
            moved = [
                [x + sign * step.view_as(x) if x is leaf else x for x in leaves] for sign in (1, -1)
            ]
            slope = float((loss(*moved[0]) - loss(*moved[1])).detach() / 2e-2)
            assert slope == pytest.approx(float(found.flatten()[place]), abs=1e-3, rel=1e-2)


def test_fused_gives_gradients_only_where_asked():
    hidden, weight, _, targets, token_weight = head()
    weight.requires_grad_(False)  # LoRA: the head is frozen
    linear_cross_entropy(hidden, Head(weight), targets, token_weight)[0].backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_fused_refuses_a_second_backward():
    """Its gradients are scaled in place, so a second one would be of another scale."""
    hidden, weight, _, targets, token_weight = head()
    loss, _ = linear_cross_entropy(hidden, Head(weight), targets, token_weight)
    torch.autograd.grad(loss * 0.5, (hidden, weight), retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradient once"):
        torch.autograd.grad(loss, (hidden, weight))


def test_fused_over_nothing_is_zero_with_a_gradient_of_zero():
    hidden, weight, bias, targets, token_weight = head()
    none = torch.zeros(0, dtype=torch.long)
    loss, nll = linear_cross_entropy(
        hidden[none], Head(weight, bias), targets[none], token_weight[none]
    )
    loss.backward()
    assert float(loss) == 0.0
    assert nll.shape == (0,)
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (hidden, weight, bias))


def test_an_improbable_target_has_a_finite_loss():
    """exp(-200) is 0 in float32; -ln of it must still be 200."""
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [0.0]])
    loss, _ = linear_cross_entropy(hidden, Head(weight), torch.tensor([1]), torch.ones(1))
    assert float(loss) == pytest.approx(200.0)


def test_fused_under_autocast_is_near_float32():
    hidden, weight, bias, targets, token_weight = head(tokens=64, width=32, vocab=50)
    leaves = (hidden, weight, bias)
    exact, _ = linear_cross_entropy(hidden, Head(weight, bias), targets, token_weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss, nll = linear_cross_entropy(hidden, Head(weight, bias), targets, token_weight, chunk=9)
    assert loss.dtype == nll.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-2)
    wanted = torch.autograd.grad(exact, leaves)
    for mine, other in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).norm() <= 2e-2 * other.norm()


def test_no_more_logits_than_a_chunk_exist(monkeypatch):
    """The memory of the head does not grow with the number of tokens."""
    largest = 0
    softmax = torch.softmax

    def watch(x, *args, **options):
        nonlocal largest
        largest = max(largest, x.numel())
        return softmax(x, *args, **options)

    monkeypatch.setattr(torch, "softmax", watch)
    hidden, weight, _, targets, token_weight = head(tokens=40)
    linear_cross_entropy(hidden, Head(weight), targets, token_weight, chunk=6)
    assert largest == 6 * 17


@pytest.mark.parametrize(("vocab", "tokens"), [(32_000, 512), (49_152, 256), (10**9, 128)])
def test_the_chunk_shrinks_as_the_vocabulary_grows(vocab, tokens):
    assert chunk_tokens(vocab, torch.device("cpu"), torch.float32) == tokens


def any_function(nll):
    """No weighted sum of the tokens' losses: a product of means, and a clipped part."""
    return nll[:6].mean().exp() * nll[6:].mean() + (nll - 2.0).clamp(min=0).square().sum()


@pytest.mark.parametrize("chunk", [None, 1, 5, 13])
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, 1.0), (2.0, 1.0), (3.0, 0.5)])
def test_any_function_of_token_losses_has_the_gradient_of_full_logits(chunk, softcap, logit_scale):
    hidden, weight, offsets, targets, _ = head()
    leaves = (hidden, weight, offsets)
    ones = torch.ones(len(targets))
    logits = F.linear(hidden, weight, offsets) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="none")
    nll = linear_nll(hidden, Head(weight, offsets, softcap, logit_scale), targets, chunk=chunk)
    assert torch.allclose(nll, expected, atol=1e-5)
    wanted = torch.autograd.grad(any_function(expected), leaves)
    for mine, other in zip(torch.autograd.grad(any_function(nll), leaves), wanted, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5)
    summed, _ = linear_cross_entropy(
        hidden, Head(weight, offsets, softcap, logit_scale), targets, ones
    )
    assert torch.allclose(nll.sum(), summed, rtol=1e-6)


def test_token_losses_agree_with_finite_differences():
    hidden, weight, bias, targets, _ = head(tokens=4, dtype=torch.float64)

    def losses(h, w, b):
        return linear_nll(h, Head(w, b), targets, chunk=3)

    # float32 by contract, hence the wide step and tolerance.
    assert torch.autograd.gradcheck(
        losses, (hidden, weight, bias), eps=1e-2, atol=1e-3, rtol=1e-2, nondet_tol=0.0
    )


def test_token_losses_of_a_frozen_head_and_of_nothing():
    hidden, weight, _, targets, _ = head()
    weight.requires_grad_(False)
    linear_nll(hidden, Head(weight), targets).sum().backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0
    none = torch.zeros(0, dtype=torch.long)
    hidden, weight, bias, targets, _ = head()
    linear_nll(hidden[none], Head(weight, bias), targets[none]).sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (hidden, weight, bias))


def test_token_losses_under_autocast_are_near_float32():
    hidden, weight, bias, targets, _ = head(tokens=64, width=32, vocab=50)
    leaves = (hidden, weight, bias)
    exact = linear_nll(hidden, Head(weight, bias), targets)
    with torch.autocast("cpu", torch.bfloat16):
        nll = linear_nll(hidden, Head(weight, bias), targets, chunk=9)
    assert nll.dtype == torch.float32
    assert float((nll - exact).abs().max()) <= 0.1
    wanted = torch.autograd.grad(exact.square().sum(), leaves)
    for mine, other in zip(torch.autograd.grad(nll.square().sum(), leaves), wanted, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).norm() <= 2e-2 * other.norm()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_watched_token_has_the_probability_of_full_logits(softcap):
    generator = torch.Generator().manual_seed(3)
    hidden, matrix = (torch.randn(n, 8, generator=generator) for n in (9, 13))
    bias, targets = torch.randn(13, generator=generator), torch.arange(9)
    z = 0.7 * (hidden.double() @ matrix.double().t() + bias.double())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    curved = Head(matrix, bias, softcap, 0.7)
    nll, watched = linear_probability(hidden, curved, targets, 5, chunk=4)
    torch.testing.assert_close(watched.double(), z.softmax(-1)[:, 5])
    expected = linear_nll(hidden, curved, targets, chunk=4)
    torch.testing.assert_close(nll, expected)
