"""The tiny world of `make demo`: people, shops and quantities, all of it drawn from a seed.

A `Problem` is one small event with two numbers. It can be told in two ways:

- as prose, which states the fact and what follows: "Mia has 14 apples. Mia buys 5 more apples at
  the market. 14+5=19. Now Mia has 19 apples." This, and lists of facts, is all the base reads.
- as a question with its answer, `<think>14+5=19</think><answer>19</answer>`. Pairs of these are
  all that fine-tuning trains.

What is held out, and proven by `check` from the finished texts:

- No test problem is told in the prose or asked in the pairs: nowhere do the same person, things,
  operation and numbers meet, in whatever wording.
- The base has read every sum and difference of the test, in other stories, and shows it before it
  has seen a single question: asked to go on with the test's stories it states the right number.
  So what SFT adds is the answering.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

SMALLEST, LARGEST = 2, 30
"""The numbers of the world. From 2 on every noun is a plural."""

NAMES = ("Mia", "Ana", "Zoe", "Ida", "Eva", "Nora", "Tom", "Ben", "Max", "Leo", "Sam", "Jack")
ITEMS = ("apples", "pears", "plums", "eggs", "cakes", "cups", "pens", "books", "coins", "balls")
SHOPS = ("market", "bakery", "farm", "corner shop", "toy shop", "book shop")

LIST_SHARE = 0.4
"""Share of the prose that is lists of facts instead of stories."""
FACTS_IN_A_LIST = 5

FACT = re.compile(r"(\d+)([+-])(\d+)=(\d+)")


@dataclass(frozen=True)
class Size:
    """How much the demo reads and trains: about three minutes on two cores up to SFT."""

    texts: int = 26_000
    pairs: int = 4_000
    test: int = 200
    width: int = 96
    layers: int = 3
    prompts: int = 2000  # from here on what the stages after SFT take
    preferences: int = 1200
    reward_steps: int = 100
    dpo_steps: int = 160
    grpo_steps: int = 240


@dataclass(frozen=True)
class Kind:
    """A kind of event: what happens, how prose goes on, and how one asks for the result."""

    operator: str
    story: str
    telling: str
    question: str


# How prose goes on after a story, and how one asks for the same.
NOW = "Now {name} has {c} {items}.", "How many {items} does {name} have now?"
TOGETHER = "Together they have {c} {items}.", "How many {items} do they have together?"
IN_ALL = "In all it sells {c} {items}.", "How many {items} does it sell in all?"
LEFT = "{name} has {c} {items} left.", "How many {items} does {name} have left?"
LEFT_THERE = "The {shop} has {c} {items} left.", "How many {items} does the {shop} have left?"
MORE = "{name} has {c} {items} more.", "How many {items} more does {name} have?"
KINDS = (
    Kind("+", "{name} has {a} {items}. {name} buys {b} more {items} at the {shop}.", *NOW),
    Kind("+", "{name} finds {a} {items}. {other} gives {name} {b} more {items}.", *NOW),
    Kind("+", "{name} has {a} {items} and {other} has {b} {items}.", *TOGETHER),
    Kind("+", "The {shop} sells {a} {items} to {name} and {b} {items} to {other}.", *IN_ALL),
    Kind("-", "{name} has {a} {items}. {name} gives {b} {items} to {other}.", *NOW),
    Kind("-", "{name} brings {a} {items} to the {shop} and sells {b} {items}.", *LEFT),
    Kind("-", "The {shop} has {a} {items}. {name} buys {b} {items}.", *LEFT_THERE),
    Kind("-", "{name} has {a} {items}, but {other} has only {b} {items}.", *MORE),
)


@dataclass(frozen=True)
class Problem:
    """One event of the world."""

    kind: Kind
    name: str
    other: str
    items: str
    shop: str
    a: int
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.kind.operator == "+" else self.a - self.b

    @property
    def fact(self) -> str:
        """For instance `14+5=19`."""
        return f"{self.a}{self.kind.operator}{self.b}={self.result}"

    @property
    def identity(self) -> "Identity":
        return identity_of(self.story, self.fact)

    @property
    def story(self) -> str:
        return self._fill(self.kind.story)

    @property
    def ending(self) -> str:
        """How prose goes on after the story."""
        return f"{self.fact}. {self._fill(self.kind.telling)}"

    @property
    def question(self) -> str:
        return f"{self.story} {self._fill(self.kind.question)}"

    @property
    def answer(self) -> str:
        return f"<think>{self.fact}</think><answer>{self.result}</answer>"

    def _fill(self, text: str) -> str:
        return text.format(
            name=self.name, other=self.other, items=self.items, shop=self.shop,
            a=self.a, b=self.b, c=self.result,
        )  # fmt: skip


@dataclass(frozen=True)
class World:
    """Everything that a run of the demo reads."""

    prose: list[str]
    pairs: list[Problem]
    test: list[Problem]


Identity = tuple[frozenset[str], str]
"""What makes two problems the same, in whatever words: who, what, and the number fact."""
Sum = tuple[int, int]
"""The two smaller numbers of a fact, the smaller first: (3, 5) for 3+5=8, 8-3=5 and their like."""


def make_world(seed: int, *, texts: int, pairs: int, test: int) -> World:
    """A world of so many prose texts, question-answer pairs and test problems.

    The same arguments give the same world on any machine.
    """
    rng = random.Random(seed)
    tested = list(islice(distinct(rng, set()), test))
    held_out = {problem.identity for problem in tested}
    prose_rng, pair_rng = random.Random(rng.random()), random.Random(rng.random())
    return World(
        prose=[_text(prose_rng, held_out) for _ in range(texts)],
        pairs=list(islice(distinct(pair_rng, held_out), pairs)),
        test=tested,
    )


def identity_of(text: str, stated: str) -> Identity:
    """The people and things that `text` names, and the first fact that `stated` states."""
    found = FACT.search(stated)
    assert found, f"no fact in: {stated}"
    return frozenset(re.findall(r"\w+", text)) & {*NAMES, *ITEMS}, found.group()


NUMBERS = range(SMALLEST, LARGEST + 1)
SUMS = [(x, y) for x in NUMBERS for y in NUMBERS if x <= y and x + y <= LARGEST]
"""Every pair of numbers whose sum is within the world's."""


