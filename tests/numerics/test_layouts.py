"""Promises 1, 6 and 7: the same global batch gives the same numbers in every layout.

Each run is the real command on real processes; what is compared is the loss and gradient norm of
every step, the dev loss, and the weights after the last step. In float32 they are equal up to the
rounding of sums in another order; in bf16 each product is rounded to 8 bits, and what counts is
that the run goes the same way.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.processes import run_ranks
from whet.cli import main
from whet.data.store import DOCUMENT, PackedStore, new_store

STEPS = 6


@dataclass(frozen=True)
class Bounds:
    """How far two layouts may lie apart after STEPS steps of AdamW at a learning rate of 1e-3."""

    losses: float
    """Relative, as those of the dev data and all other numbers of `metrics.jsonl`."""
    norms: float
    """Of the gradient norms, relative."""
    weights: float
    """Distance of all weights, as a part of the way that they moved."""


BOUNDS = {"float32": Bounds(2e-6, 2e-6, 2e-5), "bf16": Bounds(4e-3, 2e-2, 1e-1)}
WEIGHT_ATOL = 2e-6  # of any weight in float32; they move by about 5e-3
Numbers = tuple[list[dict], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    tiny.model_directory(folder / "base")
    # 7 rows in batches of 4: the second batch of an epoch has 3 rows, less than 2 for each of 3
    # ranks. Rows 1 and 4 have nothing trained, so some ranks have nothing trained in some steps.
    tiny.packed_file(folder / "train.h5", n_rows=7, weighted=True, empty_rows=(1, 4))
    tiny.packed_file(folder / "dev.h5", n_rows=5, seed=1, weighted=True)
    return folder


def command(world: Path, out: Path, **flags) -> list[str]:
    values = {
        "model": world / "base",
        "data": world / "train.h5",
        "dev": world / "dev.h5",
        "out": out,
        "lr": 1e-3,
        "warmup": 0,
        "epochs": 10,
        "max_steps": STEPS,
        "batch_size": 4,
        "weight_decay": 0.1,
        "clip": 0.5,  # below the norms that occur, so that clipping is compared, too
        "eval_every": 3,
        "samples": 0,
        "save_every": 0,
    } | flags
    words = ["sft", "--quiet"]
    for key, value in values.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def numbers(out: Path) -> Numbers:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_file(out / "model.safetensors")


@pytest.fixture(scope="module", params=BOUNDS)
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(world, precision) -> Numbers:
    out = world / f"reference_{precision}"
    assert main(command(world, out, micro_batch_size=4, precision=precision)) == 0
    return numbers(out)


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Euclidean distance of two models."""
    assert one.keys() == other.keys()
    return float(np.sqrt(sum(np.square(one[name] - value).sum() for name, value in other.items())))


def assert_same(world: Path, out: Path, reference: Numbers, precision: str) -> None:
    (metrics, weights), (expected_metrics, expected_weights) = numbers(out), reference
    bounds, before = BOUNDS[precision], load_file(world / "base" / "model.safetensors")
    assert len(metrics) == len(expected_metrics)
    worst = {"losses": 0.0, "norms": 0.0}
    for line, expected in zip(metrics, expected_metrics, strict=True):
        assert line.keys() == expected.keys()
        for key in expected:
            kind = "norms" if key == "grad_norm" else "losses"
            apart = abs(line[key] - expected[key]) / max(abs(expected[key]), 1e-12)
            worst[kind] = max(worst[kind], apart)
            assert apart <= getattr(bounds, kind), (key, line["step"], line[key], expected[key])
    apart = distance(weights, expected_weights) / distance(before, expected_weights)
    found = ", ".join(f"{kind} differ by {value:.1e}" for kind, value in worst.items())
    print(f"\n{out.name}, {precision}: {found}, weights by {apart:.1e}")
    assert apart <= bounds.weights
    if precision == "float32":
        for name, value in expected_weights.items():
            np.testing.assert_allclose(weights[name], value, atol=WEIGHT_ATOL, rtol=0, err_msg=name)


def test_reference_moves(world, reference):
    """The comparison would notice a change: the weights move by far more than the tolerance."""
    before = load_file(world / "base" / "model.safetensors")
    moved = max(np.abs(before[name] - after).max() for name, after in reference[1].items())
    assert moved > 1000 * WEIGHT_ATOL
    norms = [line["grad_norm"] for line in reference[0] if "grad_norm" in line]
    assert min(norms) > 0.5, "clipping must take part in the comparison"


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches(world, reference, tmp_path, micro, precision):
    words = command(world, tmp_path / "out", micro_batch_size=micro, precision=precision)
    assert main(words) == 0
    assert_same(world, tmp_path / "out", reference, precision)


@pytest.mark.parametrize(
    ("size", "precision"), [(2, "float32"), (3, "float32"), (3, "bf16")], scope="module"
)
def test_distributed(world, reference, tmp_path, size, precision):
    layouts = {
        "ddp_1": {"micro_batch_size": 1},
        "ddp_4": {"micro_batch_size": 4},
        "fsdp_1": {"micro_batch_size": 1, "shard": True},
        "fsdp_2": {"micro_batch_size": 2, "shard": True},
    }
    if precision == "bf16":
        layouts = {"ddp_1": layouts["ddp_1"], "fsdp_2": layouts["fsdp_2"]}
    commands = [
        command(world, tmp_path / name, precision=precision, **flags)
        for name, flags in layouts.items()
    ]
    assert run_ranks(commands, size=size, folder=tmp_path) == [0] * size
    for name in layouts:
        assert_same(world, tmp_path / name, reference, precision)


