"""The run folder: what a run writes while it trains, and how a continued run finds its place.

    config.toml     the resolved flags
    plan.json       what `whet plan` or --auto measured before the run
    run.json        command, versions, steps, and what of plan.json is about these settings
    metrics.jsonl   one line a step and one an evaluation; only what a repetition would give again
    timing.jsonl    seconds, tokens/s and memory of each step
    samples.jsonl   replies generated at each evaluation
    ledger.bin      the documents of each step (see ledger.py)
    .lock           held while a process trains here
    incidents/      steps that were not applied (see step.py)
    state/          resume states (see state.py)
    best/           the model of the best evaluation
    tensorboard/    the same numbers as curves
    model.safetensors, config.json, tokenizer.json, …   the final model

Only rank 0 writes here, but for the tensors of the states.
"""

import contextlib
import copy
import fcntl
import hashlib
import importlib.util
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from whet.config import save
from whet.errors import UserError
from whet.files import flush, read_json, remove_leftovers, replaced, write_json
from whet.progress import say
from whet.train import state
from whet.train.distributed import Ranks
from whet.train.ledger import RECORD, as_json
from whet.train.state import Facts

PRICED = (
    *("model", "data", "overfit_rows", "batch_size", "optimizer", "train", "precision", "float8"),
    *("lora_rank", "lora_targets", "lora_dora", "lora_4bit", "device", "shard"),
    *("prompts", "group_size", "max_new_tokens", "updates", "critic", "kl", "cohort"),
)
"""Settings that a step's cost depends on, besides those that a plan proposes."""
APPENDED = ("metrics.jsonl", "timing.jsonl", "samples.jsonl", "ledger.bin")


@dataclass
class Curves:
    """Where numbers are drawn; with nothing in it, nowhere."""

    tensorboard: Any = None
    wandb: Any = None
    missing: list[str] = field(default_factory=list)
    """What is not installed, to be reported once."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """Draw the numbers among `values`. A full disk or a lost network must not end a run."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        with contextlib.suppress(OSError):
            if self.tensorboard is not None:
                for key, value in numbers.items():
                    self.tensorboard.add_scalar(key, value, step)
            if self.wandb is not None:
                self.wandb.log(numbers, step=step)

    def close(self) -> None:
        """Write out what waits."""
        with contextlib.suppress(OSError):
            if self.tensorboard is not None:
                self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish()


@dataclass
class Journal:
    """A file that only grows, and by whole records: a full disk delays records, it loses none."""

    path: Path
    length: int = 0
    """Bytes that are in the file."""
    waiting: bytes = b""

    record: int = 0
    """Bytes of a record; 0: a record is a line."""

    def cut(self, length: int) -> bool:
        """Forget what was written after `length` bytes; False if the file was shorter than that.

        A file that lost its end keeps its whole records: made longer, it would hold zeros.
        """
        self.path.touch()
        there = self.path.stat().st_size
        if there < length:
            content = self.path.read_bytes()
            whole = there - there % self.record if self.record else content.rfind(b"\n") + 1
            os.truncate(self.path, whole)
        else:
            os.truncate(self.path, length)
        self.length, self.waiting = self.path.stat().st_size, b""
        return there >= length

    def append(self, record: bytes) -> bool:
        """Write `record` and all that waits; False if the disk refuses, which is tried again."""
        self.waiting += record
        try:
            with open(self.path, "r+b") as file:
                file.truncate(self.length)  # a refused write may have left a part of itself
                file.seek(self.length)
                file.write(self.waiting)
                file.flush()
        except OSError:
            return False
        self.length += len(self.waiting)
        self.waiting = b""
        return True

    def flush(self) -> None:
        """Bring the file to the disk; raises OSError while records wait for space."""
        if self.waiting and not self.append(b""):
            raise OSError(f"{self.path}: cannot be written")
        flush(self.path)


