"""Steps judged on the device: the same verdicts as on the host, and steps that leave no trace."""

import copy
import json
import math
import random

import pytest
import torch
from torch import nn

from tests import tiny
from tests.numerics.test_layouts import command
from tests.train.test_spikes import spoiled
from whet.cli import main
from whet.flags.training import TrainSettings
from whet.stages import packed, sft
from whet.train import loop, optim
from whet.train import step as steps
from whet.train.distributed import Ranks
from whet.train.signals import Stop
from whet.train.step import to_device

CPU = torch.device("cpu")


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def plain_rule(loss: float, norm: float, norms: list[float], clip: float) -> bool:
    """Whether a step is bad, by the rule in words."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return True
    return len(norms) >= steps.NEEDED and norm > max(clip, steps.FACTOR * max(norms))


@pytest.mark.parametrize("clip", [0.0, 1.0, 20.0])
def test_the_device_judges_by_the_rule(clip):
    rng, norms = random.Random(1), list[float]()
    recent = steps.recent_norms([], CPU)
    found, choices = 0, [1.0] * 60 + [5.5, 5.5, 30.0, 30.0, math.inf, math.nan]
    for step in range(600):
        norm, loss = rng.choice(choices), rng.choice([1.0] * 30 + [math.nan])
        bad = plain_rule(loss, norm, norms, clip)
        verdict = recent.judge(scalar(loss), scalar(norm), clip).tolist()
        assert bool(verdict[0]) == bad, step
        found += bad and "were at most" in (steps.reason(loss, norm, verdict) or "")
        if not bad:
            norms = [*norms, norm][-steps.WINDOW :]
        if step % 97 == 0:  # a resume builds it again from what was saved
            recent = steps.recent_norms(norms, CPU)
    assert found > 5


def some_optimizers(kind: str) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    groups = optim.parameter_groups(model, 0.1)
    made = optim.make_optimizers(kind, groups, beta2=0.95)
    optim.set_lr(made, 0.1)
    return model, made


def everything(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list:
    return copy.deepcopy([model.state_dict(), *(o.state_dict()["state"] for o in optimizers)])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bad_step_leaves_no_trace(kind):
    model, optimizers = some_optimizers(kind)
    for bad, gradient in [(False, 1.0), (True, math.nan), (True, 1e9), (False, 0.5)]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        before = everything(model, optimizers)
        steps.step_unless(torch.tensor(bad), optimizers)
        same = str(everything(model, optimizers)) == str(before)
        assert same == bad
    other, plain = some_optimizers(kind)  # as if there had been only the two good steps
    for gradient in (1.0, 0.5):
        for parameter in other.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        for optimizer in plain:
            optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_reading_a_step_later_changes_nothing(tmp_path, monkeypatch):
    """What a GPU does, on the CPU: numbers are read a step later, spikes are skipped all the same,
    and all files of the run are equal."""
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8)
    tiny.packed_file(tmp_path / "dev.h5", n_rows=3, seed=1)
    flags = {"epochs": 20, "max_steps": 24, "micro_batch_size": 4, "save_every": 4, "clip": 1.0}
    for behind, name in ((0, "now"), (1, "later")):
        with monkeypatch.context() as patch:
            patch.setattr(packed, "token_loss", spoiled(packed.token_loss, {20, 22}, 1000.0))
            patch.setattr(loop, "steps_behind", lambda device, n=behind: n)
            assert main(command(tmp_path, tmp_path / name, **flags)) == 0
    now, later = tmp_path / "now", tmp_path / "later"
    for name in ("metrics.jsonl", "ledger.bin", "samples.jsonl", "model.safetensors"):
        assert (now / name).read_bytes() == (later / name).read_bytes(), name
    steps = [path.name for path in sorted((later / "incidents").iterdir())]
    assert steps == ["step_00000021.json", "step_00000023.json"]
    for name in steps:
        one, two = (json.loads((run / "incidents" / name).read_text()) for run in (now, later))
        assert one.pop("replay") != two.pop("replay")
        assert one == two


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu(tmp_path):
    device = torch.device("cuda", 0)
    ranks = Ranks(device=device)
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8)
    config = sft.Config(
        model=str(tmp_path / "base"),
        data=tmp_path / "train.h5",
        out=tmp_path / "out",
        precision="bf16",
        micro_batch_size=2,
        batch_size=4,
    )
    stage = sft.build(config, ranks)
    stage.model.to(device)
    made = step_optimizers(stage.model, config, device)
    recent, stop = steps.recent_norms([], device), Stop(grace_s=0.0)
    for step in range(4):
        micros = to_device(stage.batches(step % stage.total_steps), device)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one warms up
        try:
            result = loop.forward_backward(stage, step, micros, config, ranks, stop, torch.bfloat16)
            loop.apply_step(result, stage, config, made, recent)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(math.isfinite(value) for value in result.sums.tolist())


def step_optimizers(
    model: nn.Module, config: TrainSettings, device: torch.device
) -> list[torch.optim.Optimizer]:
    groups = optim.parameter_groups(model, config.weight_decay)
    return optim.make_optimizers("adamw", groups, beta2=0.95)
