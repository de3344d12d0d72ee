"""Opening and saving: what is refused and how it is told, what a crash leaves, older layouts."""

import errno
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from whet import files
from whet.errors import UserError
from whet.files import read_json
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.hf import checkpoint
from whet.model.hf.checkpoint import save_model, save_pt
from whet.model.hf.config import from_hf, to_hf
from whet.model.lora.lora import LoRA, apply_lora
from whet.model.lora.write import save_adapter
from whet.model.open import load_backbone_from_ckpt

TINY = llama(64, 16, 2, 2, max_positions=32, tied=False)


@pytest.fixture
def model() -> Transformer:
    model = Transformer(TINY)
    init_weights(model, seed=1)
    return model


@pytest.fixture
def directory(model: Transformer, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "m", None, {"base": "none"})
    return tmp_path / "m"


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_backbone_from_ckpt(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path.parent) in message
    return message


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


def put(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -5000])
def test_a_truncated_file_is_told(directory: Path, keep: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated or damaged" in refused(directory)


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b"{",
        b'{"a": 3}',
        b'{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b"[" * 200_000,
    ],
    ids=lambda header: header[:60].decode(),
)
def test_a_damaged_header_is_told(directory: Path, header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (directory / "model.safetensors").write_bytes(content)
    assert "truncated or damaged" in refused(directory)


def test_missing_surplus_and_misshaped_weights_are_named(directory: Path) -> None:
    tensors = weights(directory)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    put(directory, tensors)
    assert "missing weights: model.layers.1.mlp.up_proj.weight" in refused(directory)
    put(
        directory,
        {**tensors, "model.layers.1.mlp.up_proj.weight": gone, "model.extra": gone.clone()},
    )
    assert "no use for: model.extra" in refused(directory)
    put(directory, {**tensors, "model.layers.1.mlp.up_proj.weight": gone[:-1].contiguous()})
    assert "up_proj.weight is [63, 16], by the configuration [64, 16]" in refused(directory)
    quantised = torch.zeros(gone.shape, dtype=torch.int8)
    put(directory, {**tensors, "model.layers.1.mlp.up_proj.weight": quantised})
    assert "quantised" in refused(directory)


def test_sizes_in_config_that_disagree_are_told(directory: Path) -> None:
    edit_config(directory, vocab_size=65)
    with pytest.raises(UserError, match=r"embed_tokens.weight is \[64, 16\].*\[65, 16\]"):
        load_backbone_from_ckpt(directory)


def test_unknown_model_type_and_keys_are_told_with_the_file(directory: Path) -> None:
    edit_config(directory, wobble=3)
    assert "config.json: wobble = 3 is not understood" in refused(directory)
    edit_config(directory, model_type="mamba9")
    assert "mamba9" in refused(directory)


def test_other_paths_are_told(tmp_path: Path, directory: Path) -> None:
    assert "there is no such path" in refused(tmp_path / "nowhere")
    (directory / "config.json").unlink()
    assert "no config.json" in refused(directory)
    for content in ("{", "[" * 200_000):
        (directory / "config.json").write_text(content)
        assert "cannot be read as JSON" in refused(directory)


def test_a_tied_model_with_another_head_is_told(directory: Path) -> None:
    edit_config(directory, tie_word_embeddings=True)
    assert "lm_head.weight is not the embedding" in refused(directory)
    tensors = weights(directory)
    put(directory, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert load_backbone_from_ckpt(directory).config.tied


def test_shards_are_written_and_their_damage_told(model: Transformer, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    save_model(model, directory, None, {}, shard_bytes=9000)
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(torch.equal(a, b) for a, b in zip(*states(directory, model), strict=True))
    transformers = pytest.importorskip("transformers")
    opened = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.allclose(opened(tokens).logits, model(tokens), atol=1e-5)

    index = directory / "model.safetensors.index.json"
    good = index.read_text()
    shards[1].rename(tmp_path / "away")
    assert f"{shards[1].name}, which is missing" in refused(directory)
    shutil.copy(shards[0], shards[1])
    assert "holds, too" in refused(directory)
    (tmp_path / "away").rename(shards[1])
    index.write_text(good.replace("lm_head.weight", "lm_tail.weight"))
    assert "should hold lm_tail.weight" in refused(directory)
    index.write_text('{"weight_map": []}')
    assert "weight_map" in refused(directory)


@pytest.mark.parametrize("target", ["../m2/model.safetensors", "/etc/passwd", "..", "a\\b", ""])
def test_an_index_that_points_outside_is_refused(directory: Path, target: str) -> None:
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": target}}))
    assert "outside of its own directory" in refused(directory)


def states(path: Path, model: Transformer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    again = load_backbone_from_ckpt(path).state_dict()
    return list(again.values()), [model.state_dict()[name] for name in again]


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_pickles_are_never_executed(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": {"a": Bomb()}, "cfg": {}}, tmp_path / "bomb.pt")
    assert "refused: it holds code" in refused(tmp_path / "bomb.pt")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(to_hf(TINY)))
    (tmp_path / "hub" / "pytorch_model.bin").write_bytes((tmp_path / "bomb.pt").read_bytes())
    assert "a pickle, which can run code" in refused(tmp_path / "hub")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip"])
def test_damaged_pt_files_are_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert re.search("damaged|refused", refused(tmp_path / "x.pt"))


def test_pt_files_without_the_sizes_are_told(model: Transformer, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "x.pt")
    assert "expected model_state_dict and cfg" in refused(tmp_path / "x.pt")
    torch.save({"model_state_dict": {"a": 3}, "cfg": to_hf(TINY)}, tmp_path / "x.pt")
    assert "not a tensor" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"embed.weight": t.to_sparse()}, "embed.weight is a torch.sparse_coo tensor"),
        (lambda t: {"embed.weight": t.to("meta")}, "embed.weight is a meta tensor"),
        (lambda t: {"embed.weight": t.to(torch.complex64)}, "embed.weight is torch.complex64"),
        (lambda t: {"module.embed.weight": t * 2}, "another tensor are both embed.weight"),
    ],
)
def test_pt_files_with_other_tensors_are_told(
    model: Transformer, tmp_path: Path, change: Any, message: str
) -> None:
    state = model.state_dict()
    state |= change(state["embed.weight"])
    torch.save({"model_state_dict": state, "cfg": to_hf(TINY)}, tmp_path / "x.pt")
    assert message in refused(tmp_path / "x.pt")


