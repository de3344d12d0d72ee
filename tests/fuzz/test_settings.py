"""TOML files and flags: read, or refused by name."""

import dataclasses

import pytest
from hypothesis import strategies as st

from tests.fuzz.harness import counts, damaged, fuzz
from whet.command_line import parse
from whet.config import read_toml, save
from whet.data import prepare
from whet.stages import sft

GOOD = """model = "base"
data = "train.h5"
out = "run"
lr = 1e-5
epochs = 2
lr_groups = ["re:^embed=0.1"]
precision = "bf16"
resume = true
lora_rank = 8
"""
VALUES = ["1", "-1", "1e400", "nan", "true", '""', '"x"', "[]", "[[1]]", "{a = 1}", "2025-01-01"]
VALUES += ['"../../x"', "[1, 'a']", "0x10", "9" * 5000, '"\\u0000"', "12:00:00", "'''a'''"]


@pytest.mark.parametrize("module", [sft, prepare], ids=["sft", "prepare"])
@counts(150, 10_000)
def test_keys_and_values(count, module, tmp_path):
    names = [field.name for field in dataclasses.fields(module.Config)] + ["nothing", "a.b", '""']
    line = st.tuples(st.sampled_from(names), st.sampled_from(VALUES)).map(" = ".join)
    texts = st.lists(line, max_size=4).map("\n".join)
    path = tmp_path / "some.toml"

    def read(text: str) -> None:
        path.write_text(text)
        read_toml(module.Config, path)

    tally = fuzz("TOML values", texts, read, count)
    assert min(tally["read"], tally["refused"]) > 0


@counts(300, 20_000)
def test_damaged(count, tmp_path):
    path = tmp_path / "some.toml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_toml(sft.Config, path)

    tally = fuzz("TOML files", damaged(GOOD.encode()), read, count)
    assert min(tally["read"], tally["refused"]) > count // 20


@counts(100, 2_000)
def test_flags(count, capsys):
    """Flags of the wrong type end in argparse's message and exit code 2."""
    names = [field.name for field in dataclasses.fields(sft.Config)]
    word = st.one_of(
        st.sampled_from(names).map("--{}".format), st.sampled_from(["1", "-1", "x", "=", "--"])
    )

    def read(words: list[str]) -> None:
        try:
            parse(sft.Config, ["--model", "m", "--data", "d", "--out", "o", *words], "sft")
        except SystemExit as end:
            pytest.fail(f"exit code {end.code}")

    fuzz("flags", st.lists(word, max_size=4), read, count)


@counts(200, 5_000)
def test_saved_settings_read_back(count, tmp_path):
    """Whatever stands in a text or number: `save` writes what `read_toml` reads."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    number = st.floats(allow_nan=False)
    values = st.fixed_dictionaries(
        {"train": text, "lora_targets": text, "lr": number, "seed": st.integers()}
    )

    def read(some: dict) -> None:
        config = sft.Config(model="m", data="d", out="o", **some)
        save(config, tmp_path / "saved.toml")
        again = read_toml(sft.Config, tmp_path / "saved.toml")
        assert {key: again[key] for key in some} == some

    assert fuzz("saved settings", values, read, count)["refused"] == 0
