"""Every way to attend equals the dense definition in value and gradient; what plans keep."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.model import kernels
from whet.model.attention import CachedPlan, plan_documents

LENGTHS = [5, 1, 12, 3]


def random_qkv(heads=4, kv_heads=2, size=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(sum(LENGTHS), n, size, generator=generator, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    ]


def segments_of(lengths):
    return torch.tensor([[i + 1 for i, n in enumerate(lengths) for _ in range(n)]])


def ends_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def dense(q, k, v, window, softcap):
    segments = segments_of(LENGTHS)
    return kernels.dense_attention(
        q[None], k[None], v[None], segments, scale=0.3, window=window, softcap=softcap
    )[0]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_documents_one_by_one_equal_the_dense_definition(kv_heads, window, softcap):
    q, k, v = random_qkv(kv_heads=kv_heads)
    expected = dense(q, k, v, window, softcap)
    found = kernels.documents(q, k, v, LENGTHS, scale=0.3, window=window, softcap=softcap)
    assert torch.allclose(found, expected, atol=1e-6)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), direction)
    for mine, other in zip(torch.autograd.grad(found, (q, k, v), direction), wanted, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (4, 1.5)])
def test_flex_attention_equals_the_dense_definition(window, softcap):
    q, k, v = (t.detach() for t in random_qkv())  # it has no gradient on a CPU
    mask = kernels.flex_mask(ends_of(LENGTHS), sum(LENGTHS), window)
    found = kernels.flex(q, k, v, mask, scale=0.3, softcap=softcap)
    assert torch.allclose(found, dense(q, k, v, window, softcap), atol=1e-6)


def test_dense_definition_by_hand():
    """Two tokens of one document and one of another, in plain arithmetic."""
    q = torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]])
    v = torch.tensor([[[[10.0]], [[20.0]], [[30.0]]]])
    y = kernels.dense_attention(q, q, v, torch.tensor([[1, 1, 2]]), scale=0.5).flatten()
    first, second = torch.tensor([2.0 * 1.0 * 0.5, 2.0 * 2.0 * 0.5]).softmax(0)
    assert torch.allclose(
        y, torch.stack((torch.tensor(10.0), 10 * first + 20 * second, torch.tensor(30.0)))
    )


def test_varlen_is_called_as_the_installed_torch_wants_it(monkeypatch):
    """The kernel needs a GPU; that its arguments fit and mean the window is seen without."""
    calls = []
    signature = inspect.signature(kernels.varlen_attn)

    def record(*args, **options):
        calls.append(signature.bind(*args, **options).arguments)
        return args[0]

    monkeypatch.setattr(kernels, "varlen_attn", record)
    q, k, v = random_qkv()
    for window in (None, 4):
        kernels.varlen(q, k, v, ends_of(LENGTHS), 12, scale=0.3, window=window)
    assert calls[0]["window_size"] == (-1, 0)
    assert calls[1]["window_size"] == (3, 0)  # itself and three before it


def test_a_plan_keeps_documents_and_drops_padding():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [7, 0, 0, 3, 3, 3]])
    plan = plan_documents(segments.shape, segments.device, segments)
    assert plan.index.tolist() == [0, 1, 2, 3, 4, 6, 9, 10, 11]
    assert plan.positions.tolist() == [0, 1, 0, 1, 2, 0, 0, 1, 2]
    assert plan.sizes == [2, 3, 1, 3]
    assert plan.ends.tolist() == [0, 2, 5, 6, 9]
    assert plan.longest == 3
    assert plan.trained is None


def test_a_plan_drops_what_no_trained_token_needs():
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 0]])
    weight = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
    plan = plan_documents(segments.shape, segments.device, segments, weight)
    assert plan.index.tolist() == [0, 1, 5]
    assert plan.sizes == [2, 1]
    assert plan.lengths.tolist() == [3, 3, 2]  # the whole document's, not what is left of it
    assert plan.trained_index.tolist() == [1, 5]


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_a_plan_keeps_every_trained_token_and_all_before_it(rows, bits):
    length = max(sum(row) for row in rows) + 1
    segments = torch.zeros(len(rows), length, dtype=torch.long)
    for r, row in enumerate(rows):
        segments[r, : sum(row)] = segments_of(row)[0]
    flags = torch.tensor([bits >> (i % 32) & 1 for i in range(segments.numel())])
    weight = flags.view_as(segments) * (segments != 0).float()
    plan = plan_documents(segments.shape, segments.device, segments, weight)
    kept = torch.arange(segments.numel()) if plan.index is None else plan.index
    assert plan.trained_index.tolist() == weight.flatten().nonzero().flatten().tolist()
    assert len(kept) == sum(plan.sizes) >= 1
    flat = segments.flatten().tolist()
    for place, position in zip(kept.tolist(), plan.positions.tolist(), strict=True):
        assert position == 0 or (place - 1 in kept and flat[place - 1] == flat[place])


def test_a_plan_of_nothing_still_has_a_token():
    for segments in (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)):
        plan = plan_documents(segments.shape, segments.device, segments, torch.zeros(2, 3))
        assert plan.sizes == [1]
        assert plan.trained_index.tolist() == []


def test_a_cached_plan_sees_its_own_past_only():
    positions = torch.tensor([[2], [0]])
    plan = CachedPlan(cache=None, new_positions=positions)
    assert plan._mask(4, None)[:, 0, 0].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert plan._mask(4, 2)[:, 0, 0].tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert plan.lengths.tolist() == [3, 1]
