"""bf16 on a CPU: oneDNN compiles a product for each shape and keeps it, so shapes must repeat."""

from pathlib import Path

import pytest
import torch

from whet.model.attention import repeated_size
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.foreign import ForeignModel


def batch(step, rows=3, length=256, vocab=512):
    """Documents of any length, a part of each trained: another number of tokens in each step."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(vocab, (rows, length), generator=generator)
    segments = (torch.rand(rows, length, generator=generator) < 0.05).long().cumsum(1) + 1
    weight = (torch.rand(rows, length, generator=generator) < 0.3).float()
    weight[:, -1] = 0
    return tokens, segments, weight


def train(model, optimizer, step):
    tokens, segments, weight = batch(step)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens, None, segments, targets=tokens.roll(-1, 1), weight=weight)
    (found.loss / weight.sum()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.fixture
def work():
    model = Transformer(llama(512, 64, 2, 4, n_kv_heads=2, mlp_width=128))
    init_weights(model, 0)
    return model, torch.optim.AdamW(model.parameters())


def compiled_products(model, optimizer, capfd, steps):
    """How many products are compiled in each step."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    created = []
    for step in range(steps):
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
            train(model, optimizer, step)
        created.append(capfd.readouterr().out.count("create:cache_miss"))
    assert sum(created[:4]) > 10, "what is counted are compiled products"
    return created


def test_no_product_is_compiled_after_the_first_steps(work, capfd):
    assert compiled_products(*work, capfd, steps=24)[12:] == [0] * 12


@pytest.mark.parametrize("kind", ["gpt_neox", "bloom"])
def test_so_it_is_for_other_architectures(kind, capfd):
    """Documents in a row, kept apart by positions, and a document a row."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=512,
        hidden_size=72,  # a size that no other test has compiled
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=136,
    )
    model = ForeignModel(transformers.AutoModelForCausalLM.from_config(config))
    assert model.way == ("positions" if kind == "gpt_neox" else "alone")
    created = compiled_products(model, torch.optim.AdamW(model.parameters()), capfd, steps=24)
    assert sum(count > 0 for count in created[10:]) <= 2, "rarely a number of rows is new"


@pytest.mark.slow
def test_memory_stays(work):
    """At step 200 within a tenth of step 20."""
    held = []
    for step in range(200):
        train(*work, step)
        if step + 1 in (20, 200):
            held.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert held[1] < 1.1 * held[0]


def test_sizes_are_few_and_near():
    sizes = [repeated_size(n) for n in range(1, 70_000)]
    assert all(n <= size < n + max(64, n / 16) for n, size in enumerate(sizes, 1))
    assert len({size for size in sizes if size <= 2048}) == 32
    assert len({size for size in sizes if 2048 < size <= 65_536}) == 5 * 16
    assert repeated_size(0) == 0
