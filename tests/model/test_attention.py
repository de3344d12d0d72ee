"""Every way to attend equals the dense definition in value and gradient; what plans keep."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.model import kernels
from whet.model.attention import CachedPlan, plan_documents, share_prefixes

LENGTHS = [5, 1, 12, 3]


def dense_attention(q, k, v, segments, *, scale, window=None, softcap=None):
    """The definition, with a full (T, T) mask per row.

    q (B, T, N, H), k and v (B, T, K, H), segments (B, T) -> (B, T, N, H); padding gives 0.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, :, None]
    seen = (same & kernels.causal_mask(q.shape[1], window, q.device))[:, None]
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bnts,bsnh->btnh", probabilities, v)


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
    return dense_attention(
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
    y = dense_attention(q, q, v, torch.tensor([[1, 1, 2]]), scale=0.5).flatten()
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


def shared_rows(prefix=70, replies=(5, 1, 12), own=(3, 90)):
    """A row of documents that begin alike, with one between them that does not; nothing of the
    common beginning but its last place is trained. Returns tokens, segments and weight (1, T)."""
    generator = torch.Generator().manual_seed(5)

    def draw(n):
        return torch.randint(1, 50, (n,), generator=generator)

    begin, texts, weights = draw(prefix), [], []
    for i, reply in enumerate((*replies, *own)):
        text = torch.cat((begin, draw(reply))) if i < len(replies) else draw(reply)
        texts.append(text)
        weights.append((torch.arange(len(text)) >= len(text) - reply - 1).float())
    order = [0, 3, 1, 4, 2]
    segments = torch.cat([torch.full((len(texts[i]),), n + 1) for n, i in enumerate(order)])
    tokens, weight = (torch.cat([some[i] for i in order]) for some in (texts, weights))
    return tokens[None], segments[None], weight[None]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4, 80])
def test_a_shared_beginning_is_attended_to_as_if_it_were_there(window, softcap):
    tokens, segments, weight = shared_rows()
    plan = plan_documents(tokens.shape, tokens.device, segments, weight)
    shared = share_prefixes(plan, plan.pack(tokens))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens.shape[1], n, 8, generator=generator) for n in (4, 2, 2))
    for t in (q, k, v):  # equal tokens at equal positions, as a model would make them
        for start in (plan.ends[2], plan.ends[4]):
            t[:, start : start + 70] = t[:, :70]
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    expected = dense_attention(q, k, v, segments, **options)[0, shared.index]
    found = shared.attend(*(t[0, shared.index] for t in (q, k, v)), layer=0, **options)
    assert len(shared.positions) == len(plan.positions) - 2 * 69
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_shared_plan_keeps_places_positions_and_trained_tokens():
    tokens, segments, weight = shared_rows()
    plan = plan_documents(tokens.shape, tokens.device, segments, weight)
    shared = share_prefixes(plan, plan.pack(tokens))
    assert shared.sizes == [69, 6, 3, 2, 90, 13]
    assert shared.after == [None, 0, None, 0, None, 0]
    assert shared.trained_index.tolist() == plan.trained_index.tolist()
    places = torch.arange(tokens.shape[1]) if plan.index is None else plan.index
    position_of = dict(zip(places.tolist(), plan.positions.tolist(), strict=True))
    found = zip(shared.index.tolist(), shared.positions.tolist(), strict=True)
    assert all(position_of[place] == position for place, position in found)


def pairs():
    """Two pairs of replies, and one more document: all share 70 tokens, then each pair a prompt of
    its own of 90 (of which the second has 80 in common)."""
    generator = torch.Generator().manual_seed(6)

    def draw(n):
        return torch.randint(1, 50, (n,), generator=generator)

    system, texts = draw(70), []
    for prompt, replies in ((draw(90), (5, 8)), (draw(90), (7, 4))):
        texts += [torch.cat((system, prompt, draw(reply))) for reply in replies]
    texts[3][150:160] = (texts[3][150:160] + 1) % 50
    texts.append(torch.cat((system, draw(6))))
    lengths = [len(text) for text in texts]
    weight = [torch.arange(n) >= (159 if n > 80 else 69) for n in lengths]
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])
    return torch.cat(texts)[None], segments[None], torch.cat(weight).float()[None]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4, 100])
def test_two_levels_of_shared_beginnings(window, softcap):
    """A system prompt that all have, and after it a prompt that the replies of a pair have."""
    tokens, segments, weight = pairs()
    plan = plan_documents(tokens.shape, tokens.device, segments, weight)
    shared = share_prefixes(plan, plan.pack(tokens))
    assert shared.sizes == [69, 90, 6, 9, 81, 17, 14, 7]
    assert shared.after == [None, 0, 1, 1, 0, 4, 4, 0]
    assert shared.trained_index.tolist() == plan.trained_index.tolist()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens.shape[1], n, 8, generator=generator) for n in (4, 2, 2))
    begins = plan.ends.tolist()
    for t in (q, k, v):  # equal tokens after equal ones, as a model would make them
        for owner, other, length in ((0, 1, 159), (0, 2, 69), (2, 3, 150), (0, 4, 69)):
            t[:, begins[other] : begins[other] + length] = t[
                :, begins[owner] : begins[owner] + length
            ]
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    expected = dense_attention(q, k, v, segments, **options)[0, shared.index]
    found = shared.attend(*(t[0, shared.index] for t in (q, k, v)), layer=0, **options)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("what", ["short", "trained", "one token"])
def test_what_is_not_shared(what):
    """A short beginning, one in which something is trained, and one that differs at its start."""
    tokens, segments, weight = shared_rows(prefix=30 if what == "short" else 70)
    first = torch.cat((torch.tensor([0]), segments[0].diff().nonzero()[:, 0] + 1))
    if what == "trained":
        weight[0, first + 1] = 1.0
    if what == "one token":
        tokens[0, first] = torch.arange(5)
    plan = plan_documents(tokens.shape, tokens.device, segments, weight)
    assert share_prefixes(plan, plan.pack(tokens)) is plan


def within_bound(found, expected):
    """docs/numerics.md: in bf16 every way to attend is within 1 % of the definition's norm."""
    return (found.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
def test_documents_in_bfloat16_are_within_their_bound(window, softcap):
    q, k, v = (t.detach().bfloat16() for t in random_qkv())
    expected = dense(q.float(), k.float(), v.float(), window, softcap)
    found = kernels.documents(q, k, v, LENGTHS, scale=0.3, window=window, softcap=softcap)
    assert found.dtype == torch.bfloat16
    assert within_bound(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 1.5), (4, 1.5)])
def test_a_gpus_kernels_are_within_their_bound(window, softcap):
    """Value and gradient; without a soft cap by varlen, else by flex attention."""
    segments = segments_of(LENGTHS).cuda()
    plan = plan_documents(segments.shape, segments.device, segments)
    inputs = [t.detach().cuda().bfloat16().requires_grad_() for t in random_qkv(size=64)]
    exact = [t.detach().float().requires_grad_() for t in inputs]
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    found = plan.attend(*inputs, layer=0, **options)
    expected = dense_attention(*(t[None] for t in exact), segments, **options)[0]
    assert within_bound(found, expected)
    direction = torch.randn_like(expected)
    mine = torch.autograd.grad(found, inputs, direction.bfloat16())
    wanted = torch.autograd.grad(expected, exact, direction)
    for one, other in zip(mine, wanted, strict=True):
        assert (one.float() - other).norm() <= 0.02 * other.norm()
