"""The tiny world: the same for the same seed, true, and nothing of the test in the training."""

import json
from pathlib import Path

import pytest

from whet.demo import world
from whet.evaluate.answers import extract_answer, same_number


@pytest.fixture(scope="module")
def made() -> world.World:
    return world.make_world(0, texts=6000, pairs=1000, test=100)


def test_the_same_seed_gives_the_same_world(made: world.World) -> None:
    assert world.make_world(0, texts=6000, pairs=1000, test=100) == made
    assert world.make_world(1, texts=6000, pairs=1000, test=100) != made


def test_answers_are_right_by_the_checker_of_the_evaluation(made: world.World) -> None:
    for problem in (*made.pairs, *made.test):
        expected = problem.a + problem.b if problem.kind.operator == "+" else problem.a - problem.b
        assert same_number(extract_answer(problem.answer), str(expected))
        assert not same_number(extract_answer(problem.answer), str(expected + 1))
        assert 2 <= expected <= world.LARGEST


def test_no_test_problem_is_in_the_training(made: world.World) -> None:
    tested = {problem.identity for problem in made.test}
    assert len(tested) == 100
    assert not tested & {problem.identity for problem in made.pairs}
    assert not tested & {world.identity_of(text, text) for text in made.prose}


def test_the_check_of_the_files_passes_and_notices_each_leak(
    made: world.World, tmp_path: Path
) -> None:
    world.write(made, tmp_path)
    world.check(tmp_path)
    problem = made.test[7]
    leaks = {
        "prose.jsonl": {"text": f"{problem.story} {problem.ending}"},
        "pairs.jsonl": {"prompt": problem.question, "completion": problem.answer},
    }
    pair_keys = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    for name, leak in leaks.items():
        whole = (tmp_path / name).read_text()
        record = leak if name == "prose.jsonl" else dict(zip(pair_keys, leak.values(), strict=True))
        (tmp_path / name).write_text(whole + json.dumps(record) + "\n")
        with pytest.raises(AssertionError, match="in the p"):
            world.check(tmp_path)
        (tmp_path / name).write_text(whole)
    wrong = {"text": "Mia counts. 2+2=5."}
    whole = (tmp_path / "prose.jsonl").read_text()
    (tmp_path / "prose.jsonl").write_text(whole + json.dumps(wrong) + "\n")
    with pytest.raises(AssertionError, match="wrong or missing fact"):
        world.check(tmp_path)
