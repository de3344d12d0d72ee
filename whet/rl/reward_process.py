"""The process in which a user's reward function runs: `python -m whet.rl.reward_process FILE NAME`.

It reads a JSON object of keyword arguments a line and writes the rewards, or what went wrong, as a
JSON object a line. What the function prints goes to stderr; its stdin is empty.
"""

import asyncio
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


def main(file: str, name: str) -> None:
    """Answer until stdin ends."""
    file = os.path.abspath(file)  # as tracebacks name it
    asked, answers = _own_pipes()
    process, loop = os.getpid(), asyncio.new_event_loop()  # one loop, as clients are bound to it
    try:
        function = load(file, name)
        wanted = inspect.signature(function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
    except BaseException as error:
        _write(answers, {"error": _last_line(error, file)})
        return
    _write(answers, {"ready": True})
    for line in asked:
        given = json.loads(line)
        answer: dict[str, Any]
        try:
            arguments = given if takes_all else {k: v for k, v in given.items() if k in wanted}
            found = function(**arguments)
            if inspect.isawaitable(found):  # `async def`, as TRL takes them
                found = loop.run_until_complete(found)
            answer = {"rewards": numbers(found, len(given["completions"]))}
        except Exception as error:
            answer = {"error": _last_line(error, file)}
        if os.getpid() != process:  # a fork of the function's, which has returned, too
            os._exit(0)
        _write(answers, answer)


def _own_pipes() -> tuple[TextIO, TextIO]:
    """stdin and stdout for this module alone: the function reads nothing and prints to stderr."""
    asked, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return asked, answers


def load(file: str, name: str) -> Any:
    """The function `name` of the Python file `file`, which may import what stands beside it."""
    spec: Any = importlib.util.spec_from_file_location("rewards_of_the_user", file)
    sys.path.insert(0, str(Path(file).resolve().parent))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise TypeError(f"{file} has no function {name}")
    return function


def numbers(found: Any, count: int) -> list[float]:
    """What the function returned, as `count` numbers. Raises TypeError for anything else."""
    try:
        each = [] if isinstance(found, str | Mapping) else list(found)
        if len(each) == count and not any(isinstance(x, str) for x in each):
            return [float(x) for x in each]
    except (TypeError, ValueError):
        pass
    raise TypeError(f"returned {found!r:.80}; expected a number for each of the {count} replies")


def _write(file: TextIO, content: dict[str, Any]) -> None:
    file.write(json.dumps(content) + "\n")
    file.flush()


def _last_line(error: BaseException, file: str) -> str:
    """The error, with the line of the user's file where it was raised or what raised it called."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    place = f" ({file}:{lines[-1]})" if lines else ""
    return " ".join(f"{type(error).__name__}: {error}{place}".split())


if __name__ == "__main__":
    main(*sys.argv[1:])
