"""`whet prepare` from files to rows, against encode_chat, line by line."""

import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import processes
from tests.tiny import chat as make_chat
from whet.chat.chat import add_chat_tokens, load_tokenizer
from whet.chat.encode import EncodeOptions, encode_chat
from whet.data import reader
from whet.data.account import totals
from whet.data.batches import get_sft_batch_iterator
from whet.data.formats import to_example
from whet.data.prepare import Config, prepare, prepare_text
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.flags.prepare import GIVEN

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of some 300 ids, with the control tokens of ChatML and the plain template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    chat, _ = add_chat_tokens(make_chat(), "chatml")
    chat.save(folder)
    (folder / "chat_template.jinja").write_text(make_chat().template.source)
    return folder


def conversations(n, seed=0, turns=3):
    rng = np.random.default_rng(seed)

    def say():
        return " ".join(rng.choice(WORDS, rng.integers(1, 9)))

    records = []
    for i in range(n):
        messages = []
        for _ in range(rng.integers(1, turns + 1)):
            messages += [
                {"role": "user", "content": f"{i} {say()}"},
                {"role": "assistant", "content": say()},
            ]
        records.append({"messages": messages})
    return records


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def run(folder, tmp_path, data, **options):
    """Prepare `data`; returns the store and the account of each source."""
    options = {"context_length": 96, "out": str(tmp_path / "out" / "a.h5"), **options}
    config = Config(data=tuple(data), tokenizer=str(folder), **options)
    accounts = prepare(config, quiet=True)
    return PackedStore(config.out), accounts


def run_text(folder, data, context_length, out, **options):
    """Prepare plain text; returns the account of each source."""
    config = Config(
        data=tuple(data), tokenizer=GIVEN, context_length=context_length, out=str(out), **options
    )
    return prepare_text(config, load_tokenizer(folder), quiet=True)


def documents(store):
    """(source, line, part) -> (ids, mask) as they stand in the rows."""
    found = {}
    for document in store.documents:
        rows = store.rows([document["row"]])
        place = slice(document["start"], document["start"] + document["length"])
        assert len(set(rows.segment_ids[0, place].tolist())) == 1
        key = tuple(int(document[name]) for name in ("source", "line", "part"))
        found.setdefault(key, []).append((rows.tokens[0, place], rows.loss_mask[0, place]))
    return found


def check_account(store, accounts):
    """The account against the file itself, counted anew."""
    for number, account in enumerate(accounts):
        a = account
        assert a.tokens == a.trained + a.context + a.truncated + a.dropped
        assert a.dropped == sum(a.dropped_tokens.values())
        own = store.documents[store.documents["source"] == number]
        assert a.trained == own["trained"].sum()
        assert a.trained + a.context == own["length"].sum()
        assert a.examples == len(own)
    rows = store.rows(range(len(store)))
    assert totals(accounts).trained == (rows.loss_mask != 0).sum()
    for row, segments in enumerate(rows.segment_ids):
        numbers = [s for s, _ in itertools.groupby(segments.tolist()) if s]
        assert numbers == list(range(1, len(store.documents_of([row])) + 1))
    filled = (rows.segment_ids > 0).sum()
    assert totals(accounts).trained + totals(accounts).context == filled
    assert store.attrs["account"]["total"]["tokens"] == totals(accounts).tokens
    batches = get_sft_batch_iterator(store, len(store), epochs=1)
    assert sum(b.total for b in batches) == store.loss_tokens.sum() == rows.loss_mask.sum()


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_rows_hold_what_encode_chat_says(folder, tmp_path, template):
    records = conversations(60)
    data = write(tmp_path / "a.jsonl", records)
    store, accounts = run(folder, tmp_path, [data], chat_template=template, context_length=256)
    chat = load_tokenizer(folder, template)
    found = documents(store)
    assert len(found) == 60
    for line, record in enumerate(records, 1):
        expected = encode_chat(to_example(record), chat)
        ((ids, mask),) = found[0, line, 0]
        assert ids.tolist() == expected.ids.tolist()
        assert mask.tolist() == expected.loss_mask.tolist()
    check_account(store, accounts)
    assert store.attrs["tokenizer_hash"] == chat.tokenizer.hash
    assert store.attrs["template_hash"] == chat.template.hash
    assert store.attrs["vocab_size"] == chat.tokenizer.vocab_size
    assert store.attrs["sources"] == [data]
    assert store.attrs["settings"]["chat_template"] == template


