"""A training command around its loop: flags of a continued run, changed data, no memory left."""

import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.numerics.test_layouts import command
from whet.cli import config_class, flags_of, main
from whet.model.precision import quiet_torchao
from whet.stages import packed
from whet.train import session
from whet.train.distributed import Ranks
from whet.train.proposal import Plan, no_room
from whet.train.session import out_of_memory
from whet.train.state import saved_states

NOTHING = Plan(None, None, 1e9)
"""No setting fits."""


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def world(tmp_path):
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8)
    tiny.packed_file(tmp_path / "dev.h5", n_rows=3, seed=1)
    assert main(command(tmp_path, tmp_path / "out", save_every=2)) == 0
    return tmp_path


def test_a_continued_run_has_its_own_flags(world, capsys):
    words = command(world, world / "out", save_every=2, lr=5e-4, seed=3)
    assert main([*words, "--resume"]) == 2
    told = capsys.readouterr().err
    assert "--lr 0.0005: the run in" in told
    assert "--seed 3" in told
    assert f"--config {world / 'out' / 'config.toml'} --resume" in told
    free = command(world, world / "out", save_every=5, keep=1, micro_batch_size=1, recompute="full")
    assert main([*free, "--resume"]) == 0


def test_its_saved_configuration_is_enough(world):
    config = world / "out" / "config.toml"
    assert main(["sft", "--config", str(config), "--resume"]) == 0


def test_other_data_under_the_same_name_is_refused(world, capsys):
    tiny.packed_file(world / "train.h5", n_rows=8, seed=7)
    assert main([*command(world, world / "out", save_every=2), "--resume"]) == 2
    assert "is not the file that this run started with" in capsys.readouterr().err


def test_another_dev_file_under_the_same_name_is_refused(world, capsys):
    tiny.packed_file(world / "dev.h5", n_rows=3, seed=8)
    assert main([*command(world, world / "out", save_every=2), "--resume"]) == 2
    told = capsys.readouterr().err
    assert f"{world / 'dev.h5'}: is not the file that this run started with" in told


@pytest.mark.parametrize("flags", [{"lora_rank": 2}, {"train": "re:layers[.]1[.]"}, {}])
def test_another_base_under_the_same_name_is_refused_where_it_counts(world, capsys, flags):
    """Frozen weights are in no state: an adapter would go on with those of another model."""
    words = command(world, world / "other", save_every=2, **flags)
    assert main(words) == 0
    tiny.model_directory(world / "base", seed=5)
    capsys.readouterr()
    assert main([*words, "--resume"]) == (2 if flags else 0)
    told = "base: does not hold the frozen weights that this run started with"
    assert (told in capsys.readouterr().err) == bool(flags)


def test_a_resume_does_not_overwrite_a_model_that_is_no_run(world, capsys, monkeypatch):
    before = (world / "base" / "model.safetensors").read_bytes()
    words = command(world, world / "base")
    assert main([*words, "--resume"]) == 2
    assert "holds a model that no run of Whet made" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(words) == 2
    assert (world / "base" / "model.safetensors").read_bytes() == before


