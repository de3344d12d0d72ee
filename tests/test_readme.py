"""The README is true: its tree, its links, its commands."""

import dataclasses
import importlib
import io
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import REPOSITORY
from whet.cli import COMMANDS, config_class, flags_of, main
from whet.command_line import _take_config_flag, read_flags
from whet.config import SHIPPED, read_toml

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


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


def blocks(text: str) -> list[tuple[str, str]]:
    """The code blocks of a page, fenced or indented, each with what `<!-- needs … -->` says."""
    block = r"```(\w*)\n(.*?)^```|((?:^    [^\n]*\n|^\n(?=    ))+)"
    found = re.findall(rf"(?:^<!-- needs (.*?) -->\n\n?)?^(?:{block})", text, flags=re.S | re.M)
    return [
        (needs, textwrap.dedent(fenced or indented))
        for needs, language, fenced, indented in found
        if language in ("", "bash")
    ]


def lines(block: str) -> list[str]:
    """Its command lines, without comments, settings of the environment and optional parts."""
    whole = re.sub(r"\s*\\\n\s*", " ", block).splitlines()
    plain = [re.sub(r"\[.*?\]|\s#.*", "", line).strip() for line in whole]
    return [line for line in plain if re.match(rf"({PROGRAMS})\b", line)]


PROGRAMS = "whet(?!/)|torchrun|python|make|pip|vllm|srun|lm_eval|llama-server|ollama|VLLM_\\S+"


def commands(text: str) -> list[list[str]]:
    """The `whet …` lines of the unmarked blocks."""
    found = [line for needs, block in blocks(text) if not needs for line in lines(block)]
    return [shlex.split(line) for line in found if line.startswith("whet ")]


