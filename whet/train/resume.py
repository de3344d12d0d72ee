"""How a run is taken up again: by which process, from which state, and with what left as it was."""

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from whet.config import FREE, marked, problems, read_toml
from whet.errors import UserError
from whet.files import read_json, unwritable_folder
from whet.flags.training import TrainSettings
from whet.train import distributed, state
from whet.train.optim import decay_begin
from whet.train.state import Facts

LENGTH = ("epochs", "max_steps")
"""Flags that may grow when a run is resumed, where the schedule allows it."""
EXTENDED = ("constant", "wsd")
"""Schedules whose first steps do not depend on how long the run is."""


def continues(config: TrainSettings) -> bool:
    """Whether this process takes up an earlier one's run: by flag, or restarted by torchrun.

    A restarted process takes up only what its own job began: the first one may have been refused
    because the folder holds another run.
    """
    if config.resume or distributed.restarts() == 0:
        return config.resume
    run = config.out / "run.json"
    return not run.exists() or read_json(run).get("job") == distributed.job()


def find_start(config: TrainSettings, command: str) -> Path | None:
    """The state to continue from, or None to start at step 0.

    Raises UserError if the folder holds a run that this command would overwrite, or one of another
    command or made with other flags.
    """
    marks = ("config.toml", "metrics.jsonl", "state", "model.safetensors", "config.json")
    holds = [mark for mark in marks if (config.out / mark).exists()]
    problems(unwritable_folder("--out", config.out))
    if continues(config):
        return _newest_state(config, command, holds)
    if holds:
        raise UserError(
            f"--out {config.out}: already holds a run ({holds[0]}); --resume continues it, "
            "or give another folder, or remove this one"
        )
    return None


def _newest_state(config: TrainSettings, command: str, holds: Sequence[str]) -> Path | None:
    """The newest undamaged state of the run in --out, a folder that `holds` these files."""
    model = [mark for mark in holds if mark in ("model.safetensors", "config.json")]
    if model and "config.toml" not in holds:
        raise UserError(
            f"--out {config.out}: holds a model that no run of Whet made ({model[0]}), which would "
            "be overwritten; give another folder"
        )
    at_most = _check_same_run(config, command) if "config.toml" in holds else None
    start, passed_over = state.newest_valid(config.out / "state", at_most)
    for line in passed_over:
        print(f"warning: {line}", file=sys.stderr)
    if at_most is not None and start is None:
        raise UserError(
            f"--out {config.out}: no state from before step {at_most}, where its learning rate "
            f"began to fall, is kept; {_as_a_new_run(config, command)}"
        )
    return start


def is_longer(config: TrainSettings) -> bool:
    """Whether the run in `--out` is resumed to train longer than it was to."""
    path = config.out / "config.toml"
    before = read_toml(type(config), path) if continues(config) and path.exists() else {}
    return bool(before) and any(getattr(config, n) != before.get(n) for n in LENGTH)


def _check_same_run(config: TrainSettings, command: str) -> int | None:
    """Refuse another command, and flags that differ but may not. Returns the last step, if any,
    from which the run can be made longer."""
    path = config.out / "config.toml"
    run = config.out / "run.json"
    made_by = read_json(run).get("command", command) if run.exists() else command
    if made_by != command:
        raise UserError(
            f"--out {config.out}: holds a run of `whet {made_by}`, which `whet {command}` can't "
            "continue; give another folder"
        )
    before = read_toml(type(config), path)
    free = {*marked(type(config), FREE), *LENGTH}
    found = [
        f"--{field.name} {now}: the run in {config.out} was started with {before.get(field.name)}"
        for field in dataclasses.fields(config)
        if field.name not in free and (now := getattr(config, field.name)) != before.get(field.name)
    ]
    found += _unfit_length(config, before, command)
    if found:
        found.append(f"to continue it with its own flags: --config {path} --resume")
    problems(found)
    if config.schedule != "wsd" or not is_longer(config):
        return None
    states = state.saved_states(config.out / "state")
    planned = state.read_facts(states[-1]).total_steps if states else 0
    return decay_begin(planned, config.schedule, config.warmup) if planned else None


def _unfit_length(config: TrainSettings, before: dict, command: str) -> list[str]:
    """What speaks against another --epochs or --max_steps."""
    found = []
    for name in LENGTH:
        now, then = getattr(config, name), before.get(name)
        if now == then:
            continue
        line = f"--{name} {now}: the run in {config.out} was started with {then}"
        if then is None or (now is not None and now < then):
            found.append(f"{line}; it can be made longer, not shorter")
        elif config.schedule not in EXTENDED:
            found.append(
                f"{line}, and a {config.schedule} schedule is laid out for the length it began "
                f"with; {_as_a_new_run(config, command)}. Runs with --schedule constant or wsd can "
                "be made longer"
            )
    return found


def _as_a_new_run(config: TrainSettings, command: str) -> str:
    flag = f"whet {command} --model {config.out} --out NEW"
    return (
        f"train its model further in a new run: {flag}"
        if hasattr(config, "model")
        else ("train longer in a new run")
    )


def frozen_fingerprint(model: nn.Module) -> str:
    """Distinguishes the weights that are not trained, by some numbers of each; "" without any.

    Those packed in 4 bits are left out: another device may round them differently.
    """
    frozen = {
        name: weight
        for name, weight in model.named_parameters()
        if not weight.requires_grad and weight.is_floating_point()
    }
    return weights_fingerprint(frozen) if frozen else ""


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Distinguishes models by names, shapes and about a thousand numbers of each weight."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        values = weight.detach().flatten()
        some = values[:: max(1, len(values) // 1024)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:32]


def check_same_inputs(before: Facts, now: Facts, config: TrainSettings) -> None:
    """Refuse to go on with other files under the same names."""
    data = getattr(config, "data", None) or getattr(config, "prompts", "the data")
    what = {
        "data": f"{data}: is not the file",
        "dev": f"{getattr(config, 'dev', 'the dev data')}: is not the file",
        "frozen": f"{getattr(config, 'model', 'the model')}: does not hold the frozen weights",
    }
    problems(
        [
            f"{words} that this run started with; restore it, or start a new run with another --out"
            for name, words in what.items()
            if getattr(before, name) != getattr(now, name)
        ]
    )
