"""A result file becomes rows of the table; made-up data count what they should."""

import json

import numpy as np
import pytest

from benchmarks import gpu, run, table
from benchmarks.lines import origin, spread
from whet.data.store import PackedStore
from whet.model.config import llama


def test_every_benchmark_of_make_bench_has_a_row():
    assert set(run.commands()) == set(table.CELLS)
    for words in run.commands().values():
        assert (run.REPOSITORY / "benchmarks" / f"{words[0]}.py").exists()


def test_a_training_result_becomes_rows():
    ours = {
        "benchmark": "train",
        "side": "whet",
        "precision": "float32",
        "peak_gb": 1.7,
        **spread("tokens_per_s", [900]),
    }
    peer = {
        "side": "trl",
        "peak_gb": 6.8,
        "whet_needs_share_of_memory": 0.25,
        "whet_is_times_faster_by_cpu": 4.5,
        **spread("whet_is_times_faster", [4.0, 4.25, 5.0], 2),
    }
    found = {**origin(), "load_before": 0.1, "rows": [{"name": "train", "command": "run it"}]}
    found["rows"][0]["lines"] = [ours, peer]
    text = table.rows(found)
    assert "| trl | 4 × | 4.25 × (4.0 to 5.0) at 900 tokens/s; by processor time 4.5 × |" in text
    assert "| peak memory of that step | trl | a third | 0.25 (TRL 6.8 GB) | `run it` |" in text


def test_a_benchmark_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "commands", lambda: {"head": ["nothing"], "help": ["nothing"]})
    lines = {"head": None, "help": {"name": "help", "lines": []}}
    monkeypatch.setattr(run, "run", lambda name, words: lines[name])
    monkeypatch.setattr("sys.argv", ["run", "--out", str(tmp_path / "out.json")])
    assert run.main() == 1
    assert [row["name"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == [
        "help"
    ]
    assert "not measured: head" in capsys.readouterr().err


def test_model_flops_by_hand():
    """One layer of width 4 with 1 head, MLP 8, vocabulary 10; a document of 6 tokens, 2 trained."""
    config = llama(10, 4, 1, 1, mlp_width=8)
    found = gpu.flops_of(config, np.array([6]), np.array([2]), rows=1)
    parameters = 4 * 4 * 4 + 3 * 4 * 8
    attention = 3 * 2 * 6 * 6 * 4  # forward and twice that backward, of half of 4 x 6 x 6 x 4
    assert found["mfu"] == 6 * parameters * 6 + attention + 6 * 10 * 4 * 2
    assert found["mfu_all_tokens"] == found["mfu"] + 6 * 10 * 4 * 4


def test_made_up_rows_are_a_packed_file_of_full_rows(tmp_path):
    size = gpu.sizes(tiny=True)[0]
    gpu.build(size, tmp_path)
    store = PackedStore(tmp_path / "packed.h5")
    rows = store.rows(np.arange(len(store)))
    assert len(store) == size.rows * size.steps
    assert (rows.segment_ids > 0).all()
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").open()]
    assert sum(len(e["input_ids"]) for e in examples) == rows.tokens.size
    assert sum(sum(e["assistant_masks"]) for e in examples) == (rows.loss_mask != 0).sum()


@pytest.mark.slow
def test_the_script_for_gpus_runs_on_a_cpu_at_toy_sizes(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(
        "sys.argv", ["gpu", "--device", "cpu", "--tiny", "--minutes", "60", "--out", str(out)]
    )
    gpu.main()
    lines = json.loads(out.read_text())["lines"]
    found = [(line["benchmark"], line.get("side")) for line in lines]
    assert found == [
        ("matrix rate", None),
        ("train", "whet"),
        ("train", "trl + liger"),
        ("head", "whet"),
        ("head", "full"),
        ("generate", "cache"),
        ("generate", "no cache"),
    ]
    assert lines[2]["not_measured"] == "needs a CUDA device"
    assert all("not_measured" not in line for line in lines[:2] + lines[3:])