def test_pt_files_load_with_weights_only_and_wrapped_names(
    model: Transformer, tmp_path: Path
) -> None:
    path = tmp_path / "out" / "x.pt"
    save_pt(model, path, "sft", 7, {"dev_loss": 1.5})
    content = torch.load(path, weights_only=True)
    assert (content["stage"], content["step"]) == ("sft", 7)
    assert content["metrics"] == {"dev_loss": 1.5}
    state = content["model_state_dict"]
    content["model_state_dict"] = {f"module._orig_mod.{k}": v for k, v in state.items()}
    torch.save(content, path)
    assert all(torch.equal(a, b) for a, b in zip(*states(path, model), strict=True))
    assert [file.name for file in path.parent.iterdir()] == ["x.pt"]


class FakeChat:
    """What saving asks a chat for."""

    stop_ids = (5, 6)

    def __init__(self, vocab_size: int = 60) -> None:
        self.tokenizer = SimpleNamespace(vocab_size=vocab_size, bos_id=1, pad_id=None)

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text("x")


def test_a_run_folder_keeps_its_other_files_and_gets_every_stop_id(
    model: Transformer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    save_model(model, run, FakeChat(), {"base": "b"}, shard_bytes=9000)
    save_model(model, run, FakeChat(), {"base": "b"})
    assert sorted(file.name for file in run.iterdir()) == [
        "additional_chat_templates",
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "whet.json",
    ]
    expected = {"bos_token_id": 1, "eos_token_id": [5, 6], "pad_token_id": None}
    assert json.loads((run / "generation_config.json").read_text()) == expected
    assert json.loads((run / "config.json").read_text())["eos_token_id"] == [5, 6]
    assert json.loads((run / "whet.json").read_text()) == {"base": "b"}
    assert from_hf(read_json(run / "config.json")) == TINY


def test_the_generation_config_of_the_base_is_kept(model: Transformer, tmp_path: Path) -> None:
    save_model(model, tmp_path / "base", FakeChat(), {})
    file = tmp_path / "base" / "generation_config.json"
    base = {"temperature": 0.6, "eos_token_id": 9, "_from_model_config": True}
    file.write_text(json.dumps(base))
    again = load_backbone_from_ckpt(tmp_path / "base")
    save_model(again, tmp_path / "m", FakeChat(), {})
    found = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": [5, 6], "pad_token_id": None}
    assert found == {"temperature": 0.6, **ids}
    lora = LoRA(rank=2)
    apply_lora(again, lora)
    save_adapter(again, tmp_path / "a", lora, str(tmp_path / "base"), FakeChat(), {})
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text()) == found


