"""`whet demo --all`: the stages after SFT on the tiny world, each visibly doing its own work.

The assistant of this demo has been shown two of the world's eight kinds of events, hardly anything
of the other six, and two styles of answering, each as often:
`<think>14+5=19</think><answer>19</answer>` and `<step>14+5=19</step><answer>19</answer>`. From it

- a reward model learns to tell a good answer from one with a defect,
- DPO learns to prefer the first style, from the assistant's own replies, right or wrong, in both,
- GRPO learns the other six kinds from nothing but whether a number is right.

`whet compare` then shows what each of them has changed, and what it has left as it was.
"""

import json
import random
import re
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from whet.compare import command as compare
from whet.data import prepare
from whet.demo import world
from whet.demo.shown import run_command, title
from whet.demo.world import KINDS, Problem, Size, World
from whet.evaluate import command as evaluate
from whet.progress import say
from whet.stages import dpo, grpo, reward, sft

SHOWN_KINDS = (KINDS[0], KINDS[4])
"""The kinds of events that SFT shows: one that adds and one that takes away."""
OF_OTHERS = 1
"""Problems of each other kind that SFT shows: enough for the form, too few for right answers."""
MOST = 0.6
"""Share of right answers up to which there is enough left for GRPO to learn. Where SFT brings more,
as with some worlds, and by a rounding here or there with some processors, it is repeated without
the other kinds."""
FORM = re.compile(r"<(think|step)>\d+[+-]\d+=\d+</\1><answer>\d+</answer>")
"""What an answer looks like, in either style."""
STYLE = "def tags(completions):\n    return [float(t.startswith('<think>')) for t in completions]\n"
"""The reward function that compares styles: 1 for the preferred one."""


def write(made: World, seed: int, folder: Path, size: Size) -> None:
    """Write what the stages read into `folder`, in formats that `whet` reads.

    No test problem is among it: neither as a pair nor as a prompt.
    """
    rng = random.Random(f"stages {seed}")
    held_out = {problem.identity for problem in made.test}
    shown = []
    for kind in KINDS:
        of_kind = [problem for problem in made.pairs if problem.kind == kind]
        shown += of_kind if kind in SHOWN_KINDS else of_kind[:OF_OTHERS]
    rng.shuffle(shown)
    drawn = world.distinct(rng, held_out)
    asked = list(islice(drawn, size.prompts))
    styled = list(islice(drawn, size.preferences))
    judged = list(islice((p for p in drawn if p.kind in SHOWN_KINDS), size.preferences))
    styles = ("think", "step")
    answers = [(p, in_style(p.answer, rng.choice(styles))) for p in shown]
    files: dict[str, Iterable[dict[str, str]]] = {
        name: [
            {"instruction": p.question, "response": text} for p, text in answers if p.kind in kinds
        ]
        for name, kinds in (("two_styles", KINDS), ("two_kinds", SHOWN_KINDS))
    }
    files |= {
        "prompts": ({"question": p.question, "answer": p.answer} for p in asked),
        "styled": ({"question": p.question, "answer": p.answer} for p in styled),
        "defects": (
            {"prompt": p.question, "chosen": p.answer, "rejected": with_defect(p, rng)}
            for p in judged
        ),
    }
    world.write_files(folder, files)
    (folder / "style.py").write_text(STYLE, encoding="utf-8")


def in_style(answer: str, style: str) -> str:
    """An answer in one of the two styles: `think` or `step`."""
    return re.sub(r"(think|step)>", f"{style}>", answer)


def write_pairs(folder: Path, replies: Path) -> None:
    """Write pairs of one answer in both styles: those that SFT has shown, and the assistant's own.

    So DPO sees nothing new but which style is preferred. Replies that have not the form of an
    answer are left out.
    """
    shown = world.read_lines(folder / "two_styles.jsonl")
    answers = [(record["instruction"], record["response"]) for record in shown]
    answers += [(record["question"], record["reply"]) for record in world.read_lines(replies)]
    pairs = [
        {"prompt": question, "chosen": in_style(text, "think"), "rejected": in_style(text, "step")}
        for question, text in answers
        if FORM.fullmatch(text)
    ]
    world.write_files(folder, {"styles": pairs})
    say(f"{folder / 'styles.jsonl'}: {len(pairs):,} pairs, an answer in both styles each")


