"""What a run has written so far, read from its folder; it may still be training."""

import contextlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.errors import UserError

GENERATIONS = 8
"""Of a model's ancestors, at most so many are followed."""


@dataclass(frozen=True)
class Run:
    """The records of one run folder; what is missing or half-written is left out."""

    path: Path
    about: dict[str, Any]
    """run.json: the command and the versions."""
    settings: dict[str, Any]
    """config.toml."""
    steps: list[dict[str, Any]]
    """metrics.jsonl: the lines of steps."""
    evaluations: list[dict[str, Any]]
    """metrics.jsonl: the lines of evaluations."""
    timing: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    incidents: list[dict[str, Any]]
    ancestors: list[dict[str, Any]]
    """whet.json of the model, of its base, of that one's base …"""
    total: int | None
    """Steps of the whole run, where it has said so."""

    @property
    def step(self) -> int:
        """The last step that was taken."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def finished(self) -> bool:
        """Whether the final model has been written."""
        return bool(self.ancestors and self.ancestors[0].get("metrics"))

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a number, wherever it is logged."""
        records = [*self.steps, *self.evaluations, *self.timing]
        return [(r["step"], float(r[key])) for r in records if key in r and _is_number(r[key])]

    def numbers(self) -> list[str]:
        """The names of all numbers, in the order in which they first appear."""
        records = [*self.steps[:3], *self.steps[-3:], *self.evaluations, *self.timing[:3]]
        return list(dict.fromkeys(key for r in records for key, v in r.items() if _is_number(v)))


def read_run(path: Path) -> Run:
    """Read a run folder. Raises UserError for a folder that holds no run."""
    if not (path / "config.toml").is_file() and not (path / "metrics.jsonl").is_file():
        raise UserError(f"{path}: is not the folder of a run (no config.toml, no metrics.jsonl)")
    metrics = _lines(path / "metrics.jsonl")
    return Run(
        path=path,
        about=_json(path / "run.json"),
        settings=_toml(path / "config.toml"),
        steps=[r for r in metrics if "train_loss" in r],
        evaluations=[r for r in metrics if "train_loss" not in r],
        timing=_lines(path / "timing.jsonl"),
        samples=_lines(path / "samples.jsonl"),
        incidents=[_json(file) for file in sorted(path.glob("incidents/step_*.json"))],
        ancestors=_ancestors(path),
        total=_json(path / "run.json").get("total_steps"),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole records of a file; the last one may be half-written."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and _is_number(record.get("step")):
                    found.append(record)
    return found


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _toml(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return tomllib.loads(path.read_text(encoding="utf-8"))
    return {}


def _ancestors(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while (known := _json(path / "whet.json")) and len(found) < GENERATIONS:
        found.append({**known, "path": str(path)})
        base = known.get("base")
        if not base or not Path(base).is_dir():
            break
        path = Path(base)
    return found


def _is_number(value: Any) -> bool:
    """NaN and infinities are logged as texts, and are no points of a curve."""
    return isinstance(value, int | float) and not isinstance(value, bool)
