"""What of a base is trained, and how it is written: adapters that go on, the base's precision."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.numerics.test_layouts import command
from tests.stages.test_sft import metrics
from whet.cli import main
from whet.errors import UserError
from whet.generate.opened import open_model
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.hf import checkpoint
from whet.model.hf.checkpoint import save_model, save_pt
from whet.model.lora.read import CONFIG, WEIGHTS
from whet.model.open import load_backbone_from_ckpt
from whet.stages import model as stage_model
from whet.stages.model import ModelWriter, select_trainable
from whet.train import loop, session
from whet.train.distributed import Ranks
from whet.train.run import RunFolder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    tiny.model_directory(folder / "base")
    half = load_backbone_from_ckpt(folder / "base", dtype=torch.bfloat16)
    save_model(half, folder / "half", tiny.chat(), {})
    save_pt(half, folder / "half.pt", "sft", 1, {})
    tiny.packed_file(folder / "train.h5", n_rows=12)
    tiny.packed_file(folder / "dev.h5", n_rows=5, seed=1)
    return folder


@pytest.fixture(scope="module")
def adapter(world: Path) -> Path:
    flags = {"lora_rank": 2, "lora_alpha": 3, "lora_targets": "q,down", "lora_dora": True}
    assert main(command(world, world / "adapter", lr=1e-2, **flags)) == 0
    return world / "adapter"


def test_an_adapter_is_trained_further(world, adapter, tmp_path):
    assert main(command(world, tmp_path / "out", model=adapter, lr=1e-2)) == 0
    before = [line["dev_loss"] for line in metrics(adapter) if "dev_loss" in line]
    after = [line["dev_loss"] for line in metrics(tmp_path / "out") if "dev_loss" in line]
    assert after[0] == pytest.approx(before[-1], rel=1e-6), "it begins where the other ended"
    assert after[-1] != after[0]
    configs = [json.loads((path / CONFIG).read_text()) for path in (adapter, tmp_path / "out")]
    assert configs[0] == configs[1], "same base, rank, scale, targets"
    old, new = (load_file(path / WEIGHTS) for path in (adapter, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[name], new[name]) for name in old)
    lineage = json.loads((tmp_path / "out" / "whet.json").read_text())
    assert lineage["base"] == str(world / "base")
    assert lineage["adapter"] == str(adapter)


@pytest.mark.parametrize(
    ("lr", "rank", "noted"), [(1e-5, 2, True), (1e-4, 2, False), (1e-5, None, False)]
)
def test_a_learning_rate_too_low_for_an_adapter_is_noted(world, tmp_path, capsys, lr, rank, noted):
    flags = {"lora_rank": rank} if rank else {}
    words = command(world, tmp_path / "out", lr=lr, max_steps=1, **flags)
    assert main([word for word in words if word != "--quiet"]) == 0
    assert ("ten times" in capsys.readouterr().out) == noted


def test_an_adapter_without_a_tokenizer_takes_its_bases(world, adapter, tmp_path):
    """PEFT saves none."""
    (tmp_path / "a").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "a" / name).write_bytes((adapter / name).read_bytes())
    assert main(command(world, tmp_path / "out", model=tmp_path / "a", max_steps=1)) == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert open_model(tmp_path / "a").chat.tokenizer.hash == tiny.tokenizer().hash


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"lora_rank": 4}, "--lora_rank: {adapter} is trained further, with its own settings"),
        ({"lora_targets": "q"}, "--lora_targets: {adapter} is trained further"),
        ({"train": "re:mlp"}, "exclude each other"),
        ({"chat_template": "chatml"}, "can't be given tokens that it lacks"),
    ],
)
def test_what_an_adapter_settles_itself_is_told(world, adapter, tmp_path, capsys, flags, told):
    assert main(command(world, tmp_path / "out", model=adapter, **flags)) == 2
    assert told.format(adapter=adapter) in capsys.readouterr().err


def test_flags_of_an_adapter_alone_are_told(world, tmp_path, capsys):
    assert main(command(world, tmp_path / "out", lora_alpha=8, lora_dora=True)) == 2
    error = capsys.readouterr().err
    assert "--lora_alpha: there is no adapter; add --lora_rank 16" in error
    assert "--lora_dora: there is no adapter" in error


def test_an_adapter_with_whole_matrices_is_told(world, adapter, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    config = json.loads((adapter / CONFIG).read_text()) | {"modules_to_save": ["embed_tokens"]}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    (tmp_path / "a" / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes())
    assert main(command(world, tmp_path / "out", model=tmp_path / "a")) == 2
    assert "holds whole matrices (embed_tokens)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "dtype"),
    [("half", torch.bfloat16), ("half.pt", torch.bfloat16), ("base", torch.float32)],
)
def test_the_model_is_written_in_its_bases_precision(world, tmp_path, base, dtype):
    """Training holds float32: what is written is those numbers, rounded once."""
    flags = {"model": world / base, "tokenizer": world / "half"}
    single, out = tmp_path / "one.pt", tmp_path / "out"
    assert main(command(world, out, out_ckpt=single, save_every=6, **flags)) == 0
    saved = load_file(out / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    content = torch.load(single, weights_only=True)
    assert {value.dtype for value in content["model_state_dict"].values()} == {dtype}
    [state] = (out / "state").glob("step_*/shard-*.safetensors")
    exact = load_file(state)["model.layers.1.mlp.up.weight"]
    assert exact.dtype == torch.float32
    assert torch.equal(exact.to(dtype), saved["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(exact, exact.bfloat16().float())


CHAT = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def chats(world: Path) -> Path:
    """The base's tokenizer knows no chat tokens; the data is made with those of chatml."""
    lines = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in (("one plus two", "three"), ("two plus two", "four"), ("sum of one", "one"))
    ]
    (world / "chats.jsonl").write_text("\n".join(json.dumps(line) for line in lines * 4))
    words = ["--tokenizer", str(world / "base"), "--chat_template", "chatml", "--workers", "0"]
    words += ["--context_length", "32", "--out", str(world / "chats.h5")]
    assert main(["prepare", "--data", str(world / "chats.jsonl"), *words]) == 0
    return world / "chats.h5"


