"""The readers of models: damaged weights, headers, indexes, `.pt` files and configurations."""

import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from tests import tiny
from tests.fuzz.harness import SCALARS, counts, damaged, fuzz, json_like
from whet.errors import UserError
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.hf.checkpoint import save_model, save_pt
from whet.model.open import load_backbone_from_ckpt

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
KEYS = ["rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "type"]
KEYS += ["model_type", "head_dim", "factor", "short_factor", "rope_type", "hidden_act", "windows"]
KEYS += ["original_max_position_embeddings", "quantization_config", "max_window_layers", "ropes"]

SIZES = ["num_hidden_layers", "hidden_size", "vocab_size", "head_dim", "num_attention_heads"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny.model_directory(tmp_path_factory.mktemp("model") / "whole", layers=1)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    return tmp_path


def open_model(path: Path) -> None:
    model = load_backbone_from_ckpt(path, quiet=True)
    assert all(p.device.type == "cpu" for p in model.parameters())


@counts(80, 10_000)
def test_damaged_weights(count, copy):
    good = (copy / WEIGHTS).read_bytes()

    def read(content: bytes) -> None:
        (copy / WEIGHTS).write_bytes(content)
        open_model(copy)

    tally = fuzz("safetensors", damaged(good), read, count)
    assert min(tally["read"], tally["refused"]) > 0


@counts(80, 10_000)
def test_wrong_headers(count, copy):
    """The values stay; what the header says of them is replaced here and there."""
    good = (copy / WEIGHTS).read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, values = json.loads(good[8 : 8 + length]), good[8 + length :]
    names = st.sampled_from([*header, "other"])
    fields = st.sampled_from(["dtype", "shape", "data_offsets", "other"])
    value = st.one_of(
        SCALARS,
        st.sampled_from(["F64", "BOOL", "F8_E5M2", "X"]),
        st.lists(st.one_of(st.integers(-(2**70), 2**70), st.integers(0, 9)), max_size=3),
    )
    changes = st.lists(st.tuples(names, fields, value), max_size=2)

    def read(some: list) -> None:
        changed = {k: dict(v) for k, v in header.items()}
        for name, field, value in some:
            changed.setdefault(name, {})[field] = value
        raw = json.dumps(changed).encode()
        (copy / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + values)
        open_model(copy)

    tally = fuzz("safetensors headers", changes, read, count)
    assert min(tally["read"], tally["refused"]) > 0


@counts(120, 20_000)
def test_wrong_configurations(count, copy):
    good = json.loads((copy / CONFIG).read_text())
    keys = st.sampled_from([*good, *KEYS])
    types = st.sampled_from(["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"])
    value = st.one_of(SCALARS, types, json_like(KEYS))
    changes = st.lists(st.tuples(keys, value), max_size=3)

    def read(some: list) -> None:
        (copy / CONFIG).write_text(json.dumps({**good, **dict(some)}))
        open_model(copy)

    tally = fuzz("config.json", changes, read, count)
    assert min(tally["read"], tally["refused"]) > count // 20


@counts(60, 10_000)
def test_damaged_configurations(count, copy):
    good = (copy / CONFIG).read_bytes()

    def read(content: bytes) -> None:
        (copy / CONFIG).write_bytes(content)
        open_model(copy)

    fuzz("damaged config.json", damaged(good), read, count)


@counts(60, 10_000)
def test_damaged_pt_files(count, whole, tmp_path):
    path = tmp_path / "model.pt"
    save_pt(load_backbone_from_ckpt(whole, quiet=True), path, "sft", 1, {})
    good = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        open_model(path)

    tally = fuzz(".pt", damaged(good), read, count)
    assert min(tally["read"], tally["refused"]) > 0


@counts(50, 5_000)
def test_wrong_pt_contents(count, whole, tmp_path):
    path = tmp_path / "model.pt"
    save_pt(load_backbone_from_ckpt(whole, quiet=True), path, "sft", 1, {})
    good = torch.load(path, weights_only=True)
    top = st.sampled_from([*good, "config"])
    tensors = st.sampled_from([torch.zeros(0), torch.zeros(3, 3), torch.zeros((), dtype=torch.int)])
    value = st.one_of(SCALARS, tensors, json_like(KEYS), st.dictionaries(SCALARS, tensors))
    name = st.sampled_from([*good["model_state_dict"], "transformer.wte.weight", "x"])
    changes = st.tuples(
        st.dictionaries(top, value, max_size=1), st.dictionaries(name, value, max_size=1)
    )

    def read(some: tuple) -> None:
        content = {**good, **some[0]}
        if isinstance(content["model_state_dict"], dict):
            content["model_state_dict"] = {**content["model_state_dict"], **some[1]}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path.write_bytes(buffer.getvalue())
        open_model(path)

    fuzz(".pt contents", changes, read, count)


@counts(50, 5_000)
def test_wrong_indexes(count, tmp_path):
    config = llama(64, 16, 1, 2, max_positions=32)
    model = Transformer(config)
    init_weights(model, 0)
    save_model(model, tmp_path / "m", None, {}, shard_bytes=2000)
    path = tmp_path / "m" / INDEX
    good = json.loads(path.read_text())["weight_map"]
    name = st.sampled_from([*good, "other"])
    file = st.one_of(
        st.sampled_from(sorted(set(good.values()))),
        st.sampled_from(["../x", "/etc/passwd", "..", ".", "a/b", "..\\x", "\0", "m" * 300, ""]),
        SCALARS,
    )

    def read(some: dict) -> None:
        path.write_text(json.dumps({"weight_map": {**good, **some}}))
        open_model(tmp_path / "m")

    tally = fuzz("index", st.dictionaries(name, file, max_size=2), read, count)
    assert min(tally["read"], tally["refused"]) > 0


@pytest.mark.parametrize(
    "outside", ["../stolen.safetensors", "/tmp/stolen.safetensors", "a/b", ".."]
)
def test_an_index_cannot_point_out_of_its_directory(outside, tmp_path, whole):
    """Even to a file that is there and is what it should be."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "stolen.safetensors").write_bytes((whole / WEIGHTS).read_bytes())
    (folder / CONFIG).write_bytes((whole / CONFIG).read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": outside}}))
    with pytest.raises(UserError, match="outside of its own directory"):
        load_backbone_from_ckpt(folder, quiet=True)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("size", [10**5, 10**9, 10**18, 10**30])
def test_a_size_without_reason_is_refused_at_once(copy, key, size):
    """Neither memory nor an hour goes into layers of which the weights know nothing."""
    config = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps({**config, key: size}))
    with pytest.raises(UserError):
        load_backbone_from_ckpt(copy, quiet=True)


def test_a_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model_state_dict": {}, "cfg": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="refused: it holds code"):
        load_backbone_from_ckpt(tmp_path / "bomb.pt", quiet=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("error", [IndexError, AssertionError, TypeError])
def test_whatever_torch_fails_with(error, tmp_path, monkeypatch):
    """Found by the long run: an IndexError within torch's own unpickler."""

    def load(*_, **__):
        raise error("of torch's own")

    monkeypatch.setattr(torch, "load", load)
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match=f"truncated or damaged: {error.__name__}: of torch's own"):
        open_model(path)
