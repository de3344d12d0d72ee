"""`whet demo`: a tiny base model becomes an assistant, measured before and after.

Every stage is run as the command that is shown: its flags are parsed and its `main` is called, so
that one can repeat any of them by hand.
"""

import json
import shutil
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from whet.data import prepare
from whet.demo import stages, world
from whet.demo.shown import folded, run_command, title, whet, wrapped
from whet.demo.world import Size
from whet.errors import UserError
from whet.evaluate import command as evaluate
from whet.evaluate.answers import extract_answer, same_number
from whet.files import write_json
from whet.flags.demo import Config
from whet.generate.engine import generate
from whet.generate.opened import open_model
from whet.progress import say
from whet.stages import pretrain, sft

LONGEST_REPLY = 64  # tokens; an answer has about 40


def main(config: Config) -> int:
    """Run `whet demo`."""
    with replacing(config.out):
        (run_all if config.all else run)(config.out, config.seed, Size())
    return 0


def run_all(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """The base, and all stages from it, into `out`; returns what is in its `summary.json`."""
    started = time.monotonic()
    title("1/7  The tiny world", "Stories for the base, then questions, pairs and prompts.")
    made = _make_world(out, seed, size)
    stages.write(made, seed, out / "world", size)
    _pretrain("2/7", out, seed, size)
    return _summed_up(out, seed, started, stages.train_and_compare(out, seed, size))


def run(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """The base and its assistant, into `out`; returns what is in its `summary.json`."""
    started = time.monotonic()
    title("1/5  The tiny world", "Stories for the base, questions with answers for SFT.")
    made = _make_world(out, seed, size)
    _show_world(made)
    _pretrain("2/5", out, seed, size)
    show = partial(run_command, out=out, seed=seed)
    title("3/5  Preparing the pairs", "Only the tokens of the answers will be trained.")
    show(
        "prepare",
        prepare,
        "--data {out}/world/pairs.jsonl --tokenizer {out}/base --context_length 256 "
        "--out {out}/sft_packed.h5 --dev_out {out}/sft_dev_packed.h5 --dev_fraction 0.03",
    )
    title("4/5  Fine-tuning (SFT)", "The base learns that a question wants an answer.")
    show(
        "sft",
        sft,
        "--model {out}/base --data {out}/sft_packed.h5 --dev {out}/sft_dev_packed.h5 "
        "--out {out}/sft --lr 1e-3 --epochs 1 --batch_size 4 "
        "--eval_every 0 --save_every 0 --samples 0 --seed {seed}",
    )
    title("5/5  Measuring", f"{size.test} new problems for each model, answered greedily.")
    base, tuned = (_measure(out, name) for name in ("base", "sft"))
    continued, prose = _measure_prose(out / "base", made.test)
    found = {
        "base_accuracy": base["accuracy"],
        "base_prose_accuracy": prose,
        "sft_accuracy": tuned["accuracy"],
        "n": tuned["n"],
        "base_dev_loss": base["dev_loss"],
        "sft_dev_loss": tuned["dev_loss"],
    }
    summary = _summed_up(out, seed, started, found)
    _show_result(out, summary, made.test[0], continued[0])
    return summary


def _make_world(out: Path, seed: int, size: Size) -> world.World:
    """The world, written into `out` and checked."""
    made = world.make_world(seed, texts=size.texts, pairs=size.pairs, test=size.test)
    world.write(made, out / "world")
    world.check(out / "world")
    return made


def _pretrain(number: str, out: Path, seed: int, size: Size) -> None:
    """A base model from the world's prose, into `out`/base."""
    title(f"{number}  Pretraining", "A new model learns to continue the prose; it counts, unasked.")
    run_command(
        "pretrain",
        pretrain,
        "--data {out}/world/prose.jsonl --out {out}/base --vocab_size 512 --width {size.width} "
        "--layers {size.layers} --context_length 256 --batch_size 2 --lr 3e-3 --final_lr 0.02 "
        "--eval_every 0 --save_every 0 --samples 0 --seed {seed}",
        out=out,
        size=size,
        seed=seed,
    )


def _summed_up(out: Path, seed: int, started: float, found: dict[str, Any]) -> dict[str, Any]:
    """What was `found`, with the time that it took; written as `summary.json`."""
    summary = {**found, "seconds": round(time.monotonic() - started, 1), "seed": seed}
    write_json(out / "summary.json", summary)
    return summary


def _measure(out: Path, name: str) -> dict[str, Any]:
    """Accuracy on the test, asked as a chat, and loss on the pairs that were held out for dev."""
    run_command(
        "eval",
        evaluate,
        "{out}/{name} --gsm8k {out}/world/test.jsonl --dev {out}/sft_dev_packed.h5 "
        "--max_new_tokens {longest} --json {out}/{name}_eval.json "
        "--samples {out}/{name}_answers.jsonl",
        out=out,
        name=name,
        longest=LONGEST_REPLY,
    )
    say()
    return json.loads((out / f"{name}_eval.json").read_text(encoding="utf-8"))


def _measure_prose(model_path: Path, problems: Sequence[world.Problem]) -> tuple[list[str], float]:
    """How the model continues the story of each problem, and the share of right numbers.

    Checked as any answer: the last number of what it writes must be the result.
    """
    model, chat = open_model(model_path)
    replies = generate(
        model,
        [chat.tokenizer.encode(problem.story) for problem in problems],
        max_new_tokens=LONGEST_REPLY,
        stop_ids=chat.stop_ids,
    )
    texts = [chat.tokenizer.decode(reply).strip() for reply in replies]
    right = [
        same_number(extract_answer(text), str(problem.result))
        for text, problem in zip(texts, problems, strict=True)
    ]
    return texts, sum(right) / len(right)


@contextmanager
def replacing(out: Path) -> Iterator[None]:
    """Make room for a new demo in `out`; an earlier one comes back if the block fails.

    Raises UserError if `out` holds something else.
    """
    earlier = out.with_name(f".{out.name}.earlier")
    if earlier.exists():  # the process that moved it here was killed: `out` is incomplete
        shutil.rmtree(out, ignore_errors=True)
    elif out.exists():
        if any(out.iterdir()) and not (out / "world/prose.jsonl").is_file():
            raise UserError(f"--out {out}: holds something else than a demo; name another folder")
        out.rename(earlier)
    try:
        yield
    except BaseException:
        if earlier.exists():
            shutil.rmtree(out, ignore_errors=True)
            earlier.rename(out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _show_world(made: world.World) -> None:
    problem = made.pairs[0]
    say(f"{len(made.prose):,} texts of prose, for instance:")
    for text in made.prose[:3]:
        say(wrapped(text))
    say(f"\n{len(made.pairs):,} questions with answers, for instance:")
    say(wrapped(problem.question))
    say(wrapped(problem.answer))
    say(
        f"\nand {len(made.test)} test problems. Checked: none of them is told in the prose or asked"
        "\nin the pairs; the prose states the sums that they need, in other stories."
    )


def _show_result(
    out: Path, summary: Mapping[str, Any], problem: world.Problem, continued: str
) -> None:
    """The table, an answer of each model to the same question, and how to go on."""
    n = summary["n"]
    asked = [f"{100 * summary[key]:.1f} %" for key in ("base_accuracy", "sft_accuracy")]
    prose = f"{100 * summary['base_prose_accuracy']:.1f} %"
    losses = [f"{summary[key]:.3f}" for key in ("base_dev_loss", "sft_dev_loss")]
    title("Result", f"{summary['seconds']:.0f} seconds, written to {out}/summary.json.")
    rows = [
        ("", "base", "after SFT"),
        (f"{n} new problems, asked as questions: right", *asked),
        ("the same, as stories to continue: right", prose, "–"),
        ("loss on answers it was not trained on", *losses),
    ]
    for label, first, second in rows:
        say(f"  {label:<48}{first:>12}{second:>14}")
    say(f"\nQuestion\n{wrapped(problem.question)}")
    for label, name in (("The base answers", "base"), ("The fine-tuned model answers", "sft")):
        record = next(world.read_lines(out / f"{name}_answers.jsonl"))
        say(f"\n{label}\n{wrapped(record['reply'])}")
    say(f"\nThe base, asked in its own way: {problem.story} …\n{wrapped(continued)}")
    say("\nSFT taught it to answer. Counting it had learnt before. Chat on:\n")
    chat = [whet(), "chat", str(out / "sft")]
    serve = [whet(), "serve", str(out / "base"), str(out / "sft")]  # side by side in the browser
    for words in (chat, [*chat, "--prompt", problem.question], serve):
        say(textwrap.indent(folded(words), "  "))
