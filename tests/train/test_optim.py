"""Schedules as pure functions; parameter groups; optimizers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from whet.errors import UserError
from whet.model.config import llama
from whet.model.decoder import Transformer
from whet.model.lora.lora import LoRA, apply_lora
from whet.train import state
from whet.train.distributed import Ranks
from whet.train.optim import (
    create_state,
    lr_at,
    make_optimizers,
    matches,
    parameter_groups,
    parse_lr_groups,
    set_lr,
)

SCHEDULES = ["cosine", "linear", "constant", "wsd"]


@given(
    st.integers(1, 500),
    st.sampled_from(SCHEDULES),
    st.floats(0, 0.5) | st.integers(1, 50),
    st.floats(0, 1),
)
def test_schedule_laws(total, schedule, warmup, final):
    """Never above the peak, never 0 before the end, up in the warm-up, never up after it."""
    rates = [
        lr_at(step, total, peak=2.0, schedule=schedule, warmup=warmup, final=final)
        for step in range(total)
    ]
    assert all(0 <= rate <= 2.0 + 1e-12 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1)])
def test_schedule_values(schedule, end):
    rates = [lr_at(s, 101, peak=1.0, schedule=schedule, warmup=10, final=end) for s in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0
    assert rates[100] == pytest.approx(end)
    middle = {"cosine": 0.55, "linear": 0.55, "wsd": 1.0}[schedule]
    assert rates[55] == pytest.approx(middle)


def test_decay_spares_norms_biases_and_embeddings():
    config = llama(50, 16, 2, 2, tied=False)
    model = Transformer(config)
    groups = parameter_groups(model, 0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    expected = {n for n, _ in model.named_parameters() if "norm" not in n and "embed" not in n}
    assert names == expected
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_muon_takes_the_matrices_of_the_layers():
    model = Transformer(llama(50, 16, 2, 2, tied=False))
    groups = parameter_groups(model, 0.1)
    muon, adamw = make_optimizers("muon", groups, beta2=0.95)
    assert isinstance(muon, torch.optim.Muon)
    ours = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in ours}
    assert names == {n for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}
    assert len(adamw.param_groups) == 2


def test_rows_of_new_tokens_are_embeddings():
    """They are trained beside an adapter: no decay, and nothing for Muon to orthogonalise."""
    model = Transformer(llama(20, 8, 1, 2, tied=False, max_positions=8))
    apply_lora(model, LoRA(2), [3, 7], 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, 0.1):
        for parameter in group["params"]:
            rows = names[id(parameter)] in ("embed.rows", "head.rows")
            assert (group["weight_decay"], group["for_muon"]) == (
                (0.0, False) if rows else (0.1, True)
            )


def test_lr_groups():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "up": nn.Linear(4, 4, bias=False)})
    chosen = parse_lr_groups(["embed*=0.5"], ["embed.weight", "up.weight"])
    groups = parameter_groups(model, 0.0, chosen)
    optimizers = make_optimizers("adamw", groups, beta2=0.95)
    set_lr(optimizers, 0.2)
    rates = {id(p): group["lr"] for group in optimizers[0].param_groups for p in group["params"]}
    assert rates[id(model["embed"].weight)] == pytest.approx(0.1)
    assert rates[id(model["up"].weight)] == pytest.approx(0.2)
    for text in ("embed", "=2", "re:(=2", "other=1"):
        with pytest.raises(UserError, match="lr_groups"):
            parse_lr_groups([text], ["embed.weight"])


def test_patterns():
    assert matches("re:q$", "layers.0.attn.q")
    assert not matches("q", "layers.0.attn.q")
    assert matches("layers.*.q", "layers.0.attn.q")


def test_create_state_changes_no_weight():
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    before = [p.clone() for p in model.parameters()]
    groups = parameter_groups(model, 0.5)
    for kind in ("adamw", "muon"):
        optimizers = make_optimizers(kind, groups, beta2=0.95)
        create_state(optimizers)
        assert sum(len(optimizer.state) for optimizer in optimizers) == 2
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None


def eight_bit(model):
    pytest.importorskip("torchao.optim", reason="adamw8bit needs torchao")
    groups = parameter_groups(model, 0.1, [("*weight", 0.5)])
    return make_optimizers("adamw8bit", groups, beta2=0.95)


def take_steps(model, optimizers, steps):
    # Compiling, which torchao does otherwise, takes a minute on a CPU and gives the same numbers.
    with torch.compiler.set_stance("force_eager"):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            set_lr(optimizers, 0.01 * (step + 1))
            for optimizer in optimizers:
                optimizer.step()


def test_adamw8bit_follows_adamw():
    """The first step is the same; then each moment is rounded to one of 256 values in its block."""
    torch.manual_seed(0)
    ours, exact = nn.Linear(64, 128), nn.Linear(64, 128)
    exact.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    optimizers = eight_bit(ours)
    groups = parameter_groups(exact, 0.1, [("*weight", 0.5)])
    reference = make_optimizers("adamw", groups, beta2=0.95)
    for steps, allowed in ((range(1), 1e-6), (range(1, 6), 0.02)):
        take_steps(ours, optimizers, steps)
        take_steps(exact, reference, steps)
        moved = (exact.weight - start).norm()
        assert (ours.weight - exact.weight).norm() <= allowed * moved
        assert torch.allclose(ours.bias, exact.bias, atol=1e-6), "too small to be quantised"
    moments = optimizers[0].state[ours.weight]
    assert moments["exp_avg"].codes.dtype == torch.uint8
    assert (ours.weight - exact.weight).norm() > 1e-6 * moved, "quantised at all"


def test_adamw8bit_resumes_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    whole, first, second = (nn.Linear(64, 128) for _ in range(3))
    first.load_state_dict(whole.state_dict())
    take_steps(whole, eight_bit(whole), range(4))
    optimizers = eight_bit(first)
    take_steps(first, optimizers, range(2))
    tensors = state.tensors_of(first, optimizers)
    path = state.save_state(tmp_path, tensors, state.Facts(step=2), Ranks())
    optimizers = eight_bit(second)
    with torch.compiler.set_stance("force_eager"):
        state.load_state(path, second, optimizers, Ranks())
    take_steps(second, optimizers, range(2, 4))
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)