def test_any_number_of_workers_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 3000)
    data = [write(tmp_path / "a.jsonl", conversations(80)), write(tmp_path / "b.jsonl", [])]
    data[1] = write(tmp_path / "b.jsonl", conversations(80, seed=1)) + ":0.5"
    out = tmp_path / "out" / "a.h5"
    contents = []
    for workers in (0, 1, 2):
        dev = {"dev_out": str(tmp_path / "out" / "dev.h5"), "dev_fraction": 0.1}
        run(folder, tmp_path, data, workers=workers, **dev)
        contents.append((out.read_bytes(), (tmp_path / "out" / "dev.h5").read_bytes()))
    assert contents[0] == contents[1] == contents[2]
    assert sorted(p.name for p in out.parent.iterdir()) == ["a.h5", "dev.h5"]


def test_exact_duplicates_are_removed_across_files_and_formats(folder, tmp_path):
    once = {"prompt": "one two", "completion": "three"}
    again = {"instruction": "one two", "output": "three"}
    other = {"prompt": "one two", "completion": "four"}
    data = [write(tmp_path / "a.jsonl", [once, other, once]), write(tmp_path / "b.jsonl", [again])]
    store, accounts = run(folder, tmp_path, data)
    assert sorted(documents(store)) == [(0, 1, 0), (0, 2, 0)]
    assert accounts[0].dropped_examples == {"duplicate": 1}
    assert accounts[1].dropped_examples == {"duplicate": 1}
    assert accounts[1].tokens == accounts[1].dropped > 0
    check_account(store, accounts)
    refusals = [json.loads(text) for text in store.texts("refusals")]
    assert [(r["kind"], r["line"]) for r in refusals] == [("duplicate", 3), ("duplicate", 1)]


def test_overlong_examples_are_dropped_truncated_or_told(folder, tmp_path):
    records = conversations(40, turns=6)
    data = [write(tmp_path / "a.jsonl", records)]
    whole, _ = run(folder, tmp_path, data, context_length=1024)
    full = documents(whole)
    long = {key for key, ((ids, _),) in full.items() if len(ids) > 96}
    assert 5 < len(long) < 40

    store, accounts = run(folder, tmp_path, data, overlong="drop")
    assert documents(store).keys() == full.keys() - long
    assert accounts[0].dropped_examples == {"overlong": len(long)}
    check_account(store, accounts)

    store, accounts = run(folder, tmp_path, data, overlong="truncate")
    kept = documents(store)
    for key in long & kept.keys():
        ((ids, mask),), ((all_ids, all_mask),) = kept[key], full[key]
        assert ids.tolist() == all_ids[: len(ids)].tolist()
        # It ends with a trained turn, and that turn's end is its end in the whole example.
        assert mask.tolist() == all_mask[: len(ids)].tolist()
        assert mask[-1] == 1
        assert all_mask[len(ids)] == 0
        rest = all_mask[len(ids) : 96]
        ends = np.flatnonzero((rest[:-1] == 1) & (rest[1:] == 0))
        assert len(ends) == 0  # no further turn would have fitted
    assert accounts[0].truncated > 0
    assert accounts[0].truncated_examples == len(long & kept.keys())
    check_account(store, accounts)

    with pytest.raises(UserError, match=f"{len(long)} examples are longer than a row"):
        run(folder, tmp_path, data, overlong="error")


