"""Pairs and labelled replies: from every shape that data sets have to rows of whole pairs."""

import json
import math

import numpy as np
import pytest

from tests.tiny import chat as make_chat
from whet.chat.chat import add_chat_tokens, load_tokenizer
from whet.chat.encode import encode_chat
from whet.cli import main
from whet.data.batches import per_document, read_batch
from whet.data.formats import detect_format, to_example
from whet.data.prepare import Config, prepare
from whet.data.store import PackedStore
from whet.errors import UserError

SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "one plus two"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("three", "seven eight"))
HH = "\n\nHuman: one plus two\n\nAssistant: ok\n\nHuman: and\n\nAssistant:"
PAIR = {"prompt": "one plus two", "chosen": "three", "rejected": "seven eight"}

SHAPES = {
    "explicit text": PAIR,
    "explicit messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "explicit one message": {"prompt": "one plus two", "chosen": GOOD, "rejected": BAD},
    "implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "UltraFeedback": {
        "prompt": "one plus two", "prompt_id": "x", "messages": [USER, GOOD],
        "chosen": [USER, GOOD], "rejected": [USER, BAD],
    },
    "question": {"question": "one plus two", "chosen": "three", "rejected": "seven eight"},
    "instruction": {
        "instruction": "one plus two", "input": "", "chosen": "three", "rejected": "seven eight",
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "one plus two"}],
        "chosen": {"from": "gpt", "value": "three"},
        "rejected": {"from": "gpt", "value": "seven eight"},
    },
    "messages and one message": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "messages as JSON texts": {
        "chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD]),
    },
    "HH": {
        "chosen": "\n\nHuman: one plus two\n\nAssistant: three",
        "rejected": "\n\nHuman: one plus two\n\nAssistant: seven eight",
    },
    "HH with its prompt": {
        "prompt": "\n\nHuman: one plus two\n\nAssistant:",
        "chosen": "three", "rejected": "seven eight",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    add_chat_tokens(make_chat(), "chatml")[0].save(folder)
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def run(folder, tmp_path, records, **options):
    options = {"context_length": 64, "out": str(tmp_path / "a.h5"), "refused": "drop", **options}
    data = (write(tmp_path / "a.jsonl", records),)
    (account,) = prepare(Config(data=data, tokenizer=str(folder), **options), quiet=True)
    return PackedStore(options["out"], ["preferences", "labels"]), account


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_pair(shape):
    record = SHAPES[shape]
    assert detect_format(record) == "preferences"
    pair = to_example(record)
    assert [side.messages for side in pair.sides] == [[USER, GOOD], [USER, BAD]]
    assert all(side.weights == [None, None] for side in pair.sides)
    assert set(pair.extra) <= {"prompt_id"}
    assert math.isnan(pair.margin)


def test_what_was_said_before_is_not_trained():
    pair = to_example({"chosen": HH + " sum", "rejected": HH + " six"})
    assert [m["content"] for m in pair.sides[0].messages] == ["one plus two", "ok", "and", "sum"]
    assert pair.sides[1].weights == [None, 0.0, None, None]
    record = {**PAIR, "system": "S", "score_chosen": 8, "score_rejected": 6.5}
    pair = to_example(record)
    assert pair.sides[0].messages[0] == {"role": "system", "content": "S"}
    assert (pair.margin, pair.scores) == (1.5, (8, 6.5))
    assert to_example({**record, "margin": 0.25}).margin == 0.25
    functions = to_example({**PAIR, "functions": [{"name": "f", "parameters": {}}]})
    assert [side.tools[0]["function"]["name"] for side in functions.sides] == ["f", "f"]


def test_what_stands_beside_a_pair_is_read_as_beside_messages():
    tool = {"name": "f", "parameters": {}}
    called = {"type": "function", "function": tool}
    for key in ("tools", "functions", "tool_defs"):
        pair = to_example({**PAIR, key: [tool if key == "functions" else called]})
        assert [side.tools for side in pair.sides] == [[called], [called]]
        assert pair.extra == {}
    system = {"role": "system", "content": "S"}
    with_system = {"chosen": [system, USER, GOOD], "rejected": [system, USER, BAD]}
    assert to_example({**with_system, "system": "S"}).sides[0].messages == [system, USER, GOOD]
    with pytest.raises(UserError, match="has a field system and a system turn"):
        to_example({**with_system, "system": "T"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": None}, "has no prompt; name the field of the question with --fields"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, BAD]}, "in message 1, wh"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "differ in message 2, which is no reply"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "do not begin with"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": [SYSTEM, USER], "system": "other"}, "has a field system and a system turn"),
        ({"margin": "much"}, "margin must be a finite number"),
        ({"chosen": 7}, "chosen must be a text or a list of messages"),
        ({"chosen": [7]}, "chosen 1: expected an object with role and content"),
        ({"chosen": [{"content": "x"}]}, "chosen 1: expected an object with role and content"),
        (
            {"prompt": None, "instruction": [SYSTEM, USER], "input": "x"},
            "instruction must be a text, got",
        ),
    ],
)
def test_what_is_no_pair_is_refused(change, told):
    with pytest.raises(UserError, match=told):
        to_example({**PAIR, **change}, source="a.jsonl", line=3)