def _draw(rng: random.Random) -> Problem:
    kind = rng.choice(KINDS)
    x, y = rng.sample(rng.choice(SUMS), 2)
    name, other = rng.sample(NAMES, 2)
    a, b = (x, y) if kind.operator == "+" else (x + y, y)
    return Problem(kind, name, other, rng.choice(ITEMS), rng.choice(SHOPS), a, b)


def distinct(rng: random.Random, excluded: set[Identity]) -> Iterator[Problem]:
    """Problems with identities that differ from each other and from the `excluded`."""
    seen = set(excluded)
    while True:
        problem = _draw(rng)
        if problem.identity not in seen:
            seen.add(problem.identity)
            yield problem


def _text(rng: random.Random, held_out: set[Identity]) -> str:
    """A story, or somebody's list of facts."""
    if rng.random() < LIST_SHARE:
        facts = [_draw(rng).fact for _ in range(FACTS_IN_A_LIST)]
        return f"{rng.choice(NAMES)} counts. " + " ".join(f"{fact}." for fact in facts)
    while (problem := _draw(rng)).identity in held_out:
        pass
    return f"{problem.story} {problem.ending}"


def write(world: World, folder: Path) -> None:
    """Write prose.jsonl, pairs.jsonl and test.jsonl, in formats that `whet` reads."""
    keys = ("question", "answer", "story", "ending")
    files = {
        "prose": ({"text": text} for text in world.prose),
        "pairs": ({"instruction": p.question, "response": p.answer} for p in world.pairs),
        "test": ({key: getattr(p, key) for key in keys} for p in world.test),
    }
    write_files(folder, files)


def write_files(folder: Path, files: Mapping[str, Iterable[dict[str, str]]]) -> None:
    """Write the records of each name as JSON lines into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def check(folder: Path) -> None:
    """Prove from the files alone what this module promises; AssertionError if it is not so."""
    prose = [record["text"] for record in read_lines(folder / "prose.jsonl")]
    pairs = list(read_lines(folder / "pairs.jsonl"))
    test = list(read_lines(folder / "test.jsonl"))
    asked, answered = [p["instruction"] for p in pairs], [p["response"] for p in pairs]
    for text in (*prose, *answered, *(t["answer"] for t in test)):
        assert _facts_are_true(text), f"a wrong or missing fact: {text}"
    tested = {identity_of(t["question"], t["answer"]) for t in test}
    assert len(tested) == len(test), "a test problem occurs twice"
    assert tested.isdisjoint(map(identity_of, asked, answered)), "a test problem is in the pairs"
    assert tested.isdisjoint(identity_of(text, text) for text in prose), "one is in the prose"
    assert sums_of(t["answer"] for t in test) <= sums_of(prose), "the prose lacks facts of the test"


def read_lines(path: Path) -> Iterator[dict[str, str]]:
    """The records of a JSON Lines file."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def _facts_are_true(text: str) -> bool:
    facts = FACT.findall(text)
    return bool(facts) and all(
        int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) for a, sign, b, c in facts
    )


def sums_of(texts: Iterable[str]) -> set[Sum]:
    """The sums that all facts stated in `texts` rest on."""
    found = set()
    for a, _, b, c in FACT.findall("\n".join(texts)):
        x, y, _ = sorted(map(int, (a, b, c)))
        found.add((x, y))
    return found