def test_sources_are_mixed_by_weight(folder, tmp_path):
    data = [
        write(tmp_path / "a.jsonl", conversations(40)) + ":0.5",
        write(tmp_path / "b.jsonl", conversations(20, seed=1)) + ":3",
    ]
    store, accounts = run(folder, tmp_path, data, context_length=256)
    found = documents(store)
    assert sum(source == 0 for source, _, _ in found) == 20
    copies = [len(v) for (source, _, _), v in found.items() if source == 1]
    assert copies == [3] * 20
    assert accounts[0].dropped_examples == {"not_drawn": 20}
    assert accounts[1].examples == 60
    check_account(store, accounts)
    assert store.attrs["account"]["sources"][0]["weight"] == 0.5
    assert store.attrs["settings"]["data"] == data


def test_a_weight_is_exact_whatever_else_is_left_out(folder, tmp_path):
    """Half of each source, of what is neither a duplicate nor held out."""
    first = conversations(30)
    data = [
        write(tmp_path / "a.jsonl", first + first * 5) + ":0.5",
        write(tmp_path / "b.jsonl", conversations(50, seed=1)) + ":0.5",
    ]
    dev = {"dev_out": str(tmp_path / "dev.h5"), "dev_fraction": 0.25}
    store, accounts = run(folder, tmp_path, data, context_length=256, **dev)
    held_out = documents(PackedStore(tmp_path / "dev.h5"))
    assert len(held_out) == 20
    for source, distinct in enumerate((30, 50)):
        left = distinct - sum(place[0] == source for place in held_out)
        assert sum(place[0] == source for place in documents(store)) == round(left / 2)
        assert accounts[source].dropped_examples["not_drawn"] == left - round(left / 2)


