"""--profile: a trace that opens, a table of what took the most time, and the same run."""

import gzip
import json

from tests import tiny
from tests.numerics.test_layouts import command
from whet.cli import main


def test_trace_and_table(tmp_path, capsys):
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8)
    tiny.packed_file(tmp_path / "dev.h5", n_rows=3, seed=1)
    out = tmp_path / "out"
    assert main(command(tmp_path, out, profile=True)) == 0
    told = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(told) if line.endswith("operation"))
    rows = told[begin + 1 : begin + 11]
    shares = [float(row.split()[0]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5
    path = out / "profile" / "trace.json.gz"
    assert str(path) in told[begin + 11]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"forward", "backward", "optimizer", "aten::mm"} <= names
    steps = {name for name in names if str(name).startswith("ProfilerStep")}
    assert len(steps) == 3
    assert main(command(tmp_path, tmp_path / "plain")) == 0
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name


def test_too_few_steps(tmp_path, capsys):
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8)
    words = command(
        tmp_path, tmp_path / "out", profile=True, max_steps=5, dev=tmp_path / "train.h5"
    )
    assert main(words) == 2
    assert "--profile: needs 6 steps, this run has 5" in capsys.readouterr().err