def test_numbers_beyond_float16_are_named(model: Transformer, tmp_path: Path) -> None:
    with torch.no_grad():
        model.layers[1].mlp.down.weight[0, 0] = -70_000.0
    words = r"down.*weight holds 70,000, beyond float16's largest number, 65,504; save as bfloat16"
    with pytest.raises(UserError, match=words):
        save_model(model, tmp_path / "m", None, {}, torch.float16)
    with pytest.raises(UserError, match=words):
        save_pt(model, tmp_path / "m.pt", "sft", 1, {}, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_model_beside_an_adapter_is_told(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")
    message = refused(directory)
    assert "holds a whole model (model.safetensors) and an adapter" in message
    assert "which one is meant" in message


def test_a_tokenizer_larger_than_the_embedding_is_told(model: Transformer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ids up to 64, the model's embedding has 64 rows"):
        save_model(model, tmp_path / "m", FakeChat(vocab_size=65), {})
    assert not (tmp_path / "m").exists()


def test_what_reads_back_otherwise_takes_no_name(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = safetensors.torch.save_file

    def flip_one(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        tensors = {name: value.clone() for name, value in tensors.items()}
        tensors["model.norm.weight"][3] += 1e-6
        write(tensors, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", flip_one)
    with pytest.raises(RuntimeError, match=r"norm.weight was saved, but read back it differs"):
        save_model(model, tmp_path / "m", None, {})
    assert list(tmp_path.iterdir()) == []


def test_other_arithmetic_after_saving_is_noticed(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = to_hf(TINY)
    monkeypatch.setattr(checkpoint, "to_hf", lambda config: hf | {"rms_norm_eps": 0.01})
    with pytest.raises(RuntimeError, match="logits differ"):
        save_model(model, tmp_path / "m", None, {})


def test_a_full_disk_is_told_and_leaves_the_old_model(
    model: Transformer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", no_space)
        with pytest.raises(UserError, match="no space"):
            save_model(model, directory, None, {})
    usage = shutil.disk_usage(directory)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"needs 0\.04 MB, 0\.00 MB are free"):
            save_pt(model, directory / "x.pt", "sft", 1, {})
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_a_limit_on_file_sizes_is_told_like_a_full_disk(model: Transformer, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # `ulimit -f`
    try:
        for save in (
            lambda: save_model(model, tmp_path / "m", None, {}),
            lambda: save_pt(model, tmp_path / "x.pt", "sft", 1, {}),
        ):
            with pytest.raises(
                UserError, match=r"no space: it needs 0\.04 MB.*\(.*\); nothing was"
            ):
                save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_only_the_old_models_own_files_give_way(model: Transformer, directory: Path) -> None:
    others = ["reward_model_backup.safetensors", "teacher_model.safetensors", "model-1.safetensors"]
    olds = ["model-00001-of-00002.safetensors", "adapter_model.safetensors", "part.safetensors"]
    for name in (*others, *olds):
        (directory / name).write_bytes(b"weights")
    index = directory / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part.safetensors", "b": ["no name"]}}')
    save_model(model, directory, None, {})
    assert {name for name in (*others, *olds, index.name) if (directory / name).exists()} == set(
        others
    )
    assert all(torch.equal(a, b) for a, b in zip(*states(directory, model), strict=True))


def test_a_kill_while_replacing_never_mixes_two_models(
    model: Transformer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every file that is moved: the directory opens as the old or new model, or as none."""
    old = model.state_dict()["head.weight"].clone()
    replace, rename_limit = os.replace, 0

    class Killed(BaseException):
        pass

    def limited(source: Path, target: Path) -> None:
        nonlocal moved
        if moved == rename_limit:
            raise Killed
        moved += 1
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", limited)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    outcomes = []
    for rename_limit in range(4):  # noqa: B007 - `limited` reads it
        moved = 0
        try:
            save_model(model, directory, None, {})
        except Killed:
            outcomes.append("none" if not (directory / "config.json").exists() else "mixed")
        else:
            outcomes.append("new")
            assert not torch.equal(load_backbone_from_ckpt(directory).head.weight, old)
    assert outcomes == ["none", "none", "none", "new"]


# The older layout of this pipeline, written out plainly.


class OldHead(nn.Module):
    def __init__(self, width: int, size: int, context: int) -> None:
        super().__init__()
        self.key = nn.Linear(width, size, bias=False)
        self.query = nn.Linear(width, size, bias=False)
        self.value = nn.Linear(width, size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(context, context)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T = x.shape[1]
        scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(self.key.out_features)
        scores = scores.masked_fill(self.tril[:T, :T] == 0, -torch.inf)
        return scores.softmax(-1) @ self.value(x)


class OldBlock(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.heads = nn.ModuleList(
            OldHead(width, width // heads, context) for _ in range(heads)
        )
        self.attn.proj = nn.Linear(width, width)
        self.mlp = nn.Module()
        self.mlp.hidden, self.mlp.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln1(x)
        x = x + self.attn.proj(torch.cat([head(y) for head in self.attn.heads], dim=-1))
        return x + self.mlp.proj(torch.relu(self.mlp.hidden(self.ln2(x))))


class OldModel(nn.Module):
    def __init__(self, cfg: dict[str, int]) -> None:
        super().__init__()
        width, context = cfg["n_embed"], cfg["context_length"]
        self.token_embed = nn.Embedding(cfg["vocab_size"], width)
        self.position_embed = nn.Embedding(context, width)
        self.attn_blocks = nn.ModuleList(
            OldBlock(width, cfg["n_head"], context) for _ in range(cfg["n_blocks"])
        )
        self.layer_norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, cfg["vocab_size"])
        self.register_buffer("pos_idxs", torch.arange(context))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embed(tokens) + self.position_embed(self.pos_idxs[: tokens.shape[1]])
        for block in self.attn_blocks:
            x = block(x)
        return self.lm_head(self.layer_norm(x))


OLD = {"n_embed": 24, "n_head": 3, "n_blocks": 2, "context_length": 16, "vocab_size": 50}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_older_checkpoints_load_train_and_save(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(3)
    old = OldModel(OLD)
    state = {f"{prefix}{name}": value for name, value in old.state_dict().items()}
    torch.save({"model_state_dict": state, "cfg": OLD, "step": 9}, tmp_path / "old.pt")
    model = load_backbone_from_ckpt(tmp_path / "old.pt")
    tokens = torch.randint(50, (2, 16))
    assert torch.allclose(model(tokens), old(tokens), atol=1e-5)
    model(tokens, targets=tokens, weight=torch.ones(2, 16)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    save_pt(model, tmp_path / "new.pt", "sft", 1, {})
    save_model(model, tmp_path / "dir", None, {})
    for path in (tmp_path / "new.pt", tmp_path / "dir"):
        again = load_backbone_from_ckpt(path)
        assert again.config == model.config
        assert torch.equal(again(tokens), model(tokens))


def test_older_checkpoints_with_gaps_are_told(tmp_path: Path) -> None:
    old = OldModel(OLD)

    def message(cfg: dict[str, Any], **changes: Any) -> str:
        state = {**old.state_dict(), **changes}
        state = {name: value for name, value in state.items() if value is not None}
        torch.save({"model_state_dict": state, "cfg": cfg}, tmp_path / "old.pt")
        return refused(tmp_path / "old.pt")

    assert "n_head = None" in message({k: v for k, v in OLD.items() if k != "n_head"})
    assert "no multiple" in message(OLD | {"n_head": 5})
    assert "positions.weight is [16, 24], by the configuration [20, 24]" in message(
        OLD | {"context_length": 20}
    )
    key = "attn_blocks.1.attn.heads.1.key.weight"
    assert "lacks some of its heads" in message(OLD, **{key: None})
    assert "have the shapes [], [8, 24]; expected the same" in message(
        OLD, **{key: torch.tensor(1.0)}
    )
    assert "have the shapes [8, 24], [8, 25]" in message(OLD, **{key: torch.zeros(8, 25)})
    hidden = "attn_blocks.0.mlp.hidden.weight"
    assert "layers.0.mlp.up.weight is []" in message(OLD, **{hidden: torch.tensor(1.0)})
    assert "n_blocks = True" in message(OLD | {"n_blocks": True})
    assert "missing weights: layers.0.attn.o.bias" in message(
        OLD, **{"attn_blocks.0.attn.proj.bias": None}
    )
    assert "no use for: value_head.weight" in message(
        OLD, **{"value_head.weight": torch.zeros(1, 24)}
    )


MEASURE = """
import sys
from pathlib import Path
from whet.model.open import load_backbone_from_ckpt

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

load_backbone_from_ckpt(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = status("VmRSS")
for path in sys.argv[2:]:
    model = load_backbone_from_ckpt(path)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    del model
print((status("VmHWM") - before) / nbytes)
"""


def test_opening_takes_little_more_memory_than_the_weights(directory: Path, tmp_path: Path) -> None:
    config = llama(16_000, 512, 4, 8, max_positions=64, tied=False)  # 117 MB in float32
    paths = []
    for dtype in (torch.float32, torch.bfloat16):
        big = checkpoint.empty_model(config).to_empty(device="cpu").to(dtype)
        paths.append(tmp_path / str(dtype))
        paths[-1].mkdir()
        checkpoint._write_weights(config, big.state_dict(), paths[-1], None, 5_000_000_000)
        (paths[-1] / "config.json").write_text(json.dumps(to_hf(config)))
    command = [sys.executable, "-c", MEASURE, str(directory), *map(str, paths)]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.3