@dataclass
class RunFolder:
    """One run's folder, on every rank; `facts` is where the run stands."""

    path: Path
    ranks: Ranks
    facts: Facts = field(default_factory=Facts)
    quiet: bool = False
    keep: int = 2
    curves: Curves = field(default_factory=Curves)
    journals: dict[str, Journal] = field(default_factory=dict)
    saving: threading.Thread | None = None
    lock: IO[str] | None = None
    resumed_at: int = -1
    """The step of the state that the run goes on from."""
    reported_full: bool = False
    warned: bool = False
    """Whether the run has said what the numbers of a step warn of (`Stage.warn`)."""

    @property
    def states(self) -> Path:
        return self.path / "state"

    def say(self, text: str = "") -> None:
        """Tell the user, once for all ranks."""
        if self.ranks.first and not self.quiet:
            say(text)

    def open(self, about: dict[str, Any], config: Any) -> None:
        """Make the folder this process's own: `about` into run.json, `config` into config.toml, and
        the other files fit `facts`, cut where they were written after that step.

        Raises UserError if it can't be written, or another process trains in it.
        """
        if not self.ranks.first:
            return
        try:
            self.states.mkdir(parents=True, exist_ok=True)
            self._lock()
            with replaced(self.path / "run.json") as aside:
                write_json(aside, about)
            save(config, self.path / "config.toml")
            state.clean(self.states)
            for folder in (self.path, self.path / "best"):
                remove_leftovers(folder, locked=self.lock is not None)
            for name in APPENDED:
                size = RECORD.itemsize if name.endswith(".bin") else 0
                self.journals[name] = Journal(self.path / name, record=size)
                if not self.journals[name].cut(self.facts.lengths.get(name, 0)):
                    say(f"warning: {self.path / name} has lost records of earlier steps")
            for path in (self.path / "incidents").glob("step_*.json"):
                if int(path.stem[5:]) > self.facts.step:
                    path.unlink()
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be written: {error.strerror}") from None

    def _lock(self) -> None:
        """Two processes would cut each other's files; the system opens the lock when one ends."""
        self.lock = open(self.path / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {self.path}: another process trains in it; wait for its end, or stop it"
            ) from None
        except OSError:
            pass  # a file system without locks

    def append(self, name: str, record: bytes | dict[str, Any]) -> None:
        """Add a record to one of the `APPENDED` files."""
        if not self.ranks.first:
            return
        if isinstance(record, dict):
            record = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        written = self.journals[name].append(record)
        if not written and not self.reported_full:
            say(f"warning: {self.path / name} cannot be written now; the run goes on, records wait")
        self.reported_full = not written

    def metrics(self, step: int, values: dict[str, float], timing: dict[str, float]) -> None:
        """Log the numbers of a step or of an evaluation."""
        if not self.ranks.first:
            return
        plain = {key: as_json(value) for key, value in values.items()}
        self.append("metrics.jsonl", {"step": step, **plain})
        if timing:
            self.append("timing.jsonl", {"step": step, **timing})
        self.curves.add(step, {**values, **timing})

    def incident(self, step: int) -> Path:
        """Where the record of a step that was not applied is written."""
        return self.path / "incidents" / f"step_{step:08d}.json"

    def incident_found(self, record: dict[str, Any]) -> None:
        """Tell of an incident and write its record."""
        if not self.ranks.first:
            return
        path = self.incident(record["step"])
        say(f"warning: step {record['step']} is not applied: {record['reason']}; see {path}")
        try:
            path.parent.mkdir(exist_ok=True)
            write_json(path, record)
        except OSError as error:
            say(f"warning: {path} cannot be written: {error}")

    def save(self, tensors: dict[str, torch.Tensor], *, wait: bool) -> None:
        """Save a resume state; all ranks call it. A disk that refuses costs this save only.

        The state that the run has just resumed from is not written again: it would have to be
        removed first, and a kill then could cost it.
        """
        if self.facts.step == self.resumed_at:
            return
        self.finish_saving()
        if self.ranks.first:
            try:
                for journal in self.journals.values():
                    journal.flush()
            except OSError as error:
                say(f"warning: {error}")
            self.facts.lengths = {name: j.length for name, j in self.journals.items()}
        facts = copy.deepcopy(self.facts)
        if wait:
            self._save(tensors, facts)
            return
        staged = state.copied(tensors)
        self.saving = threading.Thread(target=self._save, args=(staged, facts), name="save")
        self.saving.start()

    def _save(self, tensors: dict[str, torch.Tensor], facts: Facts) -> None:
        try:
            state.save_state(self.states, tensors, facts, self.ranks)
            if self.ranks.first:
                state.prune(self.states, self.keep, facts)
        # DCP wraps a rank's OSError into an exception that derives from BaseException.
        except BaseException as error:
            if self.ranks.first:
                say(
                    f"warning: the state of step {facts.step} could not be saved, earlier ones are "
                    f"kept and the run goes on: {_reason(error)}"
                )

    def close(self) -> None:
        """End the curves, and let other processes train in this folder."""
        self.curves.close()
        if self.lock is not None:
            self.lock.close()

    def finish_saving(self) -> None:
        """Wait for a save that runs beside the steps."""
        if self.saving is not None:
            self.saving.join()
            self.saving = None


def priced(config: Any, ranks: int) -> dict[str, str]:
    """What the cost of a step of this run depends on, for `plan.json`."""
    found = {name: str(getattr(config, name)) for name in PRICED if hasattr(config, name)}
    return found | {"ranks": str(ranks)}


def planned(config: Any, ranks: int) -> dict[str, Any] | None:
    """The cost that `plan.json` in the run's folder says for the run's own settings, if it does."""
    with contextlib.suppress(UserError):
        plan = read_json(config.out / "plan.json")
        rows = min(config.micro_batch_size, -(-config.batch_size // ranks))
        for row in plan.get("costs", []) if plan.get("settings") == priced(config, ranks) else []:
            if (row["micro_batch_size"], row["recompute"]) == (rows, config.recompute):
                return row
    return None


def open_curves(folder: Path, step: int, wandb_project: str | None, config: dict) -> Curves:
    """Open TensorBoard if it is installed, and W&B if a project is given.

    `step` is where the run continues: points after it, drawn before a kill, are dropped.
    """
    curves = Curves()
    if importlib.util.find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        curves.tensorboard = SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None
        )
    else:
        curves.missing.append("tensorboard is not installed, so the report alone has the curves")
    if wandb_project:
        curves.wandb = _open_wandb(folder, wandb_project, config)
    return curves


def _open_wandb(folder: Path, project: str, config: dict) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb_project: wandb is not installed; pip install wandb") from None
    return wandb.init(
        project=project,
        name=folder.name,
        # The same folder is the same run, also when it is continued.
        id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(folder),
        config=config,
    )


def _reason(error: BaseException) -> str:
    """The innermost message in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]
