"""The README is true: its tree, its links, its commands."""

import re
import shlex

import pytest

from tests.conftest import REPOSITORY
from whet.cli import COMMANDS, config_class

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def test_the_tree_is_that_of_today() -> None:
    import sys

    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from tree import PAGE, with_tree

    page = PAGE.read_text(encoding="utf-8")
    assert with_tree(page) == page, "run: python scripts/tree.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands(text: str) -> list[list[str]]:
    """The `whet …` lines of the code blocks, without comments and optional parts."""
    blocks = re.findall(r"```(?:\w*)\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.split("#")[0] for line in lines if line.strip().startswith("whet ")]
    return [shlex.split(re.sub(r"\[.*?\]", "", line)) for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_on_the_pages_exist_with_their_flags(page) -> None:
    import dataclasses

    for words in commands(page.read_text(encoding="utf-8")):
        if words[1] in ("COMMAND", "--help"):
            continue
        assert words[1] in COMMANDS, f"{page.name}: {' '.join(words)}"
        names = {field.name for field in dataclasses.fields(config_class(words[1]))} | {
            "config",
            "help",
        }
        flags = {word[2:].split("=")[0] for word in words if word.startswith("--")}
        flags = {flag.removeprefix("no_") if flag not in names else flag for flag in flags}
        assert flags <= names, f"{page.name}: {' '.join(words)}: {flags - names}"