def test_a_restart_goes_on_with_its_own_job_only(world, capsys, monkeypatch):
    """torchrun starts ranks again that were refused because the folder holds another run."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    words = command(world, world / "other", save_every=2)
    assert main(words) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(words) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 2")
    assert main(words) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_profile_does_not_forbid_to_go_on(world, capsys):
    """Near its end a continued run has too few steps for one."""
    words = command(world, world / "other", save_every=2, max_steps=8, profile=True)
    assert main(words) == 0
    assert main([*words, "--resume"]) == 0


def test_a_damaged_state_is_named_and_the_one_before_is_used(world, capsys):
    newest = saved_states(world / "out" / "state")[-1]
    (newest / "facts.json").write_text("{}")
    assert main([*command(world, world / "out", save_every=2), "--resume"]) == 0
    told = capsys.readouterr().err
    assert f"warning: {newest}: facts.json has 2 bytes instead of" in told


def test_out_of_memory_says_what_to_change(world, monkeypatch, capsys):
    def full(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packed, "token_loss", full)
    assert main(command(world, world / "other", micro_batch_size=4)) == 2
    told = capsys.readouterr().err
    assert "use --micro_batch_size 2 or --recompute selective (and --resume" in told
    assert "`whet plan` with the same flags measures what fits" in told


@pytest.mark.parametrize("stage", ["dpo", "grpo", "ppo", "pretrain", "reward", "sft"])
def test_out_of_memory_names_flags_that_the_stage_has(stage, tmp_path):
    kind = config_class(stage)
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    for micro, shard in ((1, False), (4, False), (4, True)):
        more = {"micro_batch_size": micro, "shard": shard and stage != "ppo", "out": tmp_path}
        config = kind(**(dict.fromkeys(needed, "x") | more))
        told = out_of_memory(config, stage, Ranks(size=2))
        flags = set(re.findall(r"--(\w+)", told))
        assert flags <= {f.name for f in dataclasses.fields(kind)}, told
        assert ("whet plan" in told) == (stage == "sft")
        assert ("--shard" in told) == (stage != "ppo" and not more["shard"]), told


LIGHT = [
    {},
    {"optimizer": "adamw8bit"},
    {"shard": True},
    {"lora_rank": 4},
    {"lora_rank": 4, "lora_4bit": True},
    {"train": "re:mlp"},
    {"kl": 0.1},
    {"lora_rank": 4, "optimizer": "adamw8bit"},
]


@pytest.mark.parametrize("command", ["dpo", "grpo", "ppo", "pretrain", "reward", "sft", "plan"])
def test_what_is_advised_where_nothing_fits_is_taken(command, tmp_path):
    """Each flag that the advice of a run names is one that the run itself would not refuse."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (text := tmp_path / "a.txt").write_text("a")
    kind, flaws = config_class(command), flags_of(command).flaws
    names = {field.name for field in dataclasses.fields(kind)}
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    models, advised = [{}, {"model": str(tmp_path / "adapter")}], set()
    for flags in [more | model for more in LIGHT for model in models]:
        values = dict.fromkeys(needed, "x") | {"out": tmp_path} | flags
        if not values.keys() <= names:
            continue
        config = kind(**(values | ({"data": (str(text),)} if command == "pretrain" else {})))
        if flaws(config):
            continue
        lean = dataclasses.replace(config, micro_batch_size=1)
        if "recompute" in names:
            lean = dataclasses.replace(lean, recompute="full")
        for said in (out_of_memory(lean, command, Ranks(size=2)), no_room(NOTHING, lean)):
            ways = re.findall(r"--(shard|optimizer|lora_rank)(?: (adamw8bit|16))?", said)
            assert ways or "a smaller model" in said, said
            for name, value in ways:
                taken = {"16": 16, "": True}.get(value, value)
                assert flaws(dataclasses.replace(lean, **{name: taken})) == [], (flags, said)
                advised.add(name)
    assert advised >= {"optimizer"}


def test_secrets_of_the_environment_are_written_nowhere(world, monkeypatch, capsys):
    """Neither into the run folder, nor the log, nor what a tracker is told of the run."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cr3t")
    told = []
    tracker = SimpleNamespace(log=lambda *a, **k: told.append((a, k)), finish=lambda: None)
    init = SimpleNamespace(init=lambda **settings: told.append(settings) or tracker)
    monkeypatch.setitem(sys.modules, "wandb", init)
    words = command(world, world / "other", save_every=2, wandb_project="p")
    assert main([word for word in words if word != "--quiet"]) == 0
    assert told, "the tracker was not asked"
    assert "s3cr3t" not in repr(told)
    written = capsys.readouterr()
    assert "s3cr3t" not in written.out + written.err
    files = [path for path in (world / "other").rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cr3t" in path.read_bytes()]


def test_a_first_step_that_compiles_says_so(world, monkeypatch, capsys):
    """Else a minute without a word looks as if the run hung."""
    monkeypatch.setattr(session, "compile_layers", lambda model: None)
    for flags in ({}, {"compile": True}):
        words = command(world, world / f"compiled{len(flags)}", max_steps=1, **flags)
        assert main([word for word in words if word != "--quiet"]) == 0
        said = "the first step compiles code" in capsys.readouterr().out
        assert said == bool(flags)


def test_torchao_is_quiet(caplog):
    quiet_torchao()
    logging.getLogger("torchao.kernel").warning("some of them do not fit this machine")
    with warnings.catch_warnings(record=True) as told:
        warnings.warn("this uses _stable_hash_for_caching", stacklevel=1)
    assert (caplog.records, told) == ([], [])


@pytest.mark.slow
def test_importing_torchao_says_nothing():
    """Of its kernels that do not fit this machine, as nobody can mend them."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    code = "from whet.model.precision import quiet_torchao as q; q(); import torchao.optim"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_float8_is_refused_where_it_cannot_run(world, capsys):
    assert main(command(world, world / "other", float8=True, device="cpu")) == 2
    told = capsys.readouterr().err
    assert "--float8: needs a CUDA device of compute capability 9.0 (Hopper) or newer" in told
    assert not (world / "other" / "config.toml").exists()


