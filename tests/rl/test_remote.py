"""Rollouts by a server: as by the embedded engine, token for token; and each way it can fail."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from tests.processes import run_ranks, start, wait
from tests.rl.stub_server import serving
from tests.stages import test_grpo
from tests.stages.test_grpo import command, lines_of
from whet.cli import main
from whet.data.batches import make_batch
from whet.data.layout import Rows
from whet.errors import UserError
from whet.flags.policy import server_root
from whet.rl.rollout_file import Rollout
from whet.rl.server import Request, Server
from whet.stages.grpo import grpo_loss

world = test_grpo.world
LORA = {"lora_rank": 4, "lr": 3e-2}
CASES = [("vllm", {}), ("sglang", {"temperature": 0.7}), ("vllm", LORA), ("sglang", LORA)]


def first_rollout(out):
    rollout = Rollout(out / "rollouts" / "rollout_00000000.h5", 0)
    read = rollout.store.rows(range(len(rollout.store)))
    return read, rollout


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_remote_is_embedded_token_for_token(world, tmp_path, kind, more):
    flags = {"keep_rollouts": 9, **more}
    assert main(command(world, tmp_path / "here", **flags)) == 0
    with serving(world / "base", kind) as stub:
        assert main(command(world, tmp_path / "there", rollout_url=stub.url, **flags)) == 0
    (a, here), (b, there) = first_rollout(tmp_path / "here"), first_rollout(tmp_path / "there")
    assert np.array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(np.asarray(here.logp), np.asarray(there.logp), atol=1e-4)
    for one, other in zip(lines_of(tmp_path / "here"), lines_of(tmp_path / "there"), strict=True):
        assert other["mismatch"] < 1e-4
        assert other["sampler_ratio"] == pytest.approx(1.0, abs=1e-4)
        assert "sampler_ratio" not in one
        for name in ("train_loss", "grad_norm", "reward"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    names = [body["lora_name"] for path, body in stub.calls if path.endswith("/load_lora_adapter")]
    assert len(set(names)) == len(names) == (3 if "lora_rank" in more else 0)
    assert len(stub.models) == 1 + bool(names), "the adapters before are unloaded"
    assert len(list((tmp_path / "there" / "rollouts" / "weights").iterdir())) == 1


def test_ppo_by_a_server(world, tmp_path):
    words = command(world, tmp_path / "run", max_steps=2, updates=2)
    words[0] = "ppo"
    with serving(world / "base") as stub:
        assert main([*words, "--rollout_url", stub.url + "/"]) == 0
    assert lines_of(tmp_path / "run")[0]["mismatch"] < 1e-4


@pytest.mark.parametrize(
    ("kind", "fault", "more"),
    [("vllm", "busy", {}), ("sglang", "full", {}), ("sglang", "room for one", LORA)],
)
def test_what_a_server_cannot_do_yet_or_has_done_already(world, tmp_path, kind, fault, more):
    """vLLM keeps its cached keys while a request runs, and a queue may be full: both are asked
    again. SGLang makes room for an adapter by itself."""
    with serving(world / "base", kind, fault=fault) as stub:
        assert main(command(world, tmp_path / "run", rollout_url=stub.url, **more)) == 0
    asked = [path for path, _ in stub.calls]
    assert asked.count("/reset_prefix_cache") == (6 if fault == "busy" else 0)


def test_a_replay_leaves_the_weights_of_the_run_alone(world, tmp_path):
    out = tmp_path / "run"
    with serving(world / "base") as stub:
        assert main(command(world, out, max_steps=2, rollout_url=stub.url)) == 0
        (weights,) = (out / "rollouts" / "weights").rglob("*.safetensors")
        before = weights.read_bytes()
        assert main(["replay", str(out), "--step", "1"]) == 0
    assert weights.read_bytes() == before


def test_two_ranks_share_one_server(world, tmp_path):
    with serving(world / "base") as stub:
        words = {"max_steps": 2, "keep_rollouts": 9, "rollout_url": stub.url}
        assert main(command(world, tmp_path / "one", **words)) == 0
        ranks = command(world, tmp_path / "two", **words)
        assert run_ranks([ranks], size=2, folder=tmp_path) == [0, 0]
    one, two = (
        (tmp_path / run / "rollouts" / "rollout_00000000.h5").read_bytes() for run in ("one", "two")
    )
    assert one == two


def test_killed_and_resumed_with_a_server(world, tmp_path):
    flags = {"updates": 2, "max_steps": 7, "save_every": 1}
    alone, killed, log = tmp_path / "alone", tmp_path / "killed", tmp_path / "log"
    with serving(world / "base") as stub:
        assert main(command(world, alone, rollout_url=stub.url, **flags)) == 0
        process = start([command(world, killed, rollout_url=stub.url, **flags)], log=log)
        until = time.monotonic() + 120
        while not (killed / "state" / "step_00000003").exists() and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with serving(world / "base") as stub:  # on another port
        words = command(world, killed, resume=True, rollout_url=stub.url, **flags)
        assert wait([start([words], log=log)], [log], 120) == [0]
    for name in ("model.safetensors", "metrics.jsonl", "ledger.bin"):
        assert (alone / name).read_bytes() == (killed / name).read_bytes(), name


FAULTS = {
    "stale": "answers with other weights",
    "stale cache": "samples by keys cached with other weights",
    "raw": "--logprobs-mode processed_logprobs",
    "500": "with 500: CUDA error: an illegal access",
    "slow": "did not answer /v1/completions within --rollout_seconds 4",
    "closed": "no whole answer to /v1/completions",
    "dead": "no whole answer to /v1/completions",
    "fewer": "gave 1 choices, 3 were asked for",
    "old": "gives no token_ids: it is too old",
    "another form": "gave an answer of an unknown form",
    "production": "VLLM_SERVER_DEV_MODE=1",
    "before 0.16": "a whole model needs vLLM 0.16 or newer",
    "elsewhere": "it must see --out under the same path",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_is_told_in_a_line_and_the_state_is_kept(
    world, tmp_path, capsys, fault
):
    out = tmp_path / "run"
    seconds = 4 if fault == "slow" else 60
    with serving(world / "base", fault=fault, since=1) as stub:
        flags = {"rollout_url": stub.url, "rollout_seconds": seconds, "epochs": 4}
        assert main(command(world, out, lr=1e-2, **flags)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert FAULTS[fault] in said[-1], said
    assert sum("error" in line for line in said) == 1
    saved = [path.name for path in (out / "state").iterdir()]
    # The first rollout was sound. Where weights are stale the probe may see it a step later.
    assert saved[-1] >= "step_00000001"
    assert main(command(world, out, lr=1e-2, epochs=4, max_steps=2, resume=True)) in (0, 2)


FINE = {"token_ids": [7, 3], "logprobs": {"token_logprobs": [-1, -0.5]}, "finish_reason": "stop"}
META = {"output_token_logprobs": [[-1.0, 7], [-0.5, 3]], "finish_reason": {"type": "stop"}}


@pytest.mark.parametrize(
    ("kind", "choice", "told"),
    [
        ("vllm", FINE | {"token_ids": ["7", "3"]}, "tokens that are no ids"),
        ("vllm", FINE | {"token_ids": [True, 3]}, "tokens that are no ids"),
        ("vllm", FINE | {"token_ids": [2.0, 3]}, "tokens that are no ids"),
        ("vllm", FINE | {"token_ids": 7}, "an answer of an unknown form"),
        ("vllm", FINE | {"logprobs": {"token_logprobs": [True, -1]}}, "no finite number"),
        ("vllm", FINE | {"logprobs": {"token_logprobs": [float("nan"), -1]}}, "no finite number"),
        ("vllm", FINE | {"logprobs": [-1, -1]}, "an answer of an unknown form"),
        ("vllm", "a text", "an answer of an unknown form"),
        ("sglang", {"meta_info": META | {"output_token_logprobs": [-1, -2]}}, "of an unknown form"),
        ("sglang", {"meta_info": META | {"finish_reason": "stop"}}, "of an unknown form"),
        ("sglang", None, "an answer of an unknown form"),
    ],
)
def test_an_answer_of_another_form_is_told_in_a_line(monkeypatch, kind, choice, told):
    server, request = Server("http://here", 1.0, kind), Request([5], 1, 4, 1.0, (3,), 0)
    answers = {"vllm": {"choices": [choice]}, "sglang": [choice]}
    monkeypatch.setattr(Server, "call", lambda *_: answers[kind])
    for ask in (server.sample, server.judge):
        with pytest.raises(UserError, match=told if ask == server.sample else "--rollout_url"):
            ask(request)


def test_an_answer_in_form_is_read(monkeypatch):
    request = Request([5], 1, 4, 1.0, (3,), 0)
    for kind, answer in (("vllm", {"choices": [FINE]}), ("sglang", [{"meta_info": META}])):
        monkeypatch.setattr(Server, "call", lambda *_, found=answer: found)
        (reply,) = Server("http://here", 1.0, kind).sample(request)
        assert (reply.ids, reply.logp, reply.stopped) == ([7, 3], [-1.0, -0.5], True)


@pytest.mark.parametrize(("fault", "lr"), [("stale", 2e-4), ("part", 1e-3)])
def test_stale_weights_of_small_steps_are_noticed_by_and_by(world, tmp_path, capsys, fault, lr):
    """Each step stays below the bound; the server's numbers do not move, or not far enough: vLLM
    0.32.0 on a CPU does not reload a tied head."""
    with serving(world / "base", fault=fault) as stub:
        flags = {"rollout_url": stub.url, "epochs": 60, "lr": lr}
        assert main(command(world, tmp_path / "run", **flags)) == 2
    said = capsys.readouterr().err
    assert "answers with other weights" in said
    assert max(line["mismatch"] for line in lines_of(tmp_path / "run")) < 0.02


def test_one_rank_whose_server_fails_ends_both(world, tmp_path):
    with serving(world / "base", fault="500", since=1) as stub:
        flags = {"rollout_url": stub.url, "epochs": 4}
        codes = run_ranks([command(world, tmp_path / "run", **flags)], size=2, folder=tmp_path)
    assert codes == [2, 2]
    assert (tmp_path / "run" / "state" / "step_00000001").is_dir()


def test_what_does_not_fit_is_told_before_the_start(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(world, out, rollout_url="http://127.0.0.1:9")) == 2
    assert "http://127.0.0.1:9: no whole answer to /v1/models" in capsys.readouterr().err
    with serving(world / "base", "llama.cpp") as stub:
        assert main(command(world, out, rollout_url=stub.url)) == 2
    assert "neither a vLLM nor an SGLang server" in capsys.readouterr().err
    with serving(world / "base", room=10) as stub:
        assert main(command(world, out, rollout_url=stub.url)) == 2
    assert "takes texts of 10 tokens" in capsys.readouterr().err
    with serving(world / "base", key="secret") as stub:
        assert main(command(world, out, rollout_url=stub.url)) == 2
    assert "environment variable WHET_ROLLOUT_KEY" in capsys.readouterr().err
    assert main(command(world, out, rollout_url="127.0.0.1:8000")) == 2
    assert "expected the root of a server" in capsys.readouterr().err
    assert not out.exists()


def test_a_key(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WHET_ROLLOUT_KEY", "secret")
    with serving(world / "base", key="secret") as stub:
        assert main(command(world, tmp_path / "run", rollout_url=stub.url, max_steps=1)) == 0


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("http://127.0.0.1:8000", True),
        ("https://gpu.example/engine/", True),
        ("http://h:8000/v1", False),
        ("http://me:secret@h", False),
        ("http://h:x", False),
        ("ftp://h", False),
    ],
)
def test_urls(url, fine):
    assert (server_root(url) == "") == fine


def test_a_signal_does_not_wait_for_the_server(world, tmp_path):
    with serving(world / "base", fault="slow", since=1) as stub:
        flags = {"rollout_url": stub.url, "rollout_seconds": 500, "epochs": 4}
        log = tmp_path / "log"
        process = start([command(world, tmp_path / "run", **flags)], log=log)
        until = time.monotonic() + 60
        while stub.loads < 2 and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        assert wait([process], [log], 20) == [143]
    assert (tmp_path / "run" / "state").is_dir()


class Fixed(torch.nn.Module):
    """A model whose ln p are given."""

    def __init__(self, nll):
        super().__init__()
        self.nll = torch.nn.Parameter(nll)

    def forward(self, *_, weight, **rest):
        from whet.model.loss import TokenLoss

        return TokenLoss((self.nll * weight).sum(), self.nll)


def test_the_gradient_has_the_truncated_ratio():
    """d/d nll of the loss is weight x advantage x min(p / p_sampler, 2)."""
    nll = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    rows = Rows(np.ones((1, 5), np.int32), np.ones((1, 5), np.float32), np.ones((1, 5), np.int32))
    batch = make_batch(rows, np.arange(1), total=4.0)
    sampled = torch.tensor([[1.0, 2.5, 5.0, 3.0, 0.0]])[:, : batch.weight.shape[1]]
    nll = torch.cat([nll, torch.zeros(1, 1)], 1)[:, : batch.weight.shape[1]]
    advantage = torch.tensor([[1.0, -1.0, 2.0, 1.0, 0.0]])[:, : batch.weight.shape[1]]
    batch.extra.update(sampled=sampled, advantage=advantage)
    model = Fixed(nll)
    found = grpo_loss(model, batch, kind=None, low=0.2, high=0.2, temperature=1.0, ratio_cap=2.0)
    found.loss.backward()
    ratio = (sampled - nll).exp().clamp(max=2.0)
    torch.testing.assert_close(model.nll.grad, batch.weight * advantage * ratio)
    assert ratio[0, 2] == 2.0