def with_defect(problem: Problem, rng: random.Random) -> str:
    """The answer with one of five defects: a number unlike its own thinking, no thinking, thinking
    after the answer, no end, or two answers."""
    other = problem.result + rng.choice((-3, -2, -1, 1, 2, 3))
    thought = f"<think>{problem.fact}</think>"
    return rng.choice(
        (
            f"{thought}<answer>{other}</answer>",
            f"<answer>{problem.result}</answer>",
            f"<answer>{problem.result}</answer>{thought}",
            f"{thought}<answer>{problem.result}",
            f"{thought}<answer>{problem.result}</answer><answer>{other}</answer>",
        )
    )


def train_and_compare(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """SFT, reward model, DPO and GRPO from `out`/base, and the table across them."""

    def train(command: str, module: Any, words: str) -> None:
        words += " --seed {seed} --save_every 0 --samples 0"
        run_command(command, module, words, out=out, seed=seed, size=size)

    title("3/7  Fine-tuning (SFT)", "Two of eight kinds of events, in two styles of answering.")
    for data in ("two_styles", "two_kinds"):
        shutil.rmtree(out / "sft", ignore_errors=True)
        _prepare(out, data, tokenizer="base")
        train(
            "sft",
            sft,
            f"--model {{out}}/base --data {{out}}/{data}.h5 --out {{out}}/sft "
            "--lr 1e-3 --epochs 4 --batch_size 4 --eval_every 0",
        )
        run_command(
            "eval",
            evaluate,
            "{out}/sft --gsm8k {out}/world/styled.jsonl --max_new_tokens 64 "
            "--json {out}/start.json --samples {out}/replies.jsonl",
            out=out,
        )
        if json.loads((out / "start.json").read_text(encoding="utf-8"))["accuracy"] <= MOST:
            break
    title("4/7  Reward model", "Good answers against answers with a defect.")
    _prepare(out, "defects", tokenizer="sft", dev=0.15)
    train(
        "reward",
        reward,
        "--model {out}/sft --data {out}/defects.h5 --dev {out}/defects_dev.h5 --out {out}/reward "
        "--lr 5e-4 --batch_size 4 --epochs 9 --max_steps {size.reward_steps} --eval_every 50",
    )
    title("5/7  DPO", "Of an answer in both styles, the first is preferred.")
    write_pairs(out / "world", out / "replies.jsonl")
    say()
    _prepare(out, "styles", tokenizer="sft", dev=0.1)
    train(
        "dpo",
        dpo,
        "--model {out}/sft --data {out}/styles.h5 --dev {out}/styles_dev.h5 --out {out}/dpo "
        "--lr 5e-5 --sft_weight 0.2 --batch_size 4 --epochs 9 --max_steps {size.dpo_steps} "
        "--eval_every 40",
    )
    title("6/7  GRPO", "All kinds of events; nothing says how, only whether the number is right.")
    train(
        "grpo",
        grpo,
        "--model {out}/sft --prompts {out}/world/prompts.jsonl --dev {out}/world/test.jsonl "
        "--out {out}/grpo --lr 3e-4 --batch_size 16 --group_size 8 --max_new_tokens 64 --epochs 19 "
        "--max_steps {size.grpo_steps} --eval_every 40",
    )
    title("7/7  What each stage has changed", "The test problems, for each model.")
    run_command(
        "compare",
        compare,
        "{out}/base {out}/sft {out}/reward {out}/dpo {out}/grpo --gsm8k {out}/world/test.jsonl "
        "--samples 4 --max_new_tokens 64 --pairs {out}/defects_dev.h5 "
        "--reward {out}/world/style.py:tags --html {out}/compare.html --json {out}/compare.json",
        out=out,
    )
    return _summary(out)


def _prepare(out: Path, name: str, *, tokenizer: str, dev: float = 0.0) -> None:
    words = (
        "--data {out}/world/{name}.jsonl --tokenizer {out}/{tokenizer} --context_length 256 "
        "--out {out}/{name}.h5"
    )
    words += " --dev_out {out}/{name}_dev.h5 --dev_fraction {dev}" if dev else ""
    run_command("prepare", prepare, words, out=out, name=name, tokenizer=tokenizer, dev=dev)
    say()


def _summary(out: Path) -> dict[str, Any]:
    """What the demo promises, from the comparison's own numbers.

    The share of the first style is that of sampled replies before DPO, where the two are about as
    likely and the likelier one is a matter of chance, and of greedy replies after it.
    """
    content = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    rows = {row["model"]: row for row in content["models"]}
    return {
        **{f"{name}_accuracy": rows[name]["accuracy"] for name in ("base", "sft", "dpo", "grpo")},
        "sft_tags": rows["sft"]["sampled_reward/tags"],
        "dpo_tags": rows["dpo"]["reward/tags"],
        "reward_pair_accuracy": rows["reward"]["pair_accuracy"],
        "n": rows["sft"]["problems"],
    }