@pytest.mark.parametrize(
    ("schedule", "more"), [("constant", {"max_steps": 10}), ("wsd", {"max_steps": 15})]
)
def test_a_run_is_made_longer(world, schedule, more):
    """It ends as one that was as long from the beginning: of wsd, from where the rate fell."""
    flags = {"schedule": schedule, "warmup": 1, "save_every": 3, "keep": 1, "max_steps": 8}
    assert main(command(world, world / "run", **flags)) == 0
    assert main([*command(world, world / "run", **(flags | more)), "--resume"]) == 0
    assert main(command(world, world / "whole", **(flags | more))) == 0
    for name in ("model.safetensors", "ledger.bin"):
        assert (world / "run" / name).read_bytes() == (world / "whole" / name).read_bytes(), name
    steps = [[x for x in metrics(world / n) if "train_loss" in x] for n in ("run", "whole")]
    assert steps[0] == steps[1]


def test_a_longer_run_by_epochs_goes_on_by_its_new_length(world):
    flags = {"schedule": "constant", "save_every": 2, "max_steps": 1000, "epochs": 1}
    assert main(command(world, world / "run", **flags)) == 0
    longer = flags | {"epochs": 3}
    assert main([*command(world, world / "run", **longer), "--resume"]) == 0
    assert max(line["step"] for line in metrics(world / "run")) == 6
    config = tomllib.loads((world / "run" / "config.toml").read_text())
    assert config["epochs"] == 3, "the next resume has it, too"


def test_what_cannot_be_made_longer_says_why(world, capsys):
    words = command(world, world / "out", save_every=2, max_steps=12)
    assert main([*words, "--resume"]) == 2
    told = capsys.readouterr().err
    assert "a cosine schedule is laid out for the length it began with" in told
    assert f"whet sft --model {world / 'out'} --out NEW" in told
    words = command(world, world / "out", save_every=2, max_steps=4)
    assert main([*words, "--resume"]) == 2
    assert "it can be made longer, not shorter" in capsys.readouterr().err


def test_a_wsd_run_without_a_state_from_before_its_decay_is_not_made_longer(world, capsys):
    flags = {"schedule": "wsd", "save_every": 3, "max_steps": 10}
    assert main(command(world, world / "run", **flags)) == 0
    for folder in saved_states(world / "run" / "state")[:-1]:
        shutil.rmtree(folder)
    capsys.readouterr()
    assert main([*command(world, world / "run", **(flags | {"max_steps": 20})), "--resume"]) == 2
    assert "no state from before step 8, where its learning rate began" in capsys.readouterr().err


def test_a_run_of_another_command_is_named(world, capsys):
    (world / "out" / "run.json").write_text('{"command": "pretrain"}')
    assert main([*command(world, world / "out", save_every=2), "--resume"]) == 2
    told = capsys.readouterr().err
    assert "holds a run of `whet pretrain`, which `whet sft` can't continue" in told


def test_the_end_says_where_everything_is(world, capsys):
    words = command(world, world / "other", samples=1)
    words.remove("--quiet")
    assert main(words) == 0
    told = capsys.readouterr().out
    out = world / "other"
    for line in (f"whet chat {out}", f"tensorboard --logdir {out / 'tensorboard'}"):
        assert line in told
    assert str(out / "samples.jsonl") in told
    assert "dev loss" in told
    assert "nats a token" in told
    assert "dev_loss" not in told.split("done:")[0], "no raw keys"


def test_a_run_is_replayed_from_another_directory(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    words = command(
        world, world / "out2", data="train.h5", model="base", dev="dev.h5", save_every=2
    )
    assert main(words) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["replay", str(world / "out2"), "--step", "5"]) == 0
    assert "train_loss" in capsys.readouterr().out
    assert main(["ledger", str(world / "out2"), "--step", "5"]) == 0
