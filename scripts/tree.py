"""Write the tree in docs/design.md: each file with the first line of what it says of itself.

`python scripts/tree.py` rewrites it; a test holds that nothing is out of date.
"""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "design.md"
LONGEST = 90  # characters, so that a line of the tree fits a window
ROOMS = ["chat", "data", "model", "generate", "evaluate", "train", "rl", "stages"]
ROOMS += ["compare", "report", "serve", "doctor", "demo"]


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring without its full stop; a long one's first part."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()))[0]
    if len(sentence) > LONGEST:
        sentence = re.split(r"(?<=[:;])\s", sentence)[0]
    return sentence.rstrip(".:;")


def tree() -> str:
    """The tree as a Markdown code block."""
    lines = [
        "```",
        "scripts/train_*.py".ljust(26) + "the entries for torchrun; each stage with defaults",
        "configs/".ljust(26) + "a TOML file for each real use",
        "benchmarks/".ljust(26) + "side-by-side runs against peers; results/ holds dated JSON",
        "tests/".ljust(26) + "mirrors whet/, plus numerics/ and end_to_end/",
        "whet/",
        *_files_of(REPOSITORY / "whet", "  "),
        "  flags/".ljust(26)
        + "a file for each command: its flags with help and checks, without torch",
    ]
    for room in ROOMS:
        lines += _room(REPOSITORY / "whet" / room, "  ")
    return "\n".join([*lines, "```"])


def _room(folder: Path, indent: str) -> list[str]:
    rooms = sorted(file.parent for file in folder.glob("*/__init__.py"))
    below = [line for room in rooms for line in _room(room, indent + "  ")]
    return [f"{indent}{folder.name}/", *_files_of(folder, indent + "  "), *below]


def _files_of(folder: Path, indent: str) -> list[str]:
    return [
        f"{indent}{path.name}".ljust(26) + first_sentence(path)
        for path in sorted(folder.glob("*.py"))
        if not path.name.startswith("__")
    ]


def with_tree(text: str) -> str:
    """`text` with the tree of today between its two marks."""
    before, rest = text.split("<!-- tree -->")
    after = rest.split("<!-- /tree -->")[1]
    return f"{before}<!-- tree -->\n{tree()}\n<!-- /tree -->{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
