"""Promises 2, 3 and 7 of docs/numerics.md, held by the whole model."""

import pytest
import torch

from tests.model import zoo
from whet.model import attention
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.loss import sft_loss

CASES = ["gpt2", "llama", "mistral", "gemma2", "smollm3", "phi3-long"]


def small_model():
    model = Transformer(llama(96, 32, 3, 4, n_kv_heads=2, mlp_width=48))
    init_weights(model, 0)
    return model


def random_tokens(*shape, seed=0):
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(seed))


def shifted(tokens, loss_mask, segments):
    """targets and weight as the batch makes them."""
    targets, weight = tokens.roll(-1, 1), loss_mask.roll(-1, 1).clone()
    weight[:, -1] = 0.0
    weight[:, :-1] *= (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return targets, weight


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


def assert_same_gradients(found, expected, tolerance=1e-5):
    for mine, other in zip(found, expected, strict=True):
        assert (mine - other).norm() <= tolerance * other.norm() + 1e-7


@pytest.fixture(params=["float32", "bf16"])
def precision(request):
    """The model computes in float32, or under autocast in bf16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param == "bf16"):
        yield request.param


# Promise 2: documents of a row do not see each other.


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_equal_documents_alone(case, precision):
    atol, loss, gradient = {"float32": (1e-5, 1e-6, 1e-5), "bf16": (5e-2, 5e-3, 3e-2)}[precision]
    model = zoo.whet_model(case, zoo.oracle(case))
    documents = [random_tokens(1, n, seed=n) for n in (20, 1, 9)]
    tokens = torch.cat((*documents, random_tokens(1, 2)), 1)
    segments = torch.tensor([[1] * 20 + [2] + [3] * 9 + [0] * 2])
    mask = (random_tokens(1, 32, seed=5) % 4).float()
    targets, weight = shifted(tokens, mask, segments)

    packed = model(tokens, segments=segments, targets=targets, weight=weight)
    alone, start = [], 0
    for document in documents:
        part = slice(start, start := start + document.shape[1])
        alone.append(model(document, targets=targets[:, part], weight=weight[:, part]))
    assert torch.allclose(packed.nll[:, :30], torch.cat([a.nll for a in alone], 1), atol=atol)
    together = sum(a.loss for a in alone)
    assert torch.allclose(packed.loss, together, rtol=loss)
    assert_same_gradients(gradients(model, packed.loss), gradients(model, together), gradient)


@pytest.mark.parametrize("case", CASES)
def test_changing_a_document_moves_no_logit_of_its_neighbours(case, precision):
    model = zoo.whet_model(case, zoo.oracle(case))
    segments = torch.tensor([[1] * 7 + [2] * 9 + [3] * 8])
    tokens = random_tokens(1, 24)
    changed = tokens.clone()
    changed[:, 7:16] = (changed[:, 7:16] + 1) % 96
    before, after = model(tokens, segments=segments), model(changed, segments=segments)
    assert torch.equal(before[:, :7], after[:, :7])
    assert torch.equal(before[:, 16:], after[:, 16:])
    assert not torch.equal(before[:, 7:16], after[:, 7:16])


def test_a_documents_loss_gives_no_gradient_to_its_neighbours():
    # Untied, so that the embedding's gradient comes from the tokens read and not from the head.
    model = Transformer(llama(96, 32, 3, 4, n_kv_heads=2, mlp_width=48, tied=False))
    init_weights(model, 0)
    segments = torch.tensor([[1] * 5 + [2] * 7])
    tokens = torch.arange(12)[None]  # each a row of its own in the embedding
    targets, weight = torch.full((1, 12), 50), (segments == 2).float()
    model(tokens, segments=segments, targets=targets, weight=weight).loss.backward()
    reached = model.embed.weight.grad[:12].abs().sum(1) > 0
    assert torch.equal(reached, segments[0] == 2)


# Promise 3: the fused loss is sft_loss.


@pytest.mark.parametrize("case", [*CASES, "gemma3", "granite", "qwen2", "olmo2"])
@pytest.mark.parametrize("trained", [0.0, 0.3, 1.0])
def test_fused_loss_equals_sft_loss(case, trained):
    model = zoo.whet_model(case, zoo.oracle(case))
    tokens = random_tokens(3, 24)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(3, 24, generator=generator)
    mask = mask * (torch.rand(3, 24, generator=generator) < trained)
    mask[1] = 0.0  # a row without a trained token
    targets, weight = shifted(tokens, mask, torch.ones_like(tokens))

    expected = sft_loss(model(tokens), tokens, mask)
    result = model(tokens, targets=targets, weight=weight)
    found = result.loss / (weight.sum() or 1.0)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert_same_gradients(gradients(model, found), gradients(model, expected), 1e-4)


PLACES = ((0, slice(0, 28)), (0, slice(28, 49)), (1, slice(0, 33)))


@pytest.fixture
def system_prompt(monkeypatch):
    """Three documents in two rows that begin with the same 12 tokens, the first and the last of
    them with 10 more, as a pair has: tokens, segments, mask."""
    monkeypatch.setattr(attention, "SHARED", 8)
    begin, prompt = random_tokens(12, seed=7), random_tokens(10, seed=8)
    prompts = [torch.cat((begin, prompt)), begin, torch.cat((begin, prompt))]
    tokens = torch.zeros(2, 50, dtype=torch.long)
    segments, mask = torch.zeros_like(tokens), torch.zeros(2, 50)
    for i, (row, here) in enumerate(PLACES):
        reply = random_tokens(here.stop - here.start - len(prompts[i]), seed=i)
        tokens[row, here], segments[row, here] = torch.cat((prompts[i], reply)), i + 1
        mask[row, here.start + len(prompts[i]) : here.stop] = 1.0
    return tokens, segments, mask


@pytest.mark.parametrize("case", CASES)
def test_a_common_beginning_computed_once_changes_nothing(case, system_prompt, monkeypatch):
    """phi3-long rotates by the length of the document: there nothing is shared."""
    model = zoo.whet_model(case, zoo.oracle(case))
    tokens, segments, mask = system_prompt
    targets, weight = shifted(tokens, mask, segments)
    shared = []

    def watch(plan, packed):
        shared.append(attention.share_prefixes(plan, packed))
        return shared[-1]

    monkeypatch.setattr("whet.model.decoder.share_prefixes", watch)
    found = model(tokens, segments=segments, targets=targets, weight=weight)
    monkeypatch.setattr("whet.model.decoder.share_prefixes", lambda plan, packed: plan)
    expected = model(tokens, segments=segments, targets=targets, weight=weight)
    blocks = shared[0].after if shared else None
    assert blocks == (None if case == "phi3-long" else [None, 0, 1, 0, 1])
    assert torch.allclose(found.nll, expected.nll, atol=1e-5)
    assert torch.allclose(found.loss, expected.loss, rtol=1e-6)
    assert_same_gradients(gradients(model, found.loss), gradients(model, expected.loss))


def test_fast_paths_in_bfloat16_are_within_their_bound(system_prompt):
    """docs/numerics.md: 1 % of the loss, 5 % of each gradient's norm.

    All fast paths at once, under autocast, against the definition in float32: the fused loss,
    attention by document, shared beginnings, the last layer at trained places only.
    """
    model = small_model()
    tokens, segments, mask = system_prompt
    targets, weight = shifted(tokens, mask, segments)
    exact = sum(
        sft_loss(model(tokens[r : r + 1, part]), tokens[r : r + 1, part], mask[r : r + 1, part])
        * mask[r, part].sum()
        for r, part in PLACES
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens, segments=segments, targets=targets, weight=weight).loss
    assert half.item() == pytest.approx(exact.item(), rel=0.01)
    assert_same_gradients(gradients(model, half), gradients(model, exact), 0.05)


# Promise 7: nothing trained neither makes NaN nor dilutes.


def test_nothing_trained_gives_zero_and_a_gradient_to_every_parameter(precision):
    model = small_model()
    tokens = random_tokens(2, 8)
    for segments in (torch.ones_like(tokens), torch.zeros_like(tokens)):
        model.zero_grad()
        result = model(tokens, segments=segments, targets=tokens, weight=torch.zeros(2, 8))
        result.loss.backward()
        assert float(result.loss) == 0.0
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_a_row_without_trained_tokens_changes_nothing(precision):
    loss, atol, gradient = {"float32": (1e-6, 1e-6, 1e-5), "bf16": (5e-3, 5e-2, 3e-2)}[precision]
    model = small_model()
    tokens = random_tokens(3, 10)
    segments = torch.ones_like(tokens)
    targets, weight = shifted(tokens, torch.ones(3, 10), segments)
    weight[1] = 0.0
    with_it = model(tokens, segments=segments, targets=targets, weight=weight)
    keep = [0, 2]
    without = model(
        tokens[keep], segments=segments[keep], targets=targets[keep], weight=weight[keep]
    )
    assert torch.allclose(with_it.loss, without.loss, rtol=loss)
    assert torch.allclose(with_it.nll[keep], without.nll, atol=atol)
    assert_same_gradients(gradients(model, with_it.loss), gradients(model, without.loss), gradient)
