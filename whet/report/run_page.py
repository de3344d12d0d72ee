"""One self-contained page of one or several runs: curves, samples, incidents, lineage, settings.

A run is read from its folder as far as it has been written: it may still be training.
"""

import contextlib
import json
import statistics
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from whet.errors import UserError
from whet.files import short_names, write_text
from whet.progress import duration
from whet.report.curves import Line, chart
from whet.report.markup import STYLE, fill, table

SOURCES = "dev_loss/source/"
KNOWN = {"step", "epoch", "tokens", "trained_tokens", "skipped", "seconds", "trained_per_s"}
DRAWN = {"train_loss", "dev_loss", "dev_ppl", "lr", "grad_norm", "tokens_per_s", "memory_gb"}
DRAWN |= {"dev_stop_probability", "dev_stop_inside"}
SAMPLES_SHOWN = 12
"""Evaluations of which samples are shown: the first, the last, and some between."""
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


def write_page(paths: Sequence[Path], out: Path | None = None, refresh: int = 0) -> Path:
    """Write the page of these run folders; returns its path, by default in the first folder.

    With `refresh` the browser loads it again each so many seconds. Raises UserError for a folder
    that holds no run.
    """
    runs = [read_run(Path(path)) for path in paths]
    out = out or Path(paths[0]) / "report.html"
    write_text(out, page(runs, refresh))
    return out


