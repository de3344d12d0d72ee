"""Advantages against brute force, and what must hold for each kind."""

import pytest
import torch

from whet.rl.advantages import gae, group_advantages, informative, whitened

KINDS = ["group", "plain", "batch", "leave_one_out"]
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.2, 0.9, -1.0, 3.0]]).double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_sums_to_0_and_equal_rewards_are_exactly_0(kind):
    found = group_advantages(REWARDS, kind)
    assert found.sum(1).abs().max() < 1e-12
    assert torch.equal(found[1], torch.zeros(4, dtype=torch.float64))
    assert informative(REWARDS).tolist() == [True, False, True]


def test_the_table():
    above = REWARDS[2] - REWARDS[2].mean()
    assert torch.allclose(group_advantages(REWARDS, "plain")[2], above)
    assert torch.allclose(group_advantages(REWARDS)[2], above / (REWARDS[2].std() + 1e-4))
    assert torch.allclose(group_advantages(REWARDS, "batch")[2], above / (REWARDS.std() + 1e-4))
    others = [REWARDS[2, i] - (REWARDS[2].sum() - REWARDS[2, i]) / 3 for i in range(4)]
    assert torch.allclose(group_advantages(REWARDS, "leave_one_out")[2], torch.stack(others))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_samples_and_a_shift_change_nothing(kind):
    order = torch.tensor([2, 0, 3, 1])
    found = group_advantages(REWARDS, kind)
    assert torch.allclose(group_advantages(REWARDS[:, order], kind), found[:, order])
    assert torch.allclose(group_advantages(REWARDS + 5, kind), found)


def test_scaled_rewards():
    assert torch.allclose(
        group_advantages(3 * REWARDS, "plain"), 3 * group_advantages(REWARDS, "plain")
    )
    scaled = group_advantages(1e6 * REWARDS)
    assert torch.allclose(scaled, group_advantages(REWARDS), atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_says_nothing(kind):
    assert torch.equal(group_advantages(REWARDS[:, :1], kind), torch.zeros(3, 1).double())


def brute_gae(rewards, values, length, gamma, lam):
    """The double sum of the definition."""
    v = [*values[:length], 0.0]
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(length)]
    return [
        sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_double_sum_for_ragged_replies(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([6, 1, 4])
    inside = torch.arange(6) < lengths[:, None]
    rewards[1, 1:], values[2, 4:] = torch.nan, 1e9  # what follows a reply is not read
    advantages, returns = gae(rewards, values, inside, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths.tolist()):
        wanted = brute_gae(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(wanted, abs=1e-12)
        assert torch.equal(advantages[row, length:], torch.zeros(6 - length).double())
        assert torch.allclose(
            returns[row, :length], advantages[row, :length] + values[row, :length]
        )


def test_gae_of_two_replies_in_a_row_is_that_of_each_alone():
    rewards, values = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(1)).double()
    inside = torch.tensor([[False, True, True, False, True, True, True]])
    both, _ = gae(rewards, values, inside, gamma=0.9, lam=0.8)
    for part in (slice(1, 3), slice(4, 7)):
        alone, _ = gae(*(x[:, part] for x in (rewards, values, inside)), gamma=0.9, lam=0.8)
        assert torch.equal(both[:, part], alone)


def test_gae_of_known_values():
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    inside = torch.ones(1, 3, dtype=torch.bool)
    to_go, _ = gae(rewards, torch.zeros(1, 3), inside, gamma=1.0, lam=1.0)
    assert to_go.tolist() == [[1.0, 1.0, 1.0]]
    perfect, returns = gae(rewards, torch.ones(1, 3), inside, gamma=1.0, lam=0.95)
    assert perfect.tolist() == [[0.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.0, 1.0, 1.0]]


def test_whitened_over_the_trained_tokens_alone():
    x = torch.tensor([[1.0, 2.0, 99.0], [3.0, 6.0, -99.0]])
    weight = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0]])
    found = whitened(x, weight)
    counted = found[weight != 0]
    assert float(counted.mean()) == pytest.approx(0.0, abs=1e-7)
    assert float(counted.var(correction=0)) == pytest.approx(1.0)
    assert torch.equal(found[weight == 0], torch.zeros(2))
    assert torch.equal(whitened(torch.ones(1, 3), torch.ones(1, 3)), torch.zeros(1, 3))