def test_pairs_stand_side_by_side_and_whole(folder, tmp_path):
    rng = np.random.default_rng(0)
    words = ["one", "two", "three", "four", "five", "six"]

    def say(n):
        return " ".join(rng.choice(words, n))

    records = [
        {"prompt": f"{i} {say(3)}", "chosen": say(rng.integers(1, 12)), "margin": i,
         "rejected": "seven " + say(rng.integers(1, 12))}
        for i in range(60)
    ]  # fmt: skip
    records += [
        {**PAIR, "rejected": "three"},  # equal sides
        {**PAIR, "chosen": " \n"},  # empty
        {**PAIR, "prompt": say(60)},  # longer than a row with both sides
    ]
    store, account = run(folder, tmp_path, records, refused="error")
    assert account.refused == {"equal_sides": 1, "empty_reply": 1}
    n_long = account.dropped_examples["overlong"]
    assert n_long >= 2
    assert n_long % 2 == 0
    assert account.tokens == account.trained + account.context + account.dropped
    assert account.dropped == account.dropped_tokens["overlong"]
    chat = load_tokenizer(folder)
    documents = store.documents
    assert len(documents) == 120 - n_long + 2
    margins = store.values("margins", 2)
    for k in range(len(documents) // 2):
        chosen, rejected = documents[2 * k], documents[2 * k + 1]
        line = int(chosen["line"])
        assert (chosen["row"], line) == (rejected["row"], rejected["line"])
        assert rejected["start"] == chosen["start"] + chosen["length"]
        assert (chosen["part"], rejected["part"]) == (0, 1)
        assert margins[k] == records[line - 1]["margin"]
        row = store.rows([chosen["row"]])
        for entry, side in zip(
            (chosen, rejected), to_example(records[line - 1]).sides, strict=True
        ):
            place = slice(entry["start"], entry["start"] + entry["length"])
            expected = encode_chat(side, chat)
            assert row.tokens[0, place].tolist() == expected.ids.tolist()
            assert row.loss_mask[0, place].tolist() == expected.loss_mask.tolist()
            assert row.segment_ids[0, place][0] % 2 == (entry["part"] == 0)
    batch = read_batch(store, np.arange(len(store)), total=1.0)
    trained = per_document((batch.weight > 0).float(), batch.segments)
    assert ((trained[:, 1::2] > 0) == (batch.extra["pairs"] > 0)).all()
    assert batch.extra["pairs"].sum() == len(documents) / 2
    refusals = {r["kind"]: r["reason"] for r in store.refusals}
    assert refusals["equal_sides"].endswith("chosen and rejected are the same")
    assert "tokens, and a row has 64" in refusals["overlong"]


def test_another_prompt_for_the_rejected_reply_is_refused(folder, tmp_path):
    template = tmp_path / "odd.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% if messages|length > 1 and 'seven' in messages[1].content %}!{% endif %}:"
        "{% else %}{{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
    )
    other = {**PAIR, "rejected": "eight"}
    store, account = run(folder, tmp_path, [PAIR, other], chat_template=str(template))
    assert account.examples == 2
    assert len(account.refused) == 1
    assert store.documents["line"].tolist() == [2, 2]


