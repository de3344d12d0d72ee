"""The conversation reader: damaged files, and records of every wrong shape."""

import gzip
import json
from contextlib import suppress

import pytest
from hypothesis import strategies as st

from tests import tiny
from tests.fuzz.harness import SCALARS, counts, damaged, fuzz, json_like
from whet.chat.encode import EncodeOptions, encode_many
from whet.data.formats import IDS_KEYS, MASK_KEYS, SIGNATURES, to_example
from whet.data.reader import parse, read_units
from whet.errors import UserError

KEYS = sorted({key for groups in SIGNATURES.values() for group in groups for key in group})
INNER = ["role", "content", "from", "value", "type", "text", "weight", "name", "input", "system"]
INNER += ["tool_calls", "function", "arguments", "tools", "documents", "reasoning_content", "id"]
INNER += ["history", "context", "tool_call_id", "thinking", *IDS_KEYS, *MASK_KEYS]

GOOD = [
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"prompt": "p", "completion": "c"},
    {"question": "1+1?", "answer": "two <<1+1=2>>2\n#### 2"},
    {"text": "plain"},
    {"ids": [1, 2, 3], "mask": [0, 1, 0.5]},
    {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "s"}]},
            {"role": "user", "content": "u", "name": "n"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "r",
                "weight": 0.5,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "content": "t", "tool_call_id": "1"},
            {"role": "assistant", "content": "end"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
]


@pytest.fixture(scope="module")
def chat():
    return tiny.chat()


@st.composite
def records(draw):
    """A good record with some value anywhere in it replaced, removed or renamed."""
    record = json.loads(json.dumps(draw(st.sampled_from(GOOD))))
    for _ in range(draw(st.integers(0, 3))):
        place = record
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            how = draw(st.sampled_from(["replace", "remove", "rename"]))
            if how == "replace":
                place[key] = draw(st.one_of(SCALARS, json_like(INNER)))
            elif how == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[draw(st.sampled_from(KEYS + INNER))] = place.pop(key)
            break
    return record


@counts(400, 20_000)
def test_records(count, chat):
    """What is read can be encoded or is refused; every refusal names file and line."""
    options = EncodeOptions()

    def read(record):
        try:
            datum = to_example(record, None, "some.jsonl", 7)
        except UserError as error:
            if "some.jsonl:7" not in str(error):
                pytest.fail(f"does not say where: {error}")
            raise
        encode_many([datum], chat, options)

    tally = fuzz("records", records(), read, count)
    assert min(tally["read"], tally["refused"]) > count // 20


@counts(200, 20_000)
def test_shapes(count):
    shape = st.one_of(json_like(KEYS + INNER), st.dictionaries(st.sampled_from(KEYS), SCALARS))
    tally = fuzz("shapes", shape, lambda r: to_example(r, None, "some.jsonl", 7), count)
    assert tally["refused"] > count // 5


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".jsonl.gz"])
@counts(100, 5_000)
def test_files(count, suffix, tmp_path):
    """Damaged files, line by line: what cannot be parsed is one refusal, the rest is read."""
    lines = "\n".join(json.dumps(record) for record in GOOD).encode()
    whole = json.dumps(GOOD).encode() if suffix == ".json" else lines
    path = tmp_path / f"data{suffix}"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        for unit in read_units(str(path)):
            with suppress(UserError):
                to_example(parse(unit), None, str(path), unit.line)

    packed = gzip.compress(whole) if suffix.endswith(".gz") else whole
    fuzz(f"files {suffix}", damaged(packed), read, count)


def test_deep_and_huge(tmp_path):
    """What Python's own parser stumbles over."""
    path = tmp_path / "deep.jsonl"
    lines = ['{"text": ' + "[" * 100_000, '{"text": ' + "9" * 5000]
    lines += ['{"messages": ' + "[" * 900 + "]" * 900 + "}"]
    lines += ['{"ids": [1' + "0" * 400 + '], "mask": [1]}']
    call = {"name": "f", "arguments": "[" * 100_000}
    lines += [json.dumps({"messages": [{"role": "assistant", "tool_calls": [call]}]})]
    path.write_text("\n".join(lines))
    for unit in read_units(str(path)):
        with pytest.raises(UserError):
            to_example(parse(unit), None, str(path), unit.line)
