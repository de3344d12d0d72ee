"""The decoder's own behaviour: entry, cache, recomputation, initial values."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import CheckpointPolicy

from tests.model.list_cache import ListCache
from whet.data.batches import map_tensors
from whet.model.attention import plan_documents
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.loss import TokenLoss
from whet.model.recompute import keep_products


def model(seed=0, **changes):
    config = llama(50, 16, 2, 4, n_kv_heads=2, mlp_width=24, max_positions=32, **changes)
    decoder = Transformer(config)
    init_weights(decoder, seed)
    return decoder


def batch(rows=2, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (rows, length), generator=generator)
    weight = torch.rand(rows, length, generator=generator) * (torch.arange(length) % 3 > 0)
    weight[:, -1] = 0.0
    return tokens, tokens.roll(-1, 1), weight


def test_decoding_by_cache_equals_reading_all_at_once():
    """Prompts of 3 and 5 tokens, padded on the right, then four steps."""
    decoder = model()
    tokens, _, _ = batch(length=9)
    lengths = torch.tensor([3, 5])
    cache = ListCache(2, 12)
    prompt = tokens[:, :5].clone()
    prompt[0, 3:] = 49  # padding
    logits = decoder(prompt, cache=cache, logits_at=lengths[:, None] - 1)
    whole = decoder(tokens)
    rows = torch.arange(2)
    assert torch.allclose(logits[:, 0], whole[rows, lengths - 1], atol=1e-5)
    for _ in range(4):
        step = tokens[rows, lengths][:, None]
        logits = decoder(step, lengths[:, None], cache=cache)
        assert torch.allclose(logits[:, 0], whole[rows, lengths], atol=1e-5)
        lengths = lengths + 1


def test_logits_at_picks_places():
    decoder = model()
    tokens, _, _ = batch()
    at = torch.tensor([[0, 5], [11, 2]])
    whole = decoder(tokens)
    picked = decoder(tokens, logits_at=at)
    assert torch.allclose(picked[0], whole[0, at[0]], atol=1e-6)
    assert torch.allclose(picked[1], whole[1, at[1]], atol=1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(recompute):
    decoder = model()
    tokens, targets, weight = batch()
    parameters = list(decoder.parameters())
    kept = decoder(tokens, targets=targets, weight=weight)
    expected = torch.autograd.grad(kept.loss, parameters)
    decoder.recompute = recompute
    again = decoder(tokens, targets=targets, weight=weight)
    for mine, other in zip(torch.autograd.grad(again.loss, parameters), expected, strict=True):
        assert torch.equal(mine, other)


def saved_bytes(decoder):
    """Bytes that the backward pass of one step holds on to."""
    held = {}

    def keep(t):
        held[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    tokens, targets, weight = batch(rows=4, length=32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        decoder(tokens, targets=targets, weight=weight)
    return sum(held.values())


def test_recomputation_saves_memory():
    decoder = model()
    none = saved_bytes(decoder)
    decoder.recompute = "full"
    assert saved_bytes(decoder) < 0.7 * none


def test_selective_recomputation_keeps_products_and_attention():
    kept = set()

    def watch(context, op, *args, **options):
        policy = keep_products(context, op, *args, **options)
        if policy == CheckpointPolicy.MUST_SAVE:
            kept.add(op.name().split("::")[1].split(".")[0])
        return policy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whet.model.recompute.keep_products", watch)
        decoder = model()
        decoder.recompute = "selective"
        tokens, targets, weight = batch()
        decoder(tokens, targets=targets, weight=weight).loss.backward()
    assert kept == {"mm", "_scaled_dot_product_flash_attention_for_cpu"}


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_are_not_compiled_again_for_each_batch():
    """As on a GPU, but without one: the fake kernels of the meta device know shapes only."""
    counter = CompileCounter()
    config = llama(50, 32, 3, 4, n_kv_heads=2)
    with torch.device("meta"):
        decoder = Transformer(config).to(torch.bfloat16)
    for layer in decoder.layers:
        layer.compile(backend=counter, dynamic=True)  # attention stays outside of the graphs
    counts = []
    for lengths in ([5, 7, 9], [4, 4], [30, 2, 2, 1], [11] * 5):
        numbers = [i + 1 for i, n in enumerate(lengths) for _ in range(n)]
        segments = torch.tensor([numbers])
        plan = plan_documents(segments.shape, segments.device, segments)
        logits = decoder(
            segments.to("meta"), plan=map_tensors(plan, lambda tensor: tensor.to("meta"))
        )
        logits.sum().backward()
        counts.append(counter.frame_count)
    assert 0 < counts[0] == counts[-1]


def test_a_result_names_its_parts():
    tokens, targets, weight = batch()
    result = model()(tokens, targets=targets, weight=weight)
    assert isinstance(result, TokenLoss)
    assert result.nll.shape == tokens.shape
    assert torch.equal(result.nll != 0, weight != 0)
    assert torch.allclose(result.loss, (result.nll * weight).sum(), rtol=1e-5)


def test_initial_values_follow_the_table():
    decoder = Transformer(llama(400, 64, 8, 4, tied=False))
    init_weights(decoder, 1)
    std = {name: float(p.detach().std()) for name, p in decoder.named_parameters()}
    expected = (2 / (5 * 64)) ** 0.5
    assert std["embed.weight"] == pytest.approx(expected, rel=0.05)
    assert std["head.weight"] == pytest.approx(expected, rel=0.05)
    assert std["layers.3.attn.q.weight"] == pytest.approx(expected, rel=0.05)
    assert std["layers.3.mlp.down.weight"] == pytest.approx(expected / 4, rel=0.05)
    assert std["layers.3.attn.o.weight"] == pytest.approx(expected / 4, rel=0.05)
    assert torch.equal(decoder.norm.weight, torch.ones(64))


def test_initial_values_depend_on_the_seed_alone():
    one, same, other = model(seed=3), model(seed=3), model(seed=4)
    assert torch.equal(one.embed.weight, same.embed.weight)
    assert not torch.equal(one.embed.weight, other.embed.weight)


def test_a_new_model_starts_at_the_loss_of_guessing():
    """With the classical 0.02; wider initial weights begin a few tenths above ln V."""
    tokens, targets, weight = batch(rows=8, length=32)
    decoder = model()
    decoder = Transformer(dataclasses.replace(decoder.config, init_std=0.02))
    init_weights(decoder, 0)
    result = decoder(tokens, targets=targets, weight=weight)
    assert float(result.loss.detach() / weight.sum()) == pytest.approx(3.912, abs=0.05)  # ln 50


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_losses_with_a_gradient_are_those_of_the_logits(temperature):
    decoder = model()
    tokens, targets, weight = batch()
    parameters = list(decoder.parameters())
    logits = decoder(tokens) / temperature
    full = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    expected = torch.where(weight != 0, full, 0.0)
    found = decoder(tokens, targets=targets, weight=weight, per_token=True, temperature=temperature)
    assert torch.allclose(found.nll, expected, atol=1e-5)
    assert torch.allclose(found.loss, (weight * expected).sum(), rtol=1e-5)
    wanted = torch.autograd.grad(expected.tanh().sum(), parameters)
    got = torch.autograd.grad(found.nll.tanh().sum(), parameters)
    for mine, other in zip(got, wanted, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-6)
    summed = decoder(tokens, targets=targets, weight=weight, temperature=temperature)
    assert torch.allclose(summed.loss, found.loss, rtol=1e-5)


def test_gradients_are_the_same_each_time():
    """A tied embedding, too, whose rows several threads add to: runs are repeated bit for bit."""
    decoder, threads = Transformer(llama(50, 64, 1, 1, mlp_width=8)), torch.get_num_threads()
    init_weights(decoder, 0)
    tokens, targets, weight = batch(rows=32, length=32)
    losses = [decoder(tokens, targets=targets, weight=weight).loss for _ in range(4)]
    torch.set_num_threads(2)
    try:
        first, *others = (torch.autograd.grad(loss, decoder.embed.weight)[0] for loss in losses)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, first) for other in others)


def test_a_score_is_the_same_padded_packed_and_alone():
    """One number at a document's last token, which depends on the document alone."""
    decoder = Transformer(dataclasses.replace(model().config, score=True))
    init_weights(decoder, 2)
    assert torch.equal(decoder.score.weight, torch.zeros(1, decoder.config.width))
    torch.nn.init.normal_(decoder.score.weight)
    documents = [
        torch.randint(1, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 3)
    ]
    alone = []
    for document in documents:
        weight = torch.zeros(1, len(document))
        weight[0, -1] = 1.0
        alone.append(decoder(document[None], weight=weight)[0, -1])
    packed = torch.cat([*documents, torch.zeros(7, dtype=torch.long)])[None]
    segments = torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor([5, 9, 3, 7]))[None]
    weight = torch.zeros(packed.shape)
    ends = torch.tensor([5, 9, 3]).cumsum(0) - 1
    weight[0, ends] = 1.0
    found = decoder(packed, None, segments, weight=weight)
    assert found.dtype == torch.float32
    assert torch.allclose(found[0, ends], torch.stack(alone), atol=1e-6)
    assert torch.equal(found != 0, weight != 0)
    found.sum().backward()
    assert decoder.embed.weight.grad is not None
