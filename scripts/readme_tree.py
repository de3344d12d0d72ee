"""Write the README's tree: each file with the first line of what it says of itself.

`python scripts/readme_tree.py` rewrites it; a test holds that nothing is out of date.
"""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LONGEST = 90  # characters, so that a line of the tree fits a window
ROOMS = ["chat", "data", "model", "generate", "evaluate", "train", "stages"]
ROOMS += ["report", "doctor", "demo"]


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
        "scripts/train_sft.py".ljust(26) + "the entry for torchrun; `whet sft` with defaults",
    ]
    lines += ["configs/".ljust(26) + "a TOML file for each real use"]
    lines += [
        "benchmarks/".ljust(26) + "side-by-side runs against peers; results/ holds dated JSON"
    ]
    lines += ["tests/".ljust(26) + "mirrors whet/, plus numerics/ and end_to_end/", "whet/"]
    for path in sorted((REPOSITORY / "whet").glob("*.py")):
        if not path.name.startswith("__"):
            lines.append(f"  {path.name}".ljust(26) + first_sentence(path))
    for room in ROOMS:
        lines.append(f"  {room}/")
        for path in sorted((REPOSITORY / "whet" / room).glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"    {path.name}".ljust(26) + first_sentence(path))
    return "\n".join([*lines, "```"])


def with_tree(readme: str) -> str:
    """`readme` with the tree of today between its two marks."""
    before, rest = readme.split("<!-- tree -->")
    after = rest.split("<!-- /tree -->")[1]
    return f"{before}<!-- tree -->\n{tree()}\n<!-- /tree -->{after}"


if __name__ == "__main__":
    page = REPOSITORY / "README.md"
    page.write_text(with_tree(page.read_text(encoding="utf-8")), encoding="utf-8")
