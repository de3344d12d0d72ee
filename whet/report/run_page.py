"""One self-contained page of one or several runs: curves, samples, incidents, lineage, settings.

A run is read from its folder as far as it has been written: it may still be training.
"""

import contextlib
import json
import math
import statistics
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whet.errors import UserError
from whet.files import read_json, short_names, write_text
from whet.progress import duration
from whet.report.markup import STYLE, fill

SOURCES = "dev_loss/source/"
KNOWN = {"step", "epoch", "tokens", "trained_tokens", "skipped", "seconds", "trained_per_s"}
DRAWN = {"train_loss", "dev_loss", "dev_ppl", "lr", "grad_norm", "tokens_per_s", "memory_gb"}
DRAWN |= {"dev_stop_probability", "dev_stop_inside"}
LOSS_UNITS = dict.fromkeys(("reward", "dpo"), "a pair or reply, by step")
LOSS_UNITS |= dict.fromkeys(("grpo", "ppo"), "the policy's; its level means nothing")
JUDGING = ("reward", "accuracy", "margin")
"""Measures by which a stage after SFT is judged: their figures come first."""
SAMPLES_SHOWN = 12
"""Evaluations of which samples are shown: the first, the last, and some between."""
GENERATIONS = 8
"""Of a model's ancestors, at most so many are followed."""
WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 8, 22
MOST_POINTS = 400
SMOOTHED_FROM = 60
"""Points from which a noisy curve is drawn faint, below its running mean."""
MOST_MARKS = 40
"""Points, of a curve that is not noisy, up to which each has a mark with its value."""


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

    @property
    def is_planned(self) -> bool:
        """Whether there is something to compare: a plan, and steps that took their time."""
        return isinstance(self.about.get("plan"), dict) and bool(self.values("seconds"))

    @property
    def judge(self) -> str:
        """What it is judged by on the dev data: the summary's measure."""
        return "dev reward" if self.values("dev_reward") else "dev loss"

    def values(self, key: str) -> list[float]:
        """The values of a number, in order."""
        return [value for _, value in self.points(key)]

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
    with contextlib.suppress(UserError):
        return read_json(path)
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
    named, here = list(zip(names, runs, strict=True)), Path(__file__)
    return fill(
        here.with_name("run.html"),
        [STYLE, here.with_name("run.css")],
        names=names,
        refresh=refresh,
        summary=[(name, *_summary(run)) for name, run in named],
        judge=" or ".join(sorted({run.judge for run in runs})),
        plans=[(name, _plan(run, run.about["plan"])) for name, run in named if run.is_planned],
        figures=_figures(named),
        samples=[(name, _samples(run)) for name, run in named if run.samples],
        incidents=[
            (name, *(found.get(key, "") for key in ("step", "reason", "replay")))
            for name, run in named
            for found in run.incidents
        ],
        lineage=[(name, [_origin(known) for known in run.ancestors]) for name, run in named],
        settings=_settings(runs),
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _summary(run: Run) -> list[str]:
    """Command, steps, time, losses and state of a run."""
    seconds, loss = run.values("seconds"), run.values("train_loss")
    dev = run.values(run.judge.replace(" ", "_"))
    best = sorted(dev, reverse=run.judge == "dev reward")[:1]
    state = "finished" if run.finished else "not finished"
    if run.total and seconds and not run.finished:
        left = (run.total - run.step) * statistics.median(seconds)
        state += f", {duration(left)} of steps left"
    losses = [loss[-1:], dev[-1:], best]
    return [
        run.about.get("command", "?"),
        f"{run.step:,}" + (f" of {run.total:,}" if run.total else ""),
        duration(sum(seconds)),
        *(f"{found[0]:.4f}" if found else "–" for found in losses),
        state,
    ]


def _plan(run: Run, plan: dict[str, Any]) -> list[list[str]]:
    """What `whet plan` or --auto measured before a run, and what the run has taken so far."""
    seconds, rates = run.values("seconds"), run.values("tokens_per_s")
    typical, count = statistics.median(seconds), run.total or len(seconds)
    tokens = sum(rate * taken for rate, taken in zip(rates, seconds, strict=False))
    whole = sum(seconds) + (count - len(seconds)) * typical
    peak = max(run.values("memory_gb"), default=0.0)
    step = plan["seconds_per_step"]
    return [
        [what, shown(planned), shown(found), f"{100 * (found / planned - 1):+.0f} %"]
        for what, planned, found, shown in (
            ("peak memory", plan["memory_gb"], peak, "{:.2f} GB".format),
            ("a step", step, typical, "{:.3g} s".format),
            ("tokens/s", plan["tokens_per_s"], tokens / sum(seconds), "{:,.0f}".format),
            (f"{count:,} steps", count * step, whole, duration),
        )
    ]


def _figures(named: Sequence[tuple[str, Run]]) -> list[dict[str, Any]]:
    """The figures, those that most people look at first."""
    several = len(named) > 1

    def lines(keys: dict[str, str]) -> list[Line]:
        """A curve for each run and key; of one run each key has its own colour."""
        return [
            Line(
                f"{name} {word}".strip() if several else word or name,
                run.points(key),
                colour=i if several else j,
                dashed=several and j > 0,
                noisy=key in ("train_loss", "grad_norm", "tokens_per_s"),
            )
            for i, (name, run) in enumerate(named)
            for j, (key, word) in enumerate(keys.items())
        ]

    found = list(dict.fromkeys(key for _, run in named for key in run.numbers()))
    sources = {key: key.removeprefix(SOURCES) for key in found if key.startswith(SOURCES)}
    other = [k for k in found if k not in KNOWN | DRAWN and not k.startswith("dev_loss/")]
    loss = {"train_loss": "train", "dev_loss": "dev"}
    units = {
        LOSS_UNITS.get(run.about.get("command", ""), "nats a trained token, by step")
        for _, run in named
    }
    stop = {"dev_stop_probability": "at the end of replies", "dev_stop_inside": "before it"}
    figures = [
        figure("Loss", lines(loss), " or ".join(sorted(units))),
        figure("Dev loss by source", lines(sources if len(sources) > 1 else {})),
        *(figure(title, lines(keys)) for title, keys in _measures(other)),
        figure("Stop token", lines(stop), "probability, over the dev file"),
        figure("Learning rate", lines({"lr": ""})),
        figure("Gradient norm", lines({"grad_norm": ""}), "before clipping", log=True),
        figure("Speed", lines({"tokens_per_s": ""}), "tokens a second, all ranks"),
        figure("Memory", lines({"memory_gb": ""}), "peak of the first rank, GB"),
    ]
    return [each for each in figures if each is not None]


def _measures(keys: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """(title, keys with their words) of a figure for each measure: in training, on the dev file or
    on problems with the ends of its 95 % interval, and by source."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        name, _, source = key.removeprefix("dev_").partition("/source/")
        stem, _, end = name.rpartition("_")
        end = end if end in ("low", "high") else ""
        name = (stem if end else name) or "accuracy"  # GRPO's are dev_low and dev_high
        if f"{name}_accuracy" in keys:  # gsm8k_low and gsm8k_high
            name += "_accuracy"
        of = "problems" if name.startswith("gsm8k_") else "train"
        of = "dev" if key.startswith("dev_") else of
        words = (source or of, end)
        found.setdefault(name.replace("_", " "), {})[key] = " ".join(words).strip()
    return sorted(found.items(), key=lambda each: not each[0].endswith(JUDGING))


def _samples(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Replies to the same prompts, as they change: some of each prompt's samples, the last one
    among them."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        prompts.setdefault(str(sample.get("prompt", "")), []).append(sample)
    for prompt, found in prompts.items():
        chosen = {i * (len(found) - 1) // (SAMPLES_SHOWN - 1) for i in range(SAMPLES_SHOWN)}
        prompts[prompt] = [found[i] for i in sorted(chosen)]
    return prompts


def _origin(known: dict[str, Any]) -> list[str]:
    """Of a model: where it is, the stage that made it, its data, and its base."""
    data = known.get("data", "")
    data = ", ".join(data) if isinstance(data, list) else str(data)
    return [known["path"], str(known.get("stage", "?")), data, str(known.get("base") or "")]


def _settings(runs: Sequence[Run]) -> list[list[str]]:
    """One run's settings; of several those that differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [[key, *(str(run.settings.get(key, "–")) for run in runs)] for key in keys]
    return rows if len(runs) == 1 else [row for row in rows if len(set(row[1:])) > 1]


# ---- Curves, for parts.html to draw as SVG, readable at the width of a phone ----


@dataclass(frozen=True)
class Line:
    """One curve: `points` are (step, value), in order of the steps."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    """A number of the page's palette."""
    dashed: bool = False
    noisy: bool = False


def figure(
    title: str, lines: Sequence[Line], note: str = "", log: bool = False
) -> dict[str, Any] | None:
    """What `parts.html` draws all `lines` from; None if none of them has a point."""
    if log:
        lines = [replace(line, points=[p for p in line.points if p[1] > 0]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    frame = _Frame(min(xs), max(xs), *_bounds(min(ys), max(ys), log), log)
    return {
        "title": title,
        "note": note,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "levels": [
            (round(frame.y(value), 1), _short(value))
            for value in _ticks(frame.low, frame.high, frame.log)
        ],
        "steps": _steps(frame),
        "lines": [_drawn(line, frame) for line in lines],
    }


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the drawing."""

    left: float
    right: float
    low: float
    high: float
    log: bool

    def x(self, value: float) -> float:
        share = (value - self.left) / ((self.right - self.left) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high, value = self.low, self.high, value
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """The points of a polyline."""
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def _bounds(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1
    return (low - room if low < 0 or low > 0.3 * high else 0.0), high + room


def _steps(frame: _Frame) -> list[tuple[float, str, str]]:
    """Where the first, the middle and the last step stand, aligned to that place, and their
    numbers."""
    steps = sorted({frame.left, (frame.left + frame.right) // 2, frame.right})
    anchors = ["start", *["middle"] * (len(steps) - 2), "end"]
    return [(round(frame.x(s), 1), a, f"{s:,.0f}") for s, a in zip(steps, anchors, strict=False)]


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Three to six round numbers between the two."""
    if log and high / low > 30:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        return [10.0**power for power in powers]
    size = (high - low) / 4 or 1
    unit = 10 ** math.floor(math.log10(size))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= size * 0.99)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(value: float) -> str:
    """Four digits, from 10,000 to 999,999 all of them."""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, power = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _drawn(line: Line, frame: _Frame) -> dict[str, Any]:
    """A curve: its paths, the faint ones first, and marks where a value can be pointed at."""
    points, noisy = _thinned(line.points), line.noisy and len(line.points) >= SMOOTHED_FROM
    paths = [(noisy, frame.path(points))]
    if noisy:
        paths.append((False, frame.path(_thinned(_running_mean(line.points)))))
    marks = [] if noisy or len(points) > MOST_MARKS else points
    return {
        "name": line.name,
        "classes": f"curve c{line.colour % 8}{' dashed' if line.dashed else ''}",
        "last": _short(line.points[-1][1]),
        "paths": paths,
        "marks": [
            (round(frame.x(x), 1), round(frame.y(y), 1), f"{line.name}, step {x:,.0f}: {y:.5g}")
            for x, y in marks
        ],
    }


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Few points that keep the least and the largest value of each stretch."""
    size = max(1, -(-2 * len(points) // MOST_POINTS))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential, over about a twentieth of the run, without a bias at its beginning."""
    keep = 1 - 20 / max(len(points), 21)
    total = weight = 0.0
    found = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        found.append((x, total / weight))
    return found