def parsed(words: list[str]) -> None:
    """Parse `whet COMMAND FLAGS` as the command does, but for files, which need not be there."""
    command, flags = words[0], words[1:]
    assert command in COMMANDS, command
    config, flags = _take_config_flag(flags)
    wrong: dict[str, str] = {}
    values = read_flags(config_class(command), flags, command, wrong)
    assert not wrong
    shipped = SHIPPED / f"{Path(config or '').stem}.toml"
    if config and shipped.is_file():
        values |= read_toml(config_class(command), shipped)
    assert not config or not config.startswith("configs/") or (REPOSITORY / config).is_file()
    required = [
        field.name
        for field in dataclasses.fields(config_class(command))
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    assert config or set(required) <= values.keys(), required
    if command == "prepare":
        flaws = flags_of(command).flaws(config_class(command)(**values))
        assert not [flaw for flaw in flaws if "belong together" in flaw], words


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_each_command_of_the_pages_is_one_or_says_what_it_needs(page) -> None:
    """`whet` commands are parsed; other programs stand in blocks that say what they need."""
    for needs, block in blocks(page.read_text(encoding="utf-8")):
        for line in lines(block):
            words = shlex.split(line)
            if words[0] == "torchrun":
                words = words[
                    next(i for i, w in enumerate(words) if w in ("whet", "-m") or ".py" in w) :
                ]
                words = words[words[0] == "-m" :]
                stage = re.fullmatch(r"scripts/train_(\w+)[.]py", words[0])
                words = ["whet", stage[1], *words[1:]] if stage else words
            if words[0] == "whet" and words[1] not in ("COMMAND", "--help"):
                parsed(words[1:])
            elif words[0] == "make":
                makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
                assert re.search(rf"(?m)^{words[1]}:", makefile), line
            elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
                assert (REPOSITORY / f"{words[2].replace('.', '/')}.py").is_file(), line
            elif words[0] == "python" and words[1].startswith("scripts/"):
                assert (REPOSITORY / words[1]).is_file(), line
            else:
                assert needs or words[0] in ("pip", "whet"), f"{page.name}: {line}"


SMALL = {
    "pretrain": "--width 16 --layers 1 --heads 2 --vocab_size 300 --dev_fraction 0.2",
    "prepare": "--workers 0 --dev_fraction 0.3",
    "plan": "--batch_size 2 --max_steps 1",
    "sft": "--max_steps 2 --batch_size 2 --samples 1",
    "eval": "--max_new_tokens 2",
    "doctor": "--row_tokens 24 --no_processes",
    "chat": "--max_new_tokens 2",
}
"""Sizes for the README's commands: a flag that is given twice counts as it is given last."""
BELONGS = {"prepare": "--dev_fraction", "eval": "--gsm8k", "compare": "--gsm8k"}
"""What a command must have of its own for its sizes to make sense."""


def small(words: list[str], sizes: dict[str, str]) -> list[str]:
    """`whet COMMAND FLAGS` with the command's sizes."""
    fits = BELONGS.get(words[1], words[1]) in words
    return [*words, *(sizes.get(words[1], "").split() if fits else ())]


def test_the_commands_by_hand_run_in_their_order(tmp_path, monkeypatch, capsys) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = commands(text.partition("## By hand")[2].partition("torchrun")[0])
    assert [words[1] for words in block][:5] == ["pretrain", "prepare", "inspect", "plan", "sft"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(
        "How many apples are two and three? They are five.\n\n" * 400
    )
    for name, n in (("chats.jsonl", 80), ("test.jsonl", 2)):
        talks = [{"question": f"{i} and three?", "answer": f"#### {i + 3}"} for i in range(n)]
        (tmp_path / name).write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n/exit\n"))
    for words in block:
        files = {"TEXT...": "text.txt", "FILE...": "chats.jsonl"}
        words = small([files.get(word, word) for word in words], SMALL)
        assert main(words[1:]) == 0, f"{' '.join(words)}: {capsys.readouterr().err}"
    report = (tmp_path / "runs/sft/report.html").read_text(encoding="utf-8")
    assert "2 steps" in report.partition("The plan against what happened")[2]


GUIDES = ("data", "sft", "inspect", "doctor", "numbers", "performance", "models", "reward", "dpo")
GUIDES += ("grpo", "ppo", "evaluation", "reliability")
ELSEWHERE = {"serve": "tests/serve", "push": "tests/test_push.py", "demo": "tests/demo"}
TINY = SMALL | {
    **dict.fromkeys(("reward", "dpo", "sft"), "--max_steps 2 --batch_size 2"),
    **dict.fromkeys(("grpo", "ppo"), "--max_steps 2 --batch_size 4 --max_new_tokens 4"),
    "compare": "--samples 2 --max_new_tokens 2",
}


@pytest.mark.slow
def test_the_commands_of_the_guides_run_in_their_order(tmp_path, monkeypatch, capsys) -> None:
    """In one folder, with small sizes; what a block needs besides Whet is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n" * 9))
    for folder in ("runs", "models", "gsm8k", "data"):
        (tmp_path / folder).mkdir()
    for folder in ("runs/base", "models/base"):
        tiny.model_directory(tmp_path / folder, max_positions=1024)
    tiny.packed_file(tmp_path / "sft_packed.h5", n_rows=1100)
    talks = [{"question": f"{i} and three?", "answer": f"#### {i + 3}"} for i in range(99)]
    pairs = [{"prompt": f"{i}?", "chosen": "one", "rejected": "two"} for i in range(99)]
    for name in ("train", "chats", "test", "gsm8k/train", "gsm8k/test", "prefs"):
        records = pairs if name == "prefs" else talks
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    count = 0
    for guide in GUIDES:
        for words in commands((REPOSITORY / f"docs/{guide}.md").read_text(encoding="utf-8")):
            if words[1] in ELSEWHERE:
                continue
            if "--out" in words and words[1] in ("sft", "reward", "dpo", "grpo", "ppo"):
                shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)  # a run before
            if words[1] == "sft" and "--resume" in words:
                words += ["--samples", "3"]  # as it was begun, but for its length
            else:
                words = ["2" if word == "1234" else word for word in words]  # a step
                words = small(words, TINY)
            assert main(words[1:]) == 0, f"{guide}: {words}: {capsys.readouterr().err}"
            count += 1
    assert count >= 38


def test_the_lines_of_the_foundations_do_what_the_formulas_say() -> None:
    text = (REPOSITORY / "docs/foundations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == text.count("```python") >= 7
    names: dict = {}
    for block in blocks:
        exec(block, names)


def test_every_flag_that_the_guides_name_exists() -> None:
    flags = {f.name for name in COMMANDS for f in dataclasses.fields(config_class(name))}
    for name in ("coming_from", "trouble", "numbers", "sft", "start"):
        text = (REPOSITORY / f"docs/{name}.md").read_text(encoding="utf-8")
        said = {
            flag
            for span in re.findall(r"`([^`\n]+)`", text)
            for flag in re.findall("--(\\w+)", span)
        }
        assert said - flags <= {"config", "help", "standalone", "nproc_per_node"}, name


def test_commands_within_a_sentence_have_the_flags_that_they_name() -> None:
    for page in PAGES:
        for span in re.findall(r"`(whet [^`\n]+)`", page.read_text(encoding="utf-8")):
            for command, words in re.findall(r"\bwhet (\w+)([^|&;]*)", span):
                if command in COMMANDS:
                    flags = {f.name for f in dataclasses.fields(config_class(command))}
                    said = set(re.findall(r"--(?:no_)?(\w+)", words))
                    assert said <= flags | {"config", "help"}, f"{page.name}: {span}"


def test_every_page_is_in_the_site(tmp_path) -> None:
    nav = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f": {page.relative_to(REPOSITORY / 'docs')}\n" in nav


def test_what_can_be_imported_is_there() -> None:
    text = (REPOSITORY / "docs/design.md").read_text(encoding="utf-8")
    named = re.findall(r"(?m)^\| `(whet[\w.]+)\.(\w+)\(", text)
    assert len(named) >= 8
    for module, name in named:
        assert callable(getattr(importlib.import_module(module), name)), f"{module}.{name}"
