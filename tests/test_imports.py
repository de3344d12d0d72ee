"""Data flows forward, and so do imports: a room may use only the rooms before it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import whet

PACKAGE = Path(whet.__file__).parent
# Each room with its place; a module may import rooms of its own place or an earlier one.
ORDER = {
    "errors": 0,
    "files": 0,
    "config": 0,
    "recipes": 8,
    "command_line": 0,
    "elsewhere": 0,
    "flags": 2,
    "progress": 0,
    "hub": 0,
    "tokenizer_files": 0,
    "chat": 1,
    "data": 2,
    "model": 3,
    "generate": 4,
    "evaluate": 5,
    "train": 6,
    "rl": 7,
    "stages": 8,
    "report": 3,  # reads files alone; a run writes its report at its end
    "compare": 9,  # stands aside: nothing imports it
    "doctor": 9,  # stands aside: nothing imports it
    "demo": 9,  # stands aside: nothing imports it
    "serve": 9,  # stands aside: nothing imports it
    "push": 9,  # stands aside: nothing imports it
    "api": 9,
    "cli": 10,
    "__main__": 11,
    "__init__": 10,  # the Python API
}
FORBIDDEN = {
    ("report", "train"),
    ("report", "model"),
    ("report", "stages"),
    ("report", "demo"),
    ("demo", "report"),
    ("data", "model"),
}
MODULES = sorted(PACKAGE.rglob("*.py"))
# Groups of modules that reach each other by imports: this list only shrinks.
CIRCLES: set[tuple[str, ...]] = set()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def whet_imports(path: Path) -> set[str]:
    """The rooms that a file imports, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "whet":
            names = [f"whet.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import; write it out"
            names = [node.module]
        rooms |= {name.split(".")[1] for name in names if name.startswith("whet.")}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    for imported in whet_imports(path):
        assert ORDER[imported] <= ORDER[room], f"whet.{room} must not import whet.{imported}"
        assert (room, imported) not in FORBIDDEN


def dependencies() -> dict[str, set[str]]:
    """{module: the modules of Whet that it imports}, inside functions and for types only, too."""
    modules = {
        ".".join(("whet", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in MODULES
        if path.name != "__init__.py"
    }
    found = {}
    for name, path in modules.items():
        used = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = used & set(modules)
    return found


def reached(module: str, imports: dict[str, set[str]]) -> set[str]:
    """Every module that `module` imports, directly or through others."""
    seen, waiting = set(), [module]
    while waiting:
        new = imports[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def test_no_two_modules_import_each_other() -> None:
    imports = dependencies()
    everything = {module: reached(module, imports) for module in imports}
    circles = {
        tuple(sorted({module, *(other for other in seen if module in everything[other])}))
        for module, seen in everything.items()
        if module in seen
    }
    assert circles == CIRCLES, "take circles that are cut out of the list, and add none"


def test_torch_is_not_needed_for_text_and_help() -> None:
    code = (
        "import sys, whet.cli, whet.config, whet.chat.conversation, whet.data.formats, "
        "whet.chat.template, whet.chat.chat, whet.chat.encode, whet.data.store, "
        "whet.data.packing, whet.report.inspect\n"
        "whet.cli.main(['--help'])\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_can_be_read_in_one_sitting() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in MODULES
        if (lines := len(path.read_text().splitlines())) > 450
    }
    assert not long, f"split these where they part naturally: {long}"