def new_ids(directory: Path) -> list[int]:
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [backend.token_to_id(text) for text in CHAT]


def test_chat_tokens_are_added_to_a_base_without_them(world, chats, tmp_path):
    """Rows up to a multiple of 64, each the mean of the old ones; then they are trained."""
    out = tmp_path / "out"
    flags = {"data": chats, "dev": chats, "chat_template": "chatml", "max_steps": 1}
    assert main(command(world, out, **flags, lr=1e-9)) == 0
    old = load_file(world / "base" / "model.safetensors")["model.embed_tokens.weight"]
    grown = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    assert len(grown) % 64 == 0
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(grown)
    assert torch.allclose(grown[: len(old)], old, atol=1e-6)
    mean = old.mean(0).expand(len(grown) - len(old), -1)
    assert torch.allclose(grown[len(old) :], mean, atol=1e-6)
    assert None not in new_ids(out)
    assert "im_start" in (out / "chat_template.jinja").read_text()
    generation = json.loads((out / "generation_config.json").read_text())
    assert new_ids(out)[1] in torch.tensor(generation["eos_token_id"]).view(-1)


def test_rows_of_new_chat_tokens_are_trained_beside_lora_and_go_on(world, chats, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = {"data": chats, "dev": chats, "max_steps": 2, "lr": 1e-2}
    assert main(command(world, first, **flags, chat_template="chatml", lora_rank=2)) == 0
    config = json.loads((first / CONFIG).read_text())
    assert config["trainable_token_indices"] == new_ids(first)
    assert main(command(world, second, **flags, model=first)) == 0
    old = load_file(world / "base" / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = [load_file(path / WEIGHTS)[key] for path in (first, second)]
    assert not torch.allclose(rows[0], old.mean(0).expand(2, -1), atol=1e-4)
    assert not torch.allclose(rows[0], rows[1], atol=1e-4)
    after = [line["dev_loss"] for line in metrics(second) if "dev_loss" in line]
    assert after[-1] < after[0]
    assert main(["export", str(second), "--merge", "--out", str(tmp_path / "merged")]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.allclose(merged[new_ids(first)], rows[1], atol=1e-6)
    assert torch.equal(merged[: len(old)], old)


def test_what_cannot_be_saved_is_not_trained(world, tmp_path, capsys, monkeypatch):
    """The read-back differs: that is found before the first step, and nothing stays."""
    monkeypatch.setattr(checkpoint.torch, "equal", lambda a, b: False)
    assert main(command(world, tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert "could not be saved, so training does not begin" in told
    assert "read back it differs" in told
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_writes_what_the_end_writes(world, tmp_path, monkeypatch):
    written = []
    real = stage_model.save_model

    def noting(model, directory, *args, **kwargs):
        real(model, directory, *args, **kwargs)
        written.append(sorted(path.name for path in directory.iterdir()))

    monkeypatch.setattr(stage_model, "save_model", noting)
    model = load_backbone_from_ckpt(world / "base")
    writer = ModelWriter(tiny.chat(), {"base": "x"}, out=tmp_path / "out")
    before = torch.get_rng_state()
    writer.rehearse(model)
    assert torch.equal(torch.get_rng_state(), before)
    writer(model, tmp_path / "out", {})
    assert written[0] == written[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(stage_model, "REHEARSED_BYTES", 0)  # of a large model all but the weights
    writer.rehearse(model)
    assert written[2] == [name for name in written[0] if name != "model.safetensors"]
    with pytest.raises(UserError, match=r"could not be saved.*not JSON serializable"):
        ModelWriter(None, {"base": object()}, out=tmp_path / "odd").rehearse(model)


def test_other_ranks_wait_for_each_save(world, tmp_path, monkeypatch):
    waited = []
    for module in (loop, session):
        monkeypatch.setattr(module.distributed, "wait_for_all", waited.append)
    assert main(command(world, tmp_path / "out", max_steps=1)) == 0
    assert waited, "the final model"
    before = len(waited)
    stage = SimpleNamespace(model=None, save_model=lambda *what: None)
    loop._save_best(stage, RunFolder(tmp_path, Ranks()), {})
    assert len(waited) == before + 1


@pytest.mark.parametrize("flags", [{"lora_rank": 2}])
def test_a_pt_of_an_adapter_is_refused_before_training(world, tmp_path, capsys, flags):
    words = command(world, tmp_path / "out", out_ckpt=tmp_path / "m.pt", **flags)
    assert main(words) == 2
    assert "--out_ckpt: an adapter is trained" in capsys.readouterr().err


def test_parameters_are_chosen_by_pattern() -> None:
    model = Transformer(llama(64, 16, 3, 2))
    init_weights(model, seed=0)
    assert select_trainable(model, "re:mlp[.]up") == [f"layers.{i}.mlp.up.weight" for i in range(3)]
    assert sum(p.requires_grad for p in model.parameters()) == 3
    assert len(select_trainable(model, "re:.")) == len(list(model.parameters()))
    for pattern, message in (
        ("re:conv", "matches no parameter; names look like embed.weight"),
        ("re:(", "not a regular expression"),
        ("mlp", "expected all, or re:"),
    ):
        with pytest.raises(UserError, match=message):
            select_trainable(model, pattern)