@pytest.mark.parametrize(
    ("flags", "atol"),
    [
        pytest.param(
            {"lora_rank": 2, "lora_dora": True, "precision": "float32"}, WEIGHT_ATOL, id="lora"
        ),
        pytest.param({"lora_rank": 2, "precision": "bf16"}, 2e-3, id="lora-bf16"),
        # Muon's iteration runs in bf16; its steps are up to 1e-3 x 0.8.
        pytest.param({"optimizer": "muon"}, 2e-4, id="muon", marks=pytest.mark.slow),
    ],
)
def test_sharded_adapters_and_muon(world, tmp_path, flags, atol):
    layouts = {"ddp": {}, "fsdp": {"shard": True}}
    commands = [command(world, tmp_path / name, **flags, **more) for name, more in layouts.items()]
    assert run_ranks(commands, size=2, folder=tmp_path) == [0, 0]
    assert main(command(world, tmp_path / "one", **flags)) == 0
    expected = load_file(next((tmp_path / "one").glob("*model.safetensors")))
    for name in layouts:
        found = load_file(next((tmp_path / name).glob("*model.safetensors")))
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, atol=atol, rtol=0, err_msg=key)


def unpack(packed: Path, path: Path) -> int:
    """Write the documents of `packed` one to a row; returns their number."""
    store = PackedStore(packed)
    read, n = store.rows(range(len(store))), len(store.documents)
    arrays = [np.zeros((n, store.context_length), dtype) for dtype in (int, np.float32, int)]
    table = store.documents.copy()
    for i, document in enumerate(store.documents):
        here = slice(document["start"], document["start"] + document["length"])
        for array, values in zip(arrays, (read.tokens, read.loss_mask), strict=False):
            array[i, : document["length"]] = values[document["row"], here]
        arrays[2][i, : document["length"]] = 1
        table[i]["row"], table[i]["start"] = i, 0
    with new_store(path, n, store.context_length, weighted=True, attrs=store.attrs) as writer:
        writer.write_rows(*arrays)
        writer.write_documents(table.astype(DOCUMENT))
    return n


def test_packed_equals_unpacked(world, tmp_path, precision):
    """All documents in one global batch, packed and one a row; the weights after three steps."""
    n = unpack(world / "train.h5", tmp_path / "rows.h5")
    flags = {"max_steps": 3, "epochs": 3, "micro_batch_size": 3, "precision": precision}
    assert main(command(world, tmp_path / "packed", batch_size=7, **flags)) == 0
    words = command(world, tmp_path / "rows", batch_size=n, data=tmp_path / "rows.h5", **flags)
    assert main(words) == 0
    assert_same(world, tmp_path / "rows", numbers(tmp_path / "packed"), precision)


def test_a_step_without_trained_tokens_changes_nothing(world, tmp_path, precision):
    """Batches of one row: the steps of rows 1 and 4 have nothing to train, and no NaN follows."""
    flags = {"batch_size": 1, "max_steps": 7, "eval_every": 0, "schedule": "constant"}
    flags |= {"precision": precision}
    assert main(command(world, tmp_path / "out", **flags)) == 0
    metrics, weights = numbers(tmp_path / "out")
    steps = [line for line in metrics if "train_loss" in line]
    assert sorted(line["trained_tokens"] for line in steps)[:2] == [0, 0]
    assert all(line["train_loss"] == 0 for line in steps if line["trained_tokens"] == 0)
    assert all(np.isfinite(value).all() for value in weights.values())
    last = max(line["step"] for line in steps if line["trained_tokens"] == 0)
    assert last > 1, "momentum exists by then, and would move the weights"
    around = {}
    for end in (last - 1, last):
        out = tmp_path / f"to_{end}"
        assert main(command(world, out, **flags | {"max_steps": end})) == 0
        around[end] = numbers(out)[1]
    for name, value in around[last].items():
        np.testing.assert_array_equal(value, around[last - 1][name])


@pytest.mark.slow
def test_parts_that_no_text_reaches_on_two_ranks(tmp_path):
    """Gemma 3's tower for images gets no gradient, trained whole or with adapters."""
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    image = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    image |= {"intermediate_size": 32, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={**text, "max_position_embeddings": 64},
        vision_config=image,
        mm_tokens_per_image=1,
        image_token_index=299,
        boi_token_index=298,
        eoi_token_index=297,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    tiny.chat().save(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8)
    tiny.packed_file(tmp_path / "dev.h5", n_rows=3, seed=1)
    kinds = {"whole": {}, "adapter": {"lora_rank": 2}}
    flags = {"max_steps": 2, "precision": "float32", "device": "cpu"}
    commands = []
    for name, more in kinds.items():
        assert main(command(tmp_path, tmp_path / name, **flags, **more)) == 0
        commands.append(command(tmp_path, tmp_path / f"{name}_2", **flags, **more))
    assert run_ranks(commands, size=2, folder=tmp_path, timeout_s=400) == [0, 0]
    for name in kinds:
        (file,) = (tmp_path / name).glob("*model.safetensors")
        two = load_file(tmp_path / f"{name}_2" / file.name)
        for key, value in load_file(file).items():
            np.testing.assert_allclose(two[key], value, atol=1e-6, err_msg=key)
