"""--compile: the same numbers, and graphs that serve all layers and all batches."""

import torch

from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.train.session import compile_layers


def batches(count: int):
    """Batches of two shapes and of other documents each time."""
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        rows, length = (2, 24) if number % 2 else (3, 30)
        begins = torch.rand(rows, length, generator=generator) < 0.25
        tokens = torch.randint(0, 50, (rows, length), generator=generator)
        weight = (torch.rand(rows, length, generator=generator) < 0.5).float()
        yield tokens, begins.long().cumsum(1) + 1, weight


def small_model() -> Transformer:
    model = Transformer(llama(50, 16, 3, 2, n_kv_heads=1, mlp_width=32, max_positions=32))
    init_weights(model, 0)
    return model


def step(model: Transformer, batch) -> list[torch.Tensor]:
    tokens, segments, weight = batch
    model.zero_grad()
    loss = model(tokens, None, segments, targets=tokens.roll(-1, 1), weight=weight).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_one_set_of_graphs_serves_all_batches():
    torch.compiler.reset()
    plain, compiled, made = small_model(), small_model(), []

    def count(graph, inputs):
        made.append(graph)
        return graph.forward

    compile_layers(compiled, backend=count)
    graphs = []
    for batch in batches(5):
        for one, other in zip(step(plain, batch), step(compiled, batch), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        graphs.append(len(made))
    assert graphs[0] > 0
    assert graphs[1:] == graphs[:1] * 4
    assert graphs[0] <= 7, "layers share their graphs; only the last layer's differ"
    torch.compiler.reset()
