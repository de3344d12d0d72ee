"""The whole path on slices of real data: the commands of the README, one after the other.

Real text -> base -> GSM8K and instructions -> packed rows -> SFT -> dev loss, accuracy, chat. The
models are far too small to be good; what is held is that every command does its part, that the loss
falls, and that the files fit together.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from whet.cli import main
from whet.data.store import PackedStore


@pytest.fixture(scope="module")
def world(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with slices of real data, a base pretrained on them, and packed rows."""
    folder = tmp_path_factory.mktemp("real")
    text = (shared_data / "text" / "tinyshakespeare.txt").read_text()[:30_000]
    (folder / "text.txt").write_text(text)
    for name, count in (("train", 40), ("test", 4)):
        lines = (shared_data / "gsm8k" / f"{name}.jsonl").read_text().splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    alpaca_file = shared_data / "chat" / "alpaca_instructions.json"
    alpaca = json.loads(alpaca_file.read_text())[:40]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))

    tokenizer = str(shared_data / "tokenizers" / "gpt2")
    run(folder, "pretrain", "--data", "text.txt", "--tokenizer", tokenizer, "--out", "runs/base",
        "--context_length", "256", "--width", "32", "--layers", "2", "--heads", "2",
        "--batch_size", "8", "--max_steps", "6", "--lr", "1e-2", "--samples", "0")  # fmt: skip
    run(folder, "prepare", "--data", "train.jsonl", "alpaca.json", "--tokenizer", "runs/base",
        "--context_length", "256", "--out", "data/sft_packed.h5", "--dev_fraction", "0.1",
        "--dev_out", "data/sft_dev_packed.h5", "--workers", "0")  # fmt: skip
    return folder


def run(folder: Path, *words: str) -> None:
    """`whet WORDS` in `folder`, in this process; must exit with 0."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(words) == 0
    finally:
        os.chdir(before)


def losses(run_folder: Path, name: str) -> list[float]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


def test_the_packed_file_accounts_for_every_token(world: Path) -> None:
    for path in (world / "data" / "sft_packed.h5", world / "data" / "sft_dev_packed.h5"):
        store = PackedStore(path)
        rows = store.rows(np.arange(len(store)))
        assert (rows.segment_ids != 0).sum() == store.documents["length"].sum()
        assert rows.loss_mask.sum() == store.documents["trained"].sum() > 0


def test_pretraining_learns(world: Path) -> None:
    train = losses(world / "runs" / "base", "train_loss")
    assert train[0] == pytest.approx(np.log(50257), abs=0.3)
    assert train[-1] < train[0] - 0.5


def test_sft_eval_and_chat(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(world, "sft", "--model", "runs/base", "--data", "data/sft_packed.h5",
        "--dev", "data/sft_dev_packed.h5", "--out", "runs/sft", "--lr", "1e-3", "--epochs", "2",
        "--batch_size", "16", "--samples", "0", "--out_ckpt", "runs/sft.pt")  # fmt: skip
    dev = losses(world / "runs" / "sft", "dev_loss")
    assert dev[-1] < dev[0]
    run(world, "eval", "runs/sft", "--dev", "data/sft_dev_packed.h5", "--json", "dev.json")
    found = json.loads((world / "dev.json").read_text())
    assert found["dev_loss"] == pytest.approx(dev[-1], rel=2e-2)  # bf16 against float32
    run(world, "eval", "runs/sft", "--gsm8k", "test.jsonl", "--limit", "2", "--json", "gsm.json")
    found = json.loads((world / "gsm.json").read_text())
    assert found["n"] == 2
    assert 0 <= found["accuracy"] <= 1
    capsys.readouterr()
    run(world, "chat", "runs/sft", "--prompt", "How much is 2 + 3?", "--max_new_tokens", "4")
    assert (world / "runs" / "sft.pt").stat().st_size > 1_000_000
    assert json.loads((world / "runs" / "sft" / "whet.json").read_text())["base"] == "runs/base"


def test_overfitting_a_few_rows(world: Path) -> None:
    """The mechanics check: if the loss on 8 rows does not fall to 0, something is wired wrongly.

    With a tokenizer of its own, as the demo has: 512 ids make the check quick.
    """
    run(world, "pretrain", "--data", "text.txt", "--vocab_size", "512", "--out", "runs/tiny",
        "--context_length", "256", "--width", "64", "--layers", "2", "--heads", "2",
        "--max_steps", "1", "--samples", "0", "--eval_every", "0", "--save_every", "0")  # fmt: skip
    run(world, "prepare", "--data", "alpaca.json", "--tokenizer", "runs/tiny",
        "--context_length", "256", "--out", "data/tiny.h5", "--workers", "0")  # fmt: skip
    run(world, "sft", "--model", "runs/tiny", "--data", "data/tiny.h5", "--out", "runs/over",
        "--overfit_rows", "8", "--batch_size", "8", "--micro_batch_size", "8", "--lr", "1e-2",
        "--epochs", "300", "--samples", "0", "--eval_every", "0", "--save_every", "0")  # fmt: skip
    train = losses(world / "runs" / "over", "train_loss")
    assert train[0] == pytest.approx(np.log(512), abs=0.5)
    assert len(train) <= 300
    assert train[-1] < 0.1


def test_torchrun_with_two_processes_gives_the_same_losses(world: Path) -> None:
    """`torchrun scripts/train_sft.py` on CPU; its default places are the README's."""
    flags = ["--lr", "1e-3", "--epochs", "1", "--batch_size", "16", "--samples", "0"]
    flags += [
        "--precision",
        "float32",
        "--max_steps",
        "2",
        "--eval_every",
        "0",
        "--save_every",
        "0",
    ]
    script = str(REPOSITORY / "scripts" / "train_sft.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    alone = [sys.executable, script, *flags, "--out", "runs/alone"]
    two = [*torchrun, "--nproc_per_node=2", script, *flags, "--out", "runs/two"]
    for words in (alone, two):
        done = subprocess.run(words, cwd=world, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, other = (losses(world / "runs" / name, "train_loss") for name in ("alone", "two"))
    assert one == pytest.approx(other, rel=1e-5)