def page(runs: Sequence[Run], refresh: int = 0) -> str:
    """The whole page as text."""
    names = short_names([str(run.path) for run in runs])
    here = Path(__file__)
    return fill(
        here.with_name("run.html"),
        [STYLE, here.with_name("run.css")],
        title=escape(", ".join(names)),
        refresh=f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
        summary=_summary(runs, names),
        plans="".join(_plan(r, name) for r, name in zip(runs, names, strict=True)),
        curves="".join(_curves(runs, names)),
        samples="".join(_samples(r, name) for r, name in zip(runs, names, strict=True)),
        incidents=_incidents(runs, names),
        lineage="".join(_lineage(r, name) for r, name in zip(runs, names, strict=True)),
        settings=_settings(runs, names),
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _summary(runs: Sequence[Run], names: Sequence[str]) -> str:
    head = ("run", "stage", "steps", "time", "train loss", "dev loss", "best dev loss", "state")
    rows = []
    for run, name in zip(runs, names, strict=True):
        seconds = [value for _, value in run.points("seconds")]
        dev = [value for _, value in run.points("dev_loss")]
        loss = [value for _, value in run.points("train_loss")]
        cells = [
            run.about.get("command", "?"),
            f"{run.step:,}" + (f" of {run.total:,}" if run.total else ""),
            duration(sum(seconds)),
            f"{loss[-1]:.4f}" if loss else "–",
            f"{dev[-1]:.4f}" if dev else "–",
            f"{min(dev):.4f}" if dev else "–",
            "finished" if run.finished else _unfinished(run, seconds),
        ]
        rows.append([name, *cells])
    return table("Runs", head, rows)


def _unfinished(run: Run, seconds: Sequence[float]) -> str:
    if not run.total or not seconds:
        return "not finished"
    left = (run.total - run.step) * statistics.median(seconds)
    return f"not finished, {duration(left)} of steps left"


def _plan(run: Run, name: str) -> str:
    """What `whet plan` or --auto measured before a run, and what the run has taken so far."""
    plan, seconds = run.about.get("plan"), [value for _, value in run.points("seconds")]
    if not isinstance(plan, dict) or not seconds:
        return ""
    typical, count = statistics.median(seconds), run.total or len(seconds)
    rates = [rate for _, rate in run.points("tokens_per_s")]
    tokens = sum(rate * taken for rate, taken in zip(rates, seconds, strict=False))
    whole = sum(seconds) + (count - len(seconds)) * typical
    peak = max((value for _, value in run.points("memory_gb")), default=0.0)
    step = plan["seconds_per_step"]
    rows = [
        [what, shown(planned), shown(found), f"{100 * (found / planned - 1):+.0f} %"]
        for what, planned, found, shown in (
            ("peak memory", plan["memory_gb"], peak, "{:.2f} GB".format),
            ("a step", step, typical, "{:.3g} s".format),
            ("tokens/s", plan["tokens_per_s"], tokens / sum(seconds), "{:,.0f}".format),
            (f"{count:,} steps", count * step, whole, duration),
        )
    ]
    title = f"The plan against what happened: {name}"
    return table(title, ("number", "plan", "run", "off"), rows, kind="number")


def _curves(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """The figures, those that most people look at first."""
    several = len(runs) > 1

    def lines(keys: dict[str, str], **rest: Any) -> list[Line]:
        """A curve for each run and key; of one run each key has its own colour."""
        return [
            Line(
                f"{name} {word}".strip() if several else word or name,
                run.points(key),
                colour=i if several else j,
                dashed=several and j > 0,
                noisy=key in ("train_loss", "grad_norm", "tokens_per_s"),
            )
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
            for j, (key, word) in enumerate(keys.items())
        ]

    found = list(dict.fromkeys(key for run in runs for key in run.numbers()))
    sources = {key: key.removeprefix(SOURCES) for key in found if key.startswith(SOURCES)}
    other = [k for k in found if k not in KNOWN | DRAWN and not k.startswith("dev_loss/")]
    stop = {"dev_stop_probability": "at the end of replies", "dev_stop_inside": "before it"}
    return [
        chart(
            "Loss",
            lines({"train_loss": "train", "dev_loss": "dev"}),
            "nats a trained token, by step",
        ),
        chart("Dev loss by source", lines(sources), "nats a trained token")
        if len(sources) > 1
        else "",
        chart("Stop token", lines(stop), "probability, over the dev file"),
        chart("Learning rate", lines({"lr": ""})),
        chart("Gradient norm", lines({"grad_norm": ""}), "before clipping", log=True),
        chart("Speed", lines({"tokens_per_s": ""}), "tokens a second, all ranks"),
        chart("Memory", lines({"memory_gb": ""}), "peak of the first rank, GB"),
        *(chart(key, lines({key: ""})) for key in other),
    ]


def _samples(run: Run, name: str) -> str:
    """Replies to the same prompts, as they change."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        prompts.setdefault(str(sample.get("prompt", "")), []).append(sample)
    parts: list[str] = []
    for prompt, found in prompts.items():
        last = len(found) - 1
        chosen = {i * last // max(SAMPLES_SHOWN - 1, 1) for i in range(SAMPLES_SHOWN)}
        rows = "".join(
            f'<tr><th scope="row">{found[i]["step"]:,}</th>'
            f'<td class="words">{escape(str(found[i].get("reply", "")))}</td></tr>'
            for i in sorted(chosen)
        )
        expected = escape(str(found[-1].get("expected", "")))
        parts.append(
            f"<details{'' if parts else ' open'}>"
            f"<summary>{escape(prompt[-120:].strip())}</summary>"
            f'<p class="flow note">{escape(prompt)}</p><table><thead><tr><th scope="col">step</th>'
            f'<th scope="col" class="words">reply</th></tr></thead><tbody>{rows}'
            f'<tr class="total"><th scope="row">data</th><td class="words">{expected}</td></tr>'
            "</tbody></table></details>"
        )
    title = f"Samples over time: {escape(name)}"
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if parts else ""


def _incidents(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = [
        [name, f"{i.get('step', '?')}", str(i.get("reason", "")), str(i.get("replay", ""))]
        for run, name in zip(runs, names, strict=True)
        for i in run.incidents
    ]
    return table("Steps that were not applied", ("run", "step", "reason", "look at it"), rows)


def _lineage(run: Run, name: str) -> str:
    """From the model back to its base, and the data of each."""
    rows = []
    for known in run.ancestors:
        data = known.get("data", "")
        data = ", ".join(data) if isinstance(data, list) else str(data)
        base = str(known.get("base") or "")
        rows.append([known["path"], str(known.get("stage", "?")), data, base])
    return table(f"What trained on what: {name}", ("model", "stage", "data", "started from"), rows)


def _settings(runs: Sequence[Run], names: Sequence[str]) -> str:
    """One run's settings; of several those that differ."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [[key, *(str(run.settings.get(key, "–")) for run in runs)] for key in keys]
    if len(runs) > 1:
        rows = [row for row in rows if len(set(row[1:])) > 1]
    title = "Settings" if len(runs) == 1 else "Settings that differ"
    return table(title, ("flag", *names), rows)