def test_dev_and_training_share_no_conversation_and_no_opening(folder, tmp_path):
    records = conversations(100)
    tree = [
        {"messages": [*records[0]["messages"][:1], {"role": "assistant", "content": reply}]}
        for reply in WORDS
    ]
    data = write(tmp_path / "a.jsonl", [*records, *tree, *records[:20]])
    options = {"dev_out": str(tmp_path / "dev.h5"), "dev_fraction": 0.2, "context_length": 256}
    store, _ = run(folder, tmp_path, [data], **options)
    dev = PackedStore(tmp_path / "dev.h5")
    sides = [{line for _, line, _ in documents(s)} for s in (store, dev)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 110
    assert len(sides[1]) == 22
    openings = [
        {json.loads(line)["messages"][0]["content"] for line in lines_of(data, side)}
        for side in sides
    ]
    assert not openings[0] & openings[1]
    assert dev.texts("refusals") == []
    assert dev.attrs["account"]["total"]["trained"] == dev.loss_tokens.sum()


def test_dev_conversations_are_not_copied(folder, tmp_path):
    data = write(tmp_path / "a.jsonl", conversations(50)) + ":3"
    options = {"dev_out": str(tmp_path / "dev.h5"), "dev_fraction": 0.2, "context_length": 256}
    store, accounts = run(folder, tmp_path, [data], **options)
    copies = [
        [len(v) for v in documents(s).values()] for s in (store, PackedStore(tmp_path / "dev.h5"))
    ]
    assert copies == [[3] * 40, [1] * 10]
    check_account(store, accounts)


def lines_of(path, numbers):
    with open(path) as file:
        return [line for number, line in enumerate(file, 1) if number in numbers]


def test_decontamination(folder, tmp_path):
    records = conversations(10)
    questions = [{"question": records[3]["messages"][0]["content"].upper() + "?"}]
    data = write(tmp_path / "a.jsonl", records)
    test = write(tmp_path / "test.jsonl", questions)
    store, accounts = run(folder, tmp_path, [data], decontaminate=(test,), context_length=256)
    assert {line for _, line, _ in documents(store)} == set(range(1, 11)) - {4}
    (refusal,) = [json.loads(text) for text in store.texts("refusals")]
    assert refusal["kind"] == "contaminated"
    assert refusal["reason"] == f"{data}:4: shares a question with {test}:1"
    assert accounts[0].dropped_examples == {"contaminated": 1}
    check_account(store, accounts)


def test_weights_of_messages_reach_the_rows(folder, tmp_path):
    reply = {"role": "assistant", "content": "one two", "weight": 0.25}
    record = {"messages": [{"role": "user", "content": "three"}, reply]}
    store, _ = run(folder, tmp_path, [write(tmp_path / "a.jsonl", [record])])
    ((_ids, mask),) = documents(store)[0, 1, 0]
    assert set(mask.tolist()) == {0, 0.25}
    assert store.loss_tokens.tolist() == [0.25 * (mask > 0).sum()]


def test_a_reply_without_words_thoughts_and_calls_is_left_out(folder, tmp_path):
    def record(*replies):
        asked = {"role": "user", "content": "one"}
        turns = [(asked, {"role": "assistant", "content": "", **reply}) for reply in replies]
        return {"messages": [message for turn in turns for message in turn]}

    call = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    said = {"content": "two"}
    records = [
        record({}),
        record({"content": " \n"}, said),
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": ""}]},
        record({"weight": 0}, said),  # not trained
        record(call, said),  # a call alone is a reply
        record({"reasoning_content": "so"}),
        record(said),
    ]
    data = [write(tmp_path / "a.jsonl", records)]
    store, (account,) = run(folder, tmp_path, data, refused="drop")
    assert account.refused == {"empty_reply": 3}
    assert account.examples == 4
    reasons = [refusal["reason"] for refusal in store.refusals]
    assert "a.jsonl:2: message 2 (assistant): the reply is empty" in reasons[1]
    data = [write(tmp_path / "b.jsonl", records[:4])]
    _, (account,) = run(folder, tmp_path, data, train_on="last")  # needs no flag --refused
    assert account.refused == {"empty_reply": 2}  # in the second record the last one is not


def test_rewritten_conversations_become_parts_on_one_side(folder, tmp_path, capsys):
    """A template that strips earlier thinking: one example for each trained turn."""
    template = tmp_path / "strip.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: "
        "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}"
        "({{ m.reasoning_content }}){% endif %}{{ m.content }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    records = conversations(30, turns=2)
    for record in records:
        for message in record["messages"]:
            if message["role"] == "assistant":
                message["reasoning_content"] = "ten nine"
    data = write(tmp_path / "a.jsonl", records)
    store, accounts = run(
        folder, tmp_path, [data], chat_template=str(template), context_length=256,
        dev_out=str(tmp_path / "dev.h5"), dev_fraction=0.3,
    )  # fmt: skip
    chat = load_tokenizer(folder, str(template))
    both = {**documents(store), **documents(PackedStore(tmp_path / "dev.h5"))}
    for line, record in enumerate(records, 1):
        examples = encode_chat(to_example(record), chat, EncodeOptions()).examples
        assert len(examples) == len(record["messages"]) // 2
        for part, example in enumerate(examples):
            assert both[0, line, part][0][0].tolist() == example.ids.tolist()
    train_lines = {line for _, line, _ in documents(store)}
    dev_lines = {line for _, line, _ in documents(PackedStore(tmp_path / "dev.h5"))}
    assert not train_lines & dev_lines
    check_account(store, accounts)
    config = Config((data,), str(folder), out=str(tmp_path / "b.h5"), chat_template=str(template))
    prepare(config)
    more = sum(sum(map(len, ids)) - max(map(len, ids)) for ids in _ids_of(records, chat))
    assert f"{more:,} tokens more through such splits; --rewritten_turns last" in (
        capsys.readouterr().out
    )


def _ids_of(records, chat):
    for record in records:
        yield [example.ids for example in encode_chat(to_example(record), chat).examples]


def test_text_keeps_every_token(folder, tmp_path, monkeypatch):
    chat = load_tokenizer(folder)
    monkeypatch.setattr(reader, "PIECE_CHARS", 700)
    rng = np.random.default_rng(0)
    text = "\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(60))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"four five"))
    write(tmp_path / "c.jsonl", [{"text": "one two"}, {"ids": [5, 6, 7]}])
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt.gz", "c.jsonl")]
    accounts = run_text(folder, paths, 50, tmp_path / "t.h5")
    store = PackedStore(tmp_path / "t.h5")
    check_account(store, accounts)
    found = documents(store)
    pieces = [ids for key in sorted(found) if key[0] == 0 for ids, _ in found[key]]
    ids = np.concatenate(pieces)
    assert ids[-1] == chat.tokenizer.eos_id
    assert (ids == chat.tokenizer.eos_id).sum() == 1
    assert chat.tokenizer.decode(ids) == text
    assert max(map(len, pieces)) == 50
    assert chat.tokenizer.decode(found[1, 1, 0][0][0]) == "four five"
    assert found[2, 2, 0][0][0].tolist() == [5, 6, 7]
    for examples in found.values():
        for _, mask in examples:
            assert mask.tolist() == [0] + [1] * (len(mask) - 1)
    assert totals(accounts).dropped == totals(accounts).truncated == 0


def test_conversations_are_no_text(folder, tmp_path):
    data = write(tmp_path / "a.jsonl", conversations(1))
    with pytest.raises(UserError, match=r"a\.jsonl:1: is a conversation; pretraining reads"):
        run_text(folder, [data], 50, tmp_path / "t.h5")
    data = write(tmp_path / "b.jsonl", [None, [1], {"ids": "x", "mask": 1}])
    with pytest.raises(UserError, match="of 3 lines 3 cannot be read"):
        run_text(folder, [data], 50, tmp_path / "t.h5")


def test_nothing_left_to_train_on(folder, tmp_path):
    data = write(tmp_path / "a.jsonl", conversations(3))
    with pytest.raises(
        UserError, match=r"to train on: 3 overlong \(the shortest has \d+ tokens; see"
    ):
        run(folder, tmp_path, [data], context_length=5)
    with pytest.raises(UserError, match=r"--data: no record in .*empty.jsonl"):
        run(folder, tmp_path, [write(tmp_path / "empty.jsonl", [])])
    with pytest.raises(UserError, match=r"nothing of them fits whole: raise --context_length"):
        run(folder, tmp_path, [data], context_length=5, overlong="truncate")
    assert not (tmp_path / "out").exists()


def test_what_the_user_sees(folder, tmp_path, capsys):
    from whet.cli import main

    data = write(tmp_path / "a.jsonl", [*conversations(30), *conversations(2)])
    out = tmp_path / "a.h5"
    flags = ["--tokenizer", str(folder), "--out", str(out), "--context_length", "256"]
    assert main(["prepare", "--data", data, f"{data}:2", *flags]) == 0
    told = capsys.readouterr().out
    assert "source tokens" not in told
    about, header, _, first, second, total = told.splitlines()[:6]
    assert about.startswith(f"{out}: ")
    assert header.split() == [
        "source", "lines", "refused", "examples",
        "tokens", "trained", "context", "truncated", "dropped",
    ]  # fmt: skip
    assert first.split()[-8] == "32"
    assert second.split()[-1] == second.split()[-5] != "0"  # all of it are duplicates
    assert total.startswith("total")
    assert "34 examples left out: exact duplicates" in told
    assert "% filled" in told
    assert told.splitlines()[-2:] == [
        f"next: whet inspect {out}",
        f"      whet sft --model {folder} --data {out} --out runs/sft",
    ]


SWITCHED = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if not brief %}<think>{% endif %}{% endif -%}"""


def test_what_was_done_and_left_out_is_told(folder, tmp_path, capsys):
    from whet.cli import main

    records = conversations(9, turns=1)
    data = write(tmp_path / "a.jsonl", records)
    template = tmp_path / "t.jinja"
    template.write_text(SWITCHED)
    test = write(
        tmp_path / "test.jsonl", [{"question": r["messages"][0]["content"]} for r in records[:5]]
    )
    flags = ["--tokenizer", str(folder), "--out", str(tmp_path / "a.h5"), "--data", data]
    flags += ["--chat_template", str(template), "--decontaminate", test]
    assert main(["prepare", *flags]) == 2
    assert """--template_kwargs '{"brief": true}' encodes it""" in capsys.readouterr().err
    assert main(["prepare", *flags, "--template_kwargs", '{"brief": true}']) == 0
    told = capsys.readouterr().out
    recorded = PackedStore(tmp_path / "a.h5").attrs["chat"]
    assert "set brief = true" in recorded["template"]
    assert tuple(recorded["stop_ids"]) == load_tokenizer(folder, str(template)).stop_ids
    assert f"5 examples left out: they share a question with an evaluation file\n  {data}:1" in told
    assert told.count("shares a question with") == 3


def test_fields_that_nothing_reads_are_named(folder, tmp_path, capsys):
    from whet.cli import main

    records = conversations(4, turns=1)
    for n, record in enumerate(records):
        record |= {"id": n + 1, "empty": "", "tools": []}
        record["messages"][0] |= {"stamp": "t", "name": "x"}
        if n < 2:
            record["note"] = {"a": 1}
    records[3]["messages"][0]["content"] = "a <|im_end|> within"
    flags = ["--tokenizer", str(folder), "--out", str(tmp_path / "a.h5")]
    assert main(["prepare", "--data", write(tmp_path / "a.jsonl", records), *flags]) == 0
    told = capsys.readouterr().out
    assert "fields not used: id (4 rows), messages.stamp (4 rows), note (2 rows)\n" in told
    assert "encoded as plain text (--special_in_content allow: as control)" in told
    flags += ["--fields", "messages=dialogue"]
    assert main(["prepare", "--data", write(tmp_path / "a.jsonl", records), *flags]) == 2
    assert "--fields messages=dialogue: no record has a field dialogue" in capsys.readouterr().err


def test_more_places_than_the_model_has_positions(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    data = write(tmp_path / "a.jsonl", conversations(3))
    for config in ({"max_position_embeddings": 64}, {"text_config": {"n_positions": 64}}):
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="has 64 positions; take --context_length 64 or less"):
            run(model, tmp_path, [data], context_length=65)
        run(model, tmp_path, [data], context_length=64)


def test_a_turn_with_two_weights_is_not_cut(folder, tmp_path):
    """Where the weight changes within a turn of ready ids, its first part is no whole turn."""
    turn = {"ids": list(range(5, 17)), "mask": [0, 0, 0, 0, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]}
    first = {"ids": list(range(5, 17)), "mask": [0, 1, 1, 0.5, 0, 0, 1, 1, 1, 0.5, 0.5, 0.5]}
    data = [write(tmp_path / "a.jsonl", [turn, first])]
    store, accounts = run(folder, tmp_path, data, context_length=10, overlong="truncate")
    assert accounts[0].dropped_examples == {"overlong": 1}
    ((ids, mask),) = documents(store)[0, 2, 0]
    assert (ids.tolist(), mask.tolist()) == ([5, 6, 7, 8], [0, 1, 1, 0.5])


def test_a_long_text_is_one_line_of_the_account(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE_CHARS", 50)
    (tmp_path / "a.txt").write_text("".join(f"{n} two three four five\n" for n in range(30)))
    (account,) = run_text(folder, [str(tmp_path / "a.txt")], 32, tmp_path / "t.h5")
    assert account.lines == 1
    assert account.examples > 3


def test_padding_of_ids_is_no_text(folder, tmp_path):
    """For pretraining, too, where ids need no mask."""
    padded = {"input_ids": [9, 9, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}
    out = str(tmp_path / "t.h5")
    data = [write(tmp_path / "a.jsonl", [padded])]
    run_text(folder, data, 32, out)
    ((ids, mask),) = documents(PackedStore(out))[0, 1, 0]
    assert (ids.tolist(), mask.tolist()) == ([5, 6, 7], [0, 1, 1])


def test_refusals_of_one_reason_are_told_three_times(folder, tmp_path):
    lines = ['{"messages": []}'] * 30 + ["{"] * 2
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        run(folder, tmp_path, [str(data)])
    told = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in told[:3]] == [f"{data}:{n}" for n in (1, 2, 3)]
    assert told[3] == "27 further lines are like the last one"
    assert [line.split(": ")[0] for line in told[4:6]] == [f"{data}:{n}" for n in (31, 32)]
    assert told[6].startswith("of 32 lines 32 cannot be read")


def test_ctrl_c_leaves_no_process_and_no_file(folder, tmp_path):
    data = write(tmp_path / "a.jsonl", conversations(300) * 400)
    command = [
        sys.executable, "-m", "whet.cli", "prepare", "--data", data, "--workers", "2",
        "--tokenizer", str(folder), "--out", str(tmp_path / "out" / "a.h5"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    assert "Encoding" in process.stderr.readline(), "the workers are working"
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted; nothing was written" in output
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    deadline = time.monotonic() + 60  # multiprocessing's own helper sees the end a little later
    while is_running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(process.pid)


def is_running(group):
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_real_files_of_all_formats(shared_data, tmp_path):
    names = ["chat/alpaca_instructions.json", "chat/messages_oasst.jsonl", "gsm8k/test.jsonl"]
    names.append("chat/sharegpt_identity.json")
    data = [str(shared_data / name) for name in names]
    store, accounts = run(
        shared_data / "tokenizers" / "gpt2", tmp_path, data,
        context_length=1024, overlong="truncate",
    )  # fmt: skip
    check_account(store, accounts)
    filled = totals(accounts).trained + totals(accounts).context
    assert filled / (len(store) * 1024) > 0.995


def test_a_part_of_one_text_is_held_out(folder, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.txt"
    path.write_text("\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(200)))
    options = {"dev_out": str(tmp_path / "dev.h5"), "dev_fraction": 0.1}
    run_text(folder, [str(path)], 50, tmp_path / "t.h5", **options)
    train, dev = PackedStore(tmp_path / "t.h5"), PackedStore(tmp_path / "dev.h5")
    parts = [{int(part) for part in store.documents["part"]} for store in (train, dev)]
    assert not parts[0] & parts[1]
    n = len(parts[0] | parts[1])
    assert parts[0] | parts[1] == set(range(n))
    assert len(parts[1]) == round(0.1 * n)


def test_where_all_lines_are_refused_one_is_shown(folder, tmp_path):
    files = (write(tmp_path / "a.jsonl", [{"prompt": "one"}] * 3),)
    config = Config(
        data=files, tokenizer=str(folder), out=str(tmp_path / "a.h5"), context_length=64,
        refused="drop",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"on: 3 lines refused, such as .*a.jsonl:1: fields"):
        prepare(config, quiet=True)


def test_a_dev_part_of_which_nothing_fits_is_refused(folder, tmp_path):
    words = [f"{' '.join(WORDS)} " * 20] * 9 + ["one"]
    data = [{"prompt": f"{i} {text}", "completion": "two"} for i, text in enumerate(words)]
    options = {"dev_out": str(tmp_path / "dev.h5"), "dev_fraction": 0.1, "context_length": 64}
    out = str(tmp_path / "a.h5")
    files = (write(tmp_path / "a.jsonl", data),)
    with pytest.raises(UserError, match=r"nothing is left for --dev_out .*9 overlong"):
        prepare(Config(data=files, tokenizer=str(folder), out=out, **options), quiet=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("limit", "reason"),
    [(20_000, "cannot be written"), (300_000, "no space")],
    ids=["tokens", "rows"],
)
def test_a_full_disk_leaves_nothing(folder, tmp_path, limit, reason):
    """It is full while the tokens wait, or only when the rows are written."""
    data = write(tmp_path / "a.jsonl", conversations(1000))
    out = tmp_path / "out" / "a.h5"
    words = ["prepare", "--data", data, "--tokenizer", str(folder), "--out", str(out)]
    words += ["--context_length", "64", "--workers", "0"]
    process = processes.start([words], log=tmp_path / "log", file_limit=limit)
    assert processes.wait([process], [tmp_path / "log"], 60) == [2]
    told = (tmp_path / "log").read_text()
    assert reason in told
    assert "Traceback" not in told
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
