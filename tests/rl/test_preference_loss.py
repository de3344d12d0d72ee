"""Each loss against its formula in Python's own float64, at its start, and against differences."""

import math

import pytest
import torch

from whet.rl.preference_loss import (
    Replies,
    implicit_reward,
    kto_loss,
    preference_loss,
    reward_model_loss,
)

KINDS = ["dpo", "ipo", "simpo", "orpo", "kto"]
BETA, GAMMA = 0.3, 0.4


def replies(logp, reference=0.0, tokens=4.0):
    tensors = (torch.tensor([x], dtype=torch.float64) for x in (logp, reference, tokens))
    return Replies(*tensors)


def log_s(x):
    return -math.log1p(math.exp(-x))


def log_odds(m):
    return m - math.log(1 - math.exp(m))


FORMULAS = {
    "dpo": lambda c, r: -log_s(BETA * ((c[0] - c[1]) - (r[0] - r[1]))),
    "ipo": lambda c, r: ((c[0] - c[1]) / c[2] - (r[0] - r[1]) / r[2] - 1 / (2 * BETA)) ** 2,
    "simpo": lambda c, r: -log_s(BETA * (c[0] / c[2] - r[0] / r[2]) - GAMMA),
    "orpo": lambda c, r: -c[0] / c[2] - BETA * log_s(log_odds(c[0] / c[2]) - log_odds(r[0] / r[2])),
    "kto": lambda c, r: (
        2
        - math.exp(log_s(BETA * (c[0] - c[1] - 0.2)))
        - math.exp(log_s(BETA * (0.2 - r[0] + r[1])))
    ),
}
SIDES = [((-3.0, -4.0, 5.0), (-6.0, -2.5, 3.0)), ((-40.0, -30.0, 20.0), (-0.5, -9.0, 2.0))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chosen", "rejected"), SIDES)
def test_each_loss_is_its_formula(kind, chosen, rejected):
    found = preference_loss(
        replies(*chosen), replies(*rejected), kind, beta=BETA, gamma=GAMMA, z=0.2
    )
    assert float(found) == pytest.approx(FORMULAS[kind](chosen, rejected), rel=1e-12)


def test_the_losses_start_where_they_must():
    """The model is its own reference, so nothing has changed yet."""
    side = replies(-7.0, -7.0), replies(-9.0, -9.0)
    assert float(preference_loss(*side, "dpo", beta=0.1)) == math.log(2)
    assert float(preference_loss(*side, "ipo", beta=0.1)) == pytest.approx(1 / (4 * 0.1**2))
    assert float(preference_loss(*side, "kto", beta=0.1)) == 1.0
    assert float(preference_loss(*side, "dpo", beta=0.1, label_smoothing=0.2)) == pytest.approx(
        math.log(2)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind):
    def loss(chosen, rejected):
        lengths = torch.tensor([5.0, 3.0], dtype=torch.float64)
        reference = torch.tensor([-4.0, -2.0], dtype=torch.float64)
        return preference_loss(
            Replies(chosen, reference, lengths),
            Replies(rejected, reference - 1, lengths + 1),
            kind,
            beta=BETA,
            gamma=GAMMA,
            sft_weight=0.5,
        )

    inputs = (torch.tensor([-3.0, -5.0]).double(), torch.tensor([-6.0, -4.0]).double())
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("kind", KINDS)
def test_a_better_chosen_reply_costs_less(kind):
    losses = [
        float(preference_loss(replies(logp), replies(-6.0), kind, beta=BETA))
        for logp in (-6.0, -5.0, -4.0)
    ]
    if kind != "ipo":  # which wants a margin of 1/(2 beta), not as much as there is
        assert losses == sorted(losses, reverse=True)
    assert losses[0] != losses[1]


def test_half_wrong_labels_prefer_nothing():
    margins = torch.linspace(-2, 2, 41, dtype=torch.float64)
    zeros = torch.zeros_like(margins)
    losses = preference_loss(
        Replies(margins, zeros, zeros + 1),
        Replies(zeros, zeros, zeros + 1),
        "dpo",
        beta=1.0,
        label_smoothing=0.5,
    )
    assert float(margins[losses.argmin()]) == pytest.approx(0.0, abs=1e-12)


def test_equal_sides_have_no_gradient_in_their_difference():
    logp = torch.tensor([-5.0], requires_grad=True)
    side = Replies(logp, torch.tensor([-5.0]), torch.tensor([4.0]))
    preference_loss(side, side, "dpo", beta=0.1).sum().backward()
    assert float(logp.grad) == 0.0


def test_a_certain_reply_has_finite_odds():
    certain = torch.zeros(1, requires_grad=True)
    loss = preference_loss(
        Replies(certain, certain.detach(), torch.ones(1)), replies(-6.0), "orpo", beta=0.1
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert certain.grad.isfinite().all()


def test_replies_without_tokens_make_no_nan():
    empty = replies(0.0, 0.0, 0.0)
    for kind in KINDS:
        assert preference_loss(empty, replies(-6.0), kind, beta=0.1, sft_weight=1.0).isfinite()


def test_single_replies_of_kto():
    side = replies(-3.0, -4.0)
    assert float(kto_loss(side, True, 1.0, 0.0)) == pytest.approx(1 - 1 / (1 + math.exp(-1)))
    assert float(kto_loss(side, False, 1.0, 0.0)) == pytest.approx(1 - 1 / (1 + math.exp(1)))
    mixed = Replies(*(torch.cat([x, x]) for x in (side.logp, side.reference, side.tokens)))
    both = kto_loss(mixed, torch.tensor([True, False]), 1.0, 0.0)
    assert float(both.sum()) == pytest.approx(1.0)


def test_implicit_rewards_follow_the_loss():
    assert float(implicit_reward(replies(-3.0, -4.0), "dpo", 0.5)) == 0.5
    assert float(implicit_reward(replies(-3.0, -4.0, 2.0), "simpo", 0.5)) == -0.75


def test_reward_model_loss():
    chosen, rejected = torch.tensor([1.5, 0.0]), torch.tensor([0.5, 0.0])
    found = reward_model_loss(chosen, rejected)
    assert found.tolist() == pytest.approx([-log_s(1.0), math.log(2)])
    assert torch.equal(found, reward_model_loss(chosen + 7, rejected + 7))
    assert float(reward_model_loss(chosen, rejected, margin=torch.tensor([1.0, 0.0]))[0]) == (
        pytest.approx(math.log(2))
    )
    centred = reward_model_loss(chosen, rejected, centre=0.1) - found
    assert centred.tolist() == pytest.approx([0.1 * 4.0, 0.0])
