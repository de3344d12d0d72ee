"""Policy terms: their gradients, where the clip holds, and expectations by enumeration."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from whet.rl.policy_loss import (
    USUAL_CLIP,
    divergence,
    k3,
    policy_term,
    token_weights,
    truncated_ratio,
    value_loss,
)

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0]])
WEIGHT = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
ADVANTAGE = torch.tensor([[0.0, 0.7, 0.7, -1.3, -1.3, 0.0]])


def losses(seed=0):
    nll = torch.rand(1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (nll * WEIGHT).requires_grad_()


@pytest.mark.parametrize("kind", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("normalize", ["tokens", "sequences", "constant"])
def test_at_ratio_1_each_term_has_the_gradient_of_sft_with_the_advantage_as_weight(kind, normalize):
    nll = losses()
    low, high = USUAL_CLIP[kind]
    share, total = token_weights(torch.tensor([2, 2]), normalize, 8)
    weight = WEIGHT * F.pad(share, (1, 0)).float()[SEGMENTS]
    found = policy_term(
        nll, nll.detach(), ADVANTAGE, kind, low=low, high=high, segments=SEGMENTS, weight=weight
    )
    got = torch.autograd.grad((weight * found.term).sum() / total, nll)[0]
    wanted = torch.autograd.grad((weight * ADVANTAGE * nll).sum() / total, nll)[0]
    assert torch.allclose(got, wanted, atol=1e-12)
    assert found.clipped.sum() == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_clip_holds_where_it_must_and_only_there(advantage):
    low, high = 0.2, 0.28
    rho = torch.linspace(0.5, 1.6, 23, dtype=torch.float64)[None]
    nll = (-rho.log()).requires_grad_()
    found = policy_term(
        nll, torch.zeros_like(nll), torch.full_like(rho, advantage), low=low, high=high
    )
    gradient = torch.autograd.grad(found.term.sum(), nll)[0]
    held = rho > 1 + high if advantage > 0 else rho < 1 - low
    assert torch.equal(gradient == 0, held)
    assert torch.equal(found.clipped != 0, held)


def test_gspo_takes_the_geometric_mean_over_the_reply():
    nll = losses()
    change = torch.tensor([[0.0, 0.1, 0.3, -0.2, 0.0, 0.0]]).double()
    found = policy_term(
        nll,
        nll.detach() + change,
        ADVANTAGE,
        "gspo",
        low=9,
        high=9,
        segments=SEGMENTS,
        weight=WEIGHT,
    )
    ratio = -found.term / ADVANTAGE
    assert ratio[0, 1:3].tolist() == pytest.approx([2.718281828**0.2] * 2)
    assert ratio[0, 3:5].tolist() == pytest.approx([2.718281828**-0.1] * 2)


def test_cispo_bounds_the_factor_and_keeps_the_gradient():
    nll = losses()
    old = nll.detach() + torch.tensor([[0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    found = policy_term(nll, old, ADVANTAGE, "cispo", low=1.0, high=4.0)
    gradient = torch.autograd.grad(found.term.sum(), nll)[0]
    assert gradient[0, 1:].tolist() == pytest.approx([5 * 0.7, 0.7, -1.3, -1.3, 0.0], rel=1e-6)


def test_token_weights_are_the_three_normalisations():
    lengths = torch.tensor([4, 1, 5])
    assert token_weights(lengths, "tokens", 8) == (pytest.approx([1, 1, 1]), 10.0)
    weight, total = token_weights(lengths, "sequences", 8)
    assert (weight * lengths).tolist() == pytest.approx([1, 1, 1])
    assert total == 3.0
    assert token_weights(lengths, "constant", 8)[1] == 24.0


def toy_policy(logits):
    """All sequences of two tokens from three, and ln p of each: p of the second depends on the
    first."""
    rows = logits.log_softmax(-1)
    pairs = list(itertools.product(range(3), repeat=2))
    return pairs, torch.stack([torch.stack([rows[0, a], rows[1 + a, b]]) for a, b in pairs])


def test_the_expected_gradient_is_that_of_the_expected_reward():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    rewards = torch.rand(9, generator=torch.Generator().manual_seed(2)).double()
    _, logp = toy_policy(logits)
    p = logp.sum(1).exp()
    wanted = torch.autograd.grad((p * rewards).sum(), logits, retain_graph=True)[0]
    nll = -logp
    term = policy_term(nll, nll.detach(), rewards[:, None].expand(9, 2), low=0.2, high=0.28).term
    got = torch.autograd.grad(-(p.detach() * term.sum(1)).sum(), logits)[0]
    assert torch.allclose(got, wanted, atol=1e-12)


def test_estimators_of_the_divergence_by_enumeration():
    """Values: all three have the expected value KL(p || q). Gradients: only k2's is KL's own."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=generator).double().requires_grad_()
    other = torch.randn(5, generator=generator).double().log_softmax(-1)
    logp = logits.log_softmax(-1)
    p = logp.exp()
    kl = (p * (logp - other)).sum()
    assert (p * k3(-logp, -other)).sum().item() == pytest.approx(kl.item())
    fixed = p.detach()

    def expected(estimate):
        return torch.autograd.grad((fixed * estimate).sum(), logits, retain_graph=True)[0]

    reverse = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    forward = torch.autograd.grad((other.exp() * (other - logp)).sum(), logits, retain_graph=True)[
        0
    ]
    assert torch.allclose(expected(divergence(-logp, -other)), reverse, atol=1e-12)
    assert torch.allclose(expected(logp - other), torch.zeros(5).double(), atol=1e-12)
    assert torch.allclose(expected(k3(-logp, -other)), forward, atol=1e-12)


def test_value_loss_takes_the_worse_of_moved_and_held():
    values, old, returns = (
        torch.tensor([1.0, 0.3, -1.0]),
        torch.zeros(3),
        torch.tensor([2.0, 2.0, 2.0]),
    )
    found = value_loss(values, old, returns, clip=0.5)
    assert found.tolist() == pytest.approx([1.5**2 / 2, 1.7**2 / 2, 3.0**2 / 2])


def test_truncated_ratio():
    nll = torch.tensor([1.0, 1.0], requires_grad=True)
    found = truncated_ratio(nll, torch.tensor([1.0, 3.0]), cap=2.0)
    assert found.tolist() == [1.0, 2.0]
    assert not found.requires_grad
