"""What a plan leaves for the run that follows it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from whet.train.measure import Cost
from whet.train.proposal import Plan, record
from whet.train.run import planned


def measured(rows: int, recompute: str) -> Cost:
    sizes = {
        "peak": 9,
        "stepped": 9,
        "process": 1,
        "weights": 1,
        "gradients": 1,
        "optimizer": 1,
        "head": 1,
    }
    times = {"micro_seconds": 0.5, "update_seconds": 1.0, "micro_flops": 1.0, "tokens": 8.0}
    counts = {"parameters": 2, "trained": 2, "steps": 3, "micros": 4}
    return Cost(rows=rows, recompute=recompute, **sizes, **times, **counts)


def config(out: Path, **more: Any) -> Any:
    values = {"out": out, "model": "m", "data": Path("d.h5"), "batch_size": 16, "shard": False}
    values |= {"micro_batch_size": 4, "recompute": "none", "save_async": False, "lr": 1.0}
    return SimpleNamespace(**(values | more))


def test_a_run_finds_the_cost_of_its_own_settings(tmp_path) -> None:
    out = tmp_path / "run"
    record(Plan(measured(4, "none"), measured(2, "full"), 1e9), config(out), 1)
    assert planned(config(out, lr=2.0), 1)["seconds_per_step"] == 3.0
    proposed = planned(config(out, micro_batch_size=2, recompute="full"), 1)
    assert (proposed["micro_batch_size"], proposed["recompute"]) == (2, "full")
    others = {"model": "n", "micro_batch_size": 1, "batch_size": 8, "shard": True}
    for other in [{name: value} for name, value in (others | {"max_new_tokens": 9}).items()]:
        assert planned(config(out, **other), 1) is None, other
    assert planned(config(out), 2) is None
    assert planned(config(tmp_path / "none"), 1) is None


def test_a_plan_leaves_runs_and_unwritable_folders_alone(tmp_path, capsys) -> None:
    plan = Plan(measured(4, "none"), None, 1e9)
    (tmp_path / "config.toml").write_text("")
    record(plan, config(tmp_path), 1)
    assert not (tmp_path / "plan.json").exists()
    record(plan, config(tmp_path / "config.toml" / "below"), 1)
    assert "the report will lack the plan" in capsys.readouterr().err
