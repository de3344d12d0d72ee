"""Commands of Whet as Python functions: settings are keywords instead of flags."""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from whet.command_line import configured
from whet.config import problems, read_table, read_toml

STAGES = ("pretrain", "sft", "reward", "dpo", "grpo", "ppo")


def prepare(**settings: Any) -> Path:
    """Write packed rows of conversations, as `whet prepare` does; returns the packed file.

    The keywords are the flags without their dashes. Raises UserError as `train` does.
    """
    config = _settings("prepare", settings)
    _end(import_module("whet.data.prepare").main(config))
    return Path(config.out)


def train(
    stage: Literal["pretrain", "sft", "reward", "dpo", "grpo", "ppo"], **settings: Any
) -> Path:
    """Train as `whet STAGE` does; returns the run folder, which is also the model's directory.

    The keywords are the stage's flags without their dashes; `config` may name a TOML file, over
    which they win. Raises UserError for settings, files and data that cannot be used, with all that
    is wrong in it. Ctrl-C saves the training state and raises KeyboardInterrupt; `resume=True` goes
    on from there.
    """
    if stage not in STAGES:
        problems([f"train: unknown stage {stage!r}; expected one of {', '.join(STAGES)}"])
    config = _settings(stage, settings)
    _end(import_module(f"whet.stages.{stage}").main(config))
    return Path(config.out)


def _settings(command: str, given: dict[str, Any]) -> Any:
    """The command's `Config`, converted and checked like flags and TOML files."""
    flags = import_module(f"whet.flags.{command}")
    given = {name: _plain(value) for name, value in given.items()}
    wrong: dict[str, str] = {}
    values = read_toml(flags.Config, file, wrong) if (file := given.pop("config", None)) else {}
    values |= read_table(flags.Config, given, command, wrong)
    flaws = getattr(flags, "flaws", lambda config: ())
    return configured(flags.Config, values, command, flaws, wrong)


def _plain(value: Any) -> Any:
    """A value as a TOML file would hold it: paths are texts, sequences lists, objects JSON."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _end(code: int) -> None:
    """What an exit code means within Python: 0 goes on, 130 is Ctrl-C, others are signals."""
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