def test_mixture_dev_part_and_copies_keep_pairs_together(folder, tmp_path):
    records = [{**PAIR, "prompt": f"{i} plus"} for i in range(20)]
    data = (write(tmp_path / "a.jsonl", records) + ":3",)
    paths = {"out": str(tmp_path / "a.h5"), "dev_out": str(tmp_path / "d.h5")}
    prepare(Config(data=data, tokenizer=str(folder), dev_fraction=0.25, **paths), quiet=True)
    for path, n in ((paths["out"], 45), (paths["dev_out"], 5)):
        store = PackedStore(path, ["preferences"])
        assert len(store.documents) == 2 * n
        assert store.documents["part"].tolist() == [0, 1] * n


def test_labels(folder, tmp_path):
    records = [
        {"prompt": "one", "completion": "two", "label": True},
        {"prompt": [USER, GOOD, USER], "completion": [BAD], "label": False},
        {"messages": [USER, GOOD, USER, BAD], "kto_tag": True},
        {"prompt": "one", "completion": "", "label": True},
    ]
    store, account = run(folder, tmp_path, records)
    assert store.kind == "labels"
    assert account.refused == {"datum": 1}  # an empty completion cannot be read, as ever
    labels = store.values("labels", 1)
    lines = {int(d["line"]): float(v) for d, v in zip(store.documents, labels, strict=True)}
    assert lines == {1: 1, 2: 0, 3: 1}
    for entry in store.documents:  # only the last reply is trained
        mask = store.rows([entry["row"]]).loss_mask[0]
        mask = mask[entry["start"] : entry["start"] + entry["length"]]
        assert np.count_nonzero(np.diff(mask) > 0) == 1
    record = {"prompt": "a", "completion": "b"}
    assert detect_format(record) == "prompt_completion"
    for label in (1, 0.0, "false", "True", False):
        assert to_example({**record, "label": label}).scores == (label in (1, "True"),)
    wrong = {"good": '"good"', 0.5: "0.5", None: "null", "": '""', (): r"\[\]"}
    for label, given in wrong.items():
        expected = f"a.jsonl:3: label is {given}; expected true or false, or 1 or 0"
        with pytest.raises(UserError, match=expected):
            to_example({**record, "label": label}, None, "a.jsonl", 3)
    messages = [USER, BAD]
    topic = {"messages": messages, "label": "sport"}  # some label, as classified texts have one
    assert detect_format(topic) == "messages"
    assert to_example({"messages": messages, "label": False}).scores == (0.0,)
    for more in ({}, {"label": None}, {"label": "true"}):
        assert to_example({"messages": messages, "kto_tag": "true", **more}).scores == (1.0,)
    with pytest.raises(UserError, match="label and kto_tag differ"):
        to_example({"messages": messages, "kto_tag": "true", "label": False})
    with pytest.raises(UserError, match=r"label needs a conversation .* --fields label= leaves"):
        to_example({"text": "a", "label": True})


def test_kinds_do_not_mix_and_sft_refuses_them(folder, tmp_path, capsys):
    text = {"prompt": "one", "completion": "two"}
    with pytest.raises(UserError, match="a packed file holds one kind") as error:
        run(folder, tmp_path, [text, PAIR])
    assert f"{tmp_path}/a.jsonl:2 is of preferences" in str(error.value)
    run(folder, tmp_path, [PAIR])
    words = ["sft", "--model", str(folder), "--data", str(tmp_path / "a.h5"), "--out", "x"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "holds pairs of a chosen and a rejected reply, which whet reward and whet dpo" in told
    assert main(["inspect", str(tmp_path / "a.h5")]) == 0
    assert "preferences" in capsys.readouterr().out
