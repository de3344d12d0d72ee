"""How large the house is, and how far one step walks through it: `python -m scripts.house`.

Lines and files are counted, circles are found in the imports, and a plain `whet sft` of one step on
a tiny model is traced: which functions of which files it calls. `--files` lists these files, those
with the most lines first.
"""

import ast
import dataclasses
import json
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "whet"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "sum", "of", "plus")


def main() -> None:
    """Print the table."""
    files = sorted(PACKAGE.rglob("*.py"))
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    called, passes = one_step()
    step_files = {Path(code.co_filename) for code in called}
    rooms = Counter(room_of(path) for path in files if path.name != "__init__.py")
    circles = import_circles(files)
    row("product lines", f"{sum(lines.values()):,} in {len(files)} files")
    walked = f"{len(step_files)} files, {source_lines(called):,} lines"
    row("called by one step of `whet sft`", walked)
    row("  of them by room", in_words(Counter(room_of(path) for path in step_files)))
    row("files by room", in_words(rooms))
    row("circles of imports", "; ".join(" - ".join(circle) for circle in circles) or "none")
    from whet.flags.sft import Config

    row("flags of `whet sft`", str(len(dataclasses.fields(Config))))
    row("passes over a dev file, an evaluation", f"{passes:.2f}")
    if "--files" in sys.argv:
        list_files(called)


def list_files(called: set[CodeType]) -> None:
    """The lines that the step calls in each file, and the functions that they belong to."""
    found: dict[str, set[CodeType]] = {}
    for code in called:
        found.setdefault(code.co_filename.removeprefix(f"{PACKAGE}/"), set()).add(code)
    for name, own in sorted(found.items(), key=lambda item: -source_lines(item[1])):
        functions = ", ".join(sorted(code.co_qualname for code in own))
        row(f"  {name}", f"{source_lines(own):>4}  {functions}")


def row(name: str, value: str) -> None:
    """One line of the table."""
    print(f"{name:<40} {value}")


def in_words(counts: Counter[str]) -> str:
    """`model 20, train 14, …`, the largest first."""
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def room_of(path: Path) -> str:
    """The folder in whet/ that a file lies in, or `whet` itself."""
    parts = path.relative_to(PACKAGE).parts
    return "/".join(parts[:-1]) or "whet"


def source_lines(called: set[CodeType]) -> int:
    """Source lines of the functions; those that stand in one another count once."""
    found = set()
    for code in called:
        ends = [line for *_, line in code.co_lines() if line is not None]
        found |= {(code.co_filename, line) for line in range(code.co_firstlineno, max(ends) + 1)}
    return len(found)


def import_circles(files: list[Path]) -> list[list[str]]:
    """Modules that import one another, lazy and typing imports included."""
    names = {module_name(path) for path in files}
    imports = {module_name(path): imported(path, names) for path in files}
    reach = {name: reachable(name, imports) for name in names}
    found = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in names
        if name in reach[name]
    }
    return sorted(map(list, found))


def module_name(path: Path) -> str:
    """`model.decoder` for whet/model/decoder.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path, names: set[str]) -> set[str]:
    """The modules of Whet that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("whet.") for name in found} & names


def reachable(name: str, imports: dict[str, set[str]]) -> set[str]:
    """What `name` imports, and what that imports."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        new = imports[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def one_step() -> tuple[set[CodeType], float]:
    """The functions that a run of one step calls, and dev rows computed for one evaluation, as
    multiples of the file."""
    from whet.cli import main as whet

    with tempfile.TemporaryDirectory() as folder:
        base = tiny_model(Path(folder))
        data, rows = tiny_data(Path(folder), base)
        common = ["sft", "--model", base, "--data", data, "--max_steps", "1", "--quiet"]
        common += ["--samples", "0", "--eval_every", "0", "--precision", "float32"]
        called: set[CodeType] = set()
        traced(lambda: whet([*common, "--out", f"{folder}/run"]), called)
        passes = dev_passes(lambda: whet([*common, "--dev", data, "--out", f"{folder}/dev"]), rows)
    return called, passes


def traced(act: Callable[[], Any], called: set[CodeType]) -> None:
    """Collect the code of each function of Whet that `act` calls, in any thread."""
    own = re.escape(str(PACKAGE)) + r"/.*\.py$"

    def see(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # Of Python alone, as the product's lines: a page's template is code of jinja's making.
        if event == "call" and re.match(own, code.co_filename):
            body = code.co_flags & 0x2  # CO_NEWLOCALS: a function, no module
            if body and not code.co_qualname.endswith(">") and code.co_firstlineno > 1:
                called.add(code)

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        act()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def dev_passes(act: Callable[[], Any], dev_rows: int) -> float:
    """Rows computed within evaluations, over rows of the dev file and evaluations."""
    from whet.model.decoder import Transformer
    from whet.train.evaluation import Evaluator

    rows, evaluations, inside = 0, 0, False
    forward, evaluate = Transformer.forward, Evaluator.__call__

    def counted_forward(self: Any, tokens: Any, *args: Any, **rest: Any) -> Any:
        nonlocal rows
        rows += len(tokens) if inside else 0
        return forward(self, tokens, *args, **rest)

    def counted_evaluation(self: Any, *args: Any) -> Any:
        nonlocal evaluations, inside
        evaluations, inside = evaluations + 1, True
        found = evaluate(self, *args)
        inside = False
        return found

    Transformer.forward, Evaluator.__call__ = counted_forward, counted_evaluation  # type: ignore
    try:
        act()
    finally:
        Transformer.forward, Evaluator.__call__ = forward, evaluate  # type: ignore
    return rows / (evaluations * dev_rows)


def tiny_model(folder: Path) -> str:
    """A random model of some ten thousand parameters."""
    from whet.chat.chat import Chat
    from whet.chat.tokenizer import train_tokenizer
    from whet.model.config import llama
    from whet.model.decoder import Transformer, init_weights
    from whet.model.hf.checkpoint import save_model

    chat = Chat(train_tokenizer([" ".join(WORDS)] * 4, 300))
    model = Transformer(llama(chat.tokenizer.vocab_size, 16, 2, 2, max_positions=32))
    init_weights(model, 0)
    save_model(model, folder / "base", chat, {"stage": "house"})
    return str(folder / "base")


def tiny_data(folder: Path, tokenizer: str) -> tuple[str, int]:
    """A packed file as `whet prepare` writes it, and its rows."""
    from whet.data.prepare import prepare
    from whet.data.store import PackedStore
    from whet.flags.prepare import Config

    source, out = folder / "talks.jsonl", folder / "rows.h5"
    talks = [[("user", f"{word} plus one"), ("assistant", word)] for word in WORDS]
    lines = [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prepare(Config(data=(str(source),), out=str(out), tokenizer=tokenizer, context_length=32), True)
    return str(out), len(PackedStore(out))


if __name__ == "__main__":
    main()
