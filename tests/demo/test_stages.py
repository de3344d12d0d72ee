"""The demo's later stages: what they read is right, and a few steps of all run through."""

import json
import random
from pathlib import Path

import pytest

from whet.demo import stages, world
from whet.demo.run import Config as DemoConfig
from whet.demo.run import main, run_all
from whet.demo.world import Size, identity_of

SMALL = Size(
    texts=300, pairs=60, test=4, width=16, layers=1, prompts=16, preferences=24,
    reward_steps=2, dpo_steps=2, grpo_steps=1,
)  # fmt: skip


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_the_stages_read(tmp_path: Path) -> None:
    made = world.make_world(0, texts=10, pairs=200, test=20)
    world.write(made, tmp_path)
    stages.write(made, 0, tmp_path, SMALL)
    tested = {problem.identity for problem in made.test}
    shown = read(tmp_path / "two_styles.jsonl")
    tags = sum(record["response"].startswith("<think>") for record in shown)
    assert 0.3 < tags / len(shown) < 0.7
    others = len(world.KINDS) - len(stages.SHOWN_KINDS)
    kinds = read(tmp_path / "two_kinds.jsonl")
    assert len(shown) == len(kinds) + others * stages.OF_OTHERS
    assert all(record in shown for record in kinds)
    for name in ("prompts", "styled"):
        for record in read(tmp_path / f"{name}.jsonl"):
            assert identity_of(record["question"], record["answer"]) not in tested
    assert len(read(tmp_path / "defects.jsonl")) == SMALL.preferences


def test_pairs_are_one_answer_in_both_styles(tmp_path: Path) -> None:
    shown = {"instruction": "a", "response": "<step>1+2=3</step><answer>3</answer>"}
    own = ("<think>2+2=5</think><answer>5</answer>", "<think>2+2=4<answer>4", "4")
    replies = [{"question": "b", "reply": text} for text in own]
    world.write_files(tmp_path, {"two_styles": [shown], "replies": replies})
    stages.write_pairs(tmp_path, tmp_path / "replies.jsonl")
    assert [tuple(record.values()) for record in read(tmp_path / "styles.jsonl")] == [
        ("a", "<think>1+2=3</think><answer>3</answer>", "<step>1+2=3</step><answer>3</answer>"),
        ("b", "<think>2+2=5</think><answer>5</answer>", "<step>2+2=5</step><answer>5</answer>"),
    ]


def test_each_defect_differs_from_the_answer() -> None:
    problem = world.make_world(0, texts=1, pairs=1, test=1).pairs[0]
    made = {stages.with_defect(problem, random.Random(i)) for i in range(40)}
    assert problem.answer not in made
    assert len(made) > 5


def test_all_stages_of_a_minimal_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("whet.demo.world.LARGEST", 12)
    monkeypatch.setattr("whet.demo.world.SUMS", [(2, 3), (4, 5)])
    summary = run_all(tmp_path / "demo", 0, SMALL)
    assert {"sft_accuracy", "grpo_accuracy", "dpo_tags", "reward_pair_accuracy"} <= summary.keys()
    assert (tmp_path / "demo" / "compare.html").is_file()
    assert "| grpo" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_later_stages_keep_their_promises(tmp_path: Path, seed: int) -> None:
    main(DemoConfig(out=tmp_path / "demo", all=True, seed=seed))
    found = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert 0.2 <= found["sft_accuracy"] <= 0.65  # 60 % of 1,200 others, as SFT ended
    assert found["reward_pair_accuracy"] >= 0.85
    assert 0.3 <= found["sft_tags"] <= 0.7
    assert found["dpo_tags"] >= 0.95
    assert found["dpo_accuracy"] >= found["sft_accuracy"] - 0.1
    assert found["grpo_accuracy"] >= found["sft_accuracy"] + 0.3
