"""The process in which a user's reward function runs: `python -m whet.rl.reward_process FILE NAME`.

It reads a JSON object of keyword arguments a line and writes the rewards, or what went wrong, as a
JSON object a line. What the function prints goes to stderr.
"""

import importlib.util
import inspect
import json
import os
import sys
import traceback
from typing import Any


def main(file: str, name: str) -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        function = load(file, name)
        wanted = inspect.signature(function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
    except BaseException as error:
        _write(answers, {"error": _last_line(error)})
        return
    _write(answers, {"ready": True})
    for line in sys.stdin:
        given = json.loads(line)
        try:
            arguments = given if takes_all else {k: v for k, v in given.items() if k in wanted}
            rewards = [float(reward) for reward in function(**arguments)]
            _write(answers, {"rewards": rewards})
        except Exception as error:
            _write(answers, {"error": _last_line(error)})


def load(file: str, name: str) -> Any:
    """The function `name` of the Python file `file`."""
    spec = importlib.util.spec_from_file_location("rewards", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _write(file: Any, content: dict[str, Any]) -> None:
    file.write(json.dumps(content) + "\n")
    file.flush()


def _last_line(error: BaseException) -> str:
    """The error with the place in the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{place}".split())


if __name__ == "__main__":
    main(*sys.argv[1:])
