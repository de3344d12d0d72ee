import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.generate.sample import candidates, next_tokens, uniforms

LOGITS = torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 5.0, 5.0]])


def even_draws(count: int) -> torch.Tensor:
    """(count,) numbers that lie evenly in [0, 1): what they give is the distribution itself."""
    return (torch.arange(count) + 0.5) / count


def test_greedy_takes_the_likeliest_and_the_smaller_id_of_a_tie() -> None:
    assert next_tokens(LOGITS).tolist() == [1, 2]


def test_a_temperature_without_a_draw_is_a_defect() -> None:
    with pytest.raises(ValueError, match="uniform"):
        next_tokens(LOGITS, temperature=1.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_softmax(temperature: float) -> None:
    draws = 10_000
    ids = next_tokens(LOGITS[:1].expand(draws, -1), even_draws(draws), temperature=temperature)
    share = torch.bincount(ids, minlength=4) / draws
    expected = (LOGITS[0] / temperature).softmax(-1)
    torch.testing.assert_close(share, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1e-6, 1e-42, 5e-324])
def test_a_temperature_near_0_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[-800.0, 900.0, 899.0]])
    for draw in (0.0, 0.5, 1.0 - 2**-24):
        token = next_tokens(logits, torch.tensor([draw]), temperature=temperature, top_p=0.9)
        assert token.tolist() == [1]


def test_top_k_keeps_the_likeliest_and_their_proportions() -> None:
    probabilities, ids = candidates(LOGITS[:1], temperature=1.0, top_k=2)
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(probabilities, torch.tensor([[3.0, 2.0]]).softmax(-1))
    assert candidates(LOGITS, temperature=1.0, top_k=99)[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, 1), (0.5, 1), (0.6, 2), (0.85, 3), (0.99, 4), (1.0, 4)]
)
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p: float, kept: int) -> None:
    logits = torch.tensor([[0.51, 0.3, 0.15, 0.04]]).log()  # cumulative 0.51, 0.81, 0.96, 1
    probabilities, _ = candidates(logits, temperature=1.0, top_p=top_p)
    assert int((probabilities > 0).sum()) == kept
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))


def test_top_p_counts_within_top_k() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.3]]).log()
    probabilities, _ = candidates(logits, temperature=1.0, top_k=2, top_p=0.55)
    assert int((probabilities > 0).sum()) == 1  # 0.4 / 0.7 = 0.57 of what top_k leaves


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.05, 5.0),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.0, 1.0),
    draw=st.sampled_from([0.0, 0.3, 0.999, 1.0 - 2**-24]),
)
def test_what_is_excluded_is_never_drawn(seed, temperature, top_k, top_p, draw) -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed % 2**31)) * 5
    token = next_tokens(
        logits, torch.full((3,), draw), temperature=temperature, top_k=top_k, top_p=top_p
    )
    probabilities, ids = candidates(logits, temperature, top_k, top_p)
    drawn = probabilities[ids == token[:, None]]
    assert len(drawn) == 3
    assert bool((drawn > 0).all())
    if draw == 0.0:  # the first candidate: the likeliest one, or the smallest id of all
        possible = ids.masked_fill(probabilities == 0, 10).amin(-1)
        all_tokens = top_k is None and top_p in (None, 1.0)
        assert torch.equal(token, possible if all_tokens else logits.argmax(-1))


@pytest.mark.parametrize("draw", [0.0, 0.5, 1.0 - 2**-24])
def test_an_impossible_token_is_never_drawn_at_either_end(draw: float) -> None:
    logits = torch.tensor([[-torch.inf, -200.0, 1.0, 1.0, -200.0, -torch.inf]])
    token = int(next_tokens(logits, torch.tensor([draw]), temperature=1.0))
    assert token == (2 if draw < 0.5 else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_sampled_as_its_softmax(dtype: torch.dtype) -> None:
    """Against the definition in float64: the first token whose cumulative probability exceeds the
    draw, up to what float32 can tell."""
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1)).to(dtype) * 3
    draws = even_draws(200)
    found = next_tokens(logits.expand(200, -1), draws, temperature=0.7)
    sums = (logits[0].double() / 0.7).softmax(-1).cumsum(-1)
    assert bool((sums[found] > draws - 1e-6).all())
    assert bool((sums[found - 1] <= draws + 1e-6).all())


def test_a_row_samples_alike_in_any_batch() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    draws = torch.tensor([uniforms((7, i), 1)[0] for i in range(6)])
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9}
    together = next_tokens(logits, draws, **options)
    alone = [next_tokens(logits[i : i + 1], draws[i : i + 1], **options) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


def test_draws_depend_on_seed_and_prompt_alone() -> None:
    assert torch.equal(uniforms((1, 2), 5), uniforms((1, 2), 9)[:5])
    assert not torch.equal(uniforms((1, 2), 5), uniforms((1, 3), 5))
    assert not torch.equal(uniforms((1, 2), 5), uniforms((2, 2), 5))
    assert uniforms((0, 0), 10_000).min() >= 0
    assert uniforms((0, 0), 10_000).max() < 1
