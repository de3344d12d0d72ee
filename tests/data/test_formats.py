import json
from collections import Counter

import pytest

from whet.chat.conversation import Conversation, Origin, RawText, Tokenised
from whet.data.formats import FIELDS, FORMATS, SIGNATURES, detect_format, to_example
from whet.data.record import read_fields, renamed
from whet.errors import UserError

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def turns(record, **options):
    """(role, content) of each message that `record` becomes."""
    datum = to_example(record, **options)
    assert isinstance(datum, Conversation)
    return [(m["role"], m["content"]) for m in datum.messages]


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("messages", {"messages": HELLO, "prompt": "x", "text": "y"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}]}),
        ("alpaca", {"instruction": "a", "input": "", "output": "b", "text": "whole"}),
        ("dolly", {"instruction": "a", "context": "", "response": "b", "category": "c"}),
        ("prompt_completion", {"prompt": "a", "completion": "b"}),
        ("gsm8k", {"question": "a", "answer": "b #### 1"}),
        ("text", {"text": "a", "meta": {}}),
        ("tokenised", {"input_ids": [1], "labels": [1]}),
    ],
)
def test_formats_are_recognised_by_their_fields(name, record):
    assert detect_format(record) == name


def test_alpaca_and_dolly():
    asked = [("user", "Translate\n\nHallo"), ("assistant", "Hello")]
    assert turns({"instruction": "Translate", "input": "Hallo", "output": "Hello"}) == asked
    assert turns({"instruction": "Translate", "context": "Hallo", "response": "Hello"}) == asked
    record = {"instruction": "Q", "output": "A", "system": "S", "history": [["q", "a"]]}
    expected = [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Q")]
    assert turns(record)[:4] == expected


def test_sharegpt():
    record = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"city": "Ulm"}}'},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains.", "weight": 0.5},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "f", "parameters": {}}]',
    }
    datum = to_example(record)
    assert [m["role"] for m in datum.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    call = datum.messages[2]["tool_calls"][0]["function"]
    assert call == {"name": "f", "arguments": {"city": "Ulm"}}
    assert datum.weights == [None] * 4 + [0.5]
    assert datum.tools == [{"name": "f", "parameters": {}}]


def test_several_calls_in_one_sharegpt_turn():
    calls = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
    record = {"conversations": [{"from": "function_call", "value": calls}]}
    names = [c["function"]["name"] for c in to_example(record).messages[0]["tool_calls"]]
    assert names == ["f", "g"]


def test_gsm8k_is_reformatted():
    answer = "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\n#### 1,072"
    expected = "<think>She sold 48/2 = 24 clips.\nIn all 48+24 = 72.</think><answer>1072</answer>"
    assert turns({"question": "How many?", "answer": answer}) == [
        ("user", "How many?"),
        ("assistant", expected),
    ]


def test_prompt_completion_trains_the_completion_alone():
    datum = to_example(
        {"prompt": [*HELLO, {"role": "user", "content": "And?"}], "completion": [HELLO[1]]}
    )
    assert [m["role"] for m in datum.messages] == ["user", "assistant", "user", "assistant"]
    assert datum.weights == [None, 0.0, None, None]
    assert turns({"prompt": "a", "response": "b"}) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("text", ['[{"value": 3}]', '[{"role": "CEO", "name": "Ada"}] of two'])
@pytest.mark.parametrize("fields", [("prompt", "completion"), ("prompt", "chosen", "rejected")])
def test_records_that_somebody_writes_as_json_are_no_messages(text, fields):
    record = {**dict.fromkeys(fields, "a text"), fields[1]: text}
    found = to_example(record)
    side = found if fields[1] == "completion" else found.sides[0]
    assert side.messages[-1]["content"] == text


def test_messages_as_json_with_an_unknown_role_are_no_text():
    with pytest.raises(UserError, match="must begin with a message of the assistant"):
        to_example({"prompt": "a", "completion": '[{"content": "b", "role": "Bot"}]'})


def test_a_null_weight_does_not_train_the_prompt():
    """Tables with one schema for all messages hold nulls where a message says nothing."""
    prompt = [*({**message, "weight": None} for message in HELLO), {**HELLO[0], "weight": None}]
    read = to_example({"prompt": prompt, "completion": [{**HELLO[1], "weight": None}]})
    assert read.weights == [None, 0, None, None]


def test_text_and_tokenised():
    assert to_example({"text": " a "}, line=3) == RawText(" a ", Origin(line=3))
    assert to_example({"ids": [5, 6], "mask": [0, 0.5]}) == Tokenised([5, 6], [0.0, 0.5])
    assert to_example({"input_ids": [5, 6], "labels": [-100, 6]}).mask == [0.0, 1.0]


def test_tool_call_parts_become_calls():
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    datum = to_example({"messages": [HELLO[0], {"role": "assistant", "content": parts}]})
    message = datum.messages[1]
    assert message["reasoning_content"] == "hm"
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    reply = {"role": "assistant", "content": parts}
    datum = to_example({"messages": [HELLO[0], {**reply, "tool_calls": json.dumps(CALLS)}]})
    assert len(datum.messages[1]["tool_calls"]) == len(CALLS) + 1
    with pytest.raises(UserError, match="message 2: tool_calls must be a list, got 5"):
        to_example({"messages": [HELLO[0], {**reply, "tool_calls": 5}]})


def test_other_fields_are_kept_aside():
    assert to_example({"messages": HELLO, "id": 7}).extra == {"id": 7}


def test_the_format_may_be_said():
    record = {"messages": HELLO, "text": "plain"}
    assert to_example(record, "text") == RawText("plain", extra={"messages": HELLO})
    with pytest.raises(UserError, match="format alpaca needs the field instruction"):
        to_example(record, "alpaca")
    with pytest.raises(UserError, match="--format csv: not a format; formats are preferences"):
        to_example(record, "csv")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ([], "expected a JSON object"),
        (None, "expected a JSON object"),
        ({}, "record is empty"),
        ({"foo": 1}, r'fields \["foo"\] fit no known format; name the format'),
        ({"Query": "a", "answer": "b"}, "--fields prompt=Query,completion=answer"),
        ({"messages": [{"by": "a"}]}, r'1: has no role, but \["by"\]; --fields role=NAME,content='),
        ({"data": [{"messages": []}]}, "the file must hold that list alone: jq .data"),
        ({"prompt": "a", "accepted": "b", "rejected": "c"}, "--fields chosen=NAME"),
        ({"chosen": "a", "rejected": "b"}, "has no prompt; name the field"),
        ({"prompt": "q", "chosen": "a"}, "a pair needs `rejected`, too"),
        ({"instruction": "a", "instances": []}, "each of `instances` as a line"),
        ({"instruction": "a"}, "answer is missing: `output`"),
        ({"input_ids": [1]}, "ids alone do not say what is trained"),
        ({"role": "user", "content": "x"}, "this is one message"),
        ({"question": "a", "answer": "b"}, "does not end in `#### N`"),
        ({"question": "a", "answer": "b ####"}, "does not end in `#### N`"),
        ({"instruction": "a", "output": 5}, "output must be a text, got 5"),
        ({"instruction": "a", "output": " "}, "output is empty"),
        ({"instruction": "a", "output": "b", "history": [1]}, "history 1 must be"),
        ({"conversations": []}, "non-empty list of turns"),
        ({"conversations": ["a"]}, "turn 1: expected an object"),
        ({"conversations": [{"from": "alien", "value": ""}]}, '`from` is "alien"; speakers are'),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "value must be a text, got 3"),
        (
            {"conversations": [{"from": "function_call", "value": "{"}]},
            "the call is a text that is not JSON",
        ),
        ({"prompt": "", "completion": "b"}, "prompt is empty"),
        ({"prompt": "a", "completion": 7}, "completion must be a text or a list"),
        ({"prompt": "a", "completion": HELLO[:1]}, "begin with a message of the assistant"),
        ({"text": 7}, "text must be a text, got 7"),
        ({"ids": [1, 2], "mask": [1]}, "ids has 2 entries, mask 1"),
        ({"ids": "12", "mask": [1, 1]}, "ids must be a list of numbers"),
        ({"ids": [1, True], "mask": [1, 1]}, "ids must hold numbers alone, got true"),
        ({"ids": [1.5], "mask": [1]}, "ids must hold token ids, got 1.5"),
        ({"ids": [], "mask": []}, "ids is empty"),
        ({"ids": [1], "mask": [float("inf")]}, "finite weights"),
        ({"ids": [1], "mask": [-1.0]}, "finite weights of 0 or more, got -1.0"),
        ({"ids": [1, 2], "labels": [True, 2]}, "labels must hold numbers alone, got true"),
        ({"ids": [1, 2], "labels": [2, -100]}, "label 1 is 2, neither the id 1"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(record, told):
    with pytest.raises(UserError, match=told) as error:
        to_example(record, source="data.jsonl", line=4)
    assert str(error.value).startswith("data.jsonl:4: ")


def test_every_format_has_a_reader_and_every_real_file_is_read(shared_data):
    import json

    assert set(FORMATS) == set(SIGNATURES)
    for path in [*(shared_data / "chat").iterdir(), *(shared_data / "tools").iterdir()]:
        if path.name == "self_instruct_seed_tasks.jsonl":
            continue  # the shape that is refused, see the table above
        text = path.read_text()
        records = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
        for line, record in enumerate(records, 1):
            assert isinstance(to_example(record, None, path.name, line), Conversation)


CALLS = [{"function": {"name": "f", "arguments": {}}}]
ASKED = {"role": "user", "content": "Hi"}


def reply(**keys):
    """The weight and the message that an assistant's message with these keys becomes."""
    record = {"messages": [ASKED, {"role": "assistant", "content": "Hello", **keys}]}
    datum = to_example(record, source="a.jsonl", line=3)
    return datum.weights[1], datum.messages[1]


@pytest.mark.parametrize("key", ["train", "trainable", "training", "loss", "loss_mask"])
def test_a_message_says_whether_it_is_trained(key):
    assert reply(**{key: False})[0] == 0
    assert reply(**{key: True})[0] == 1
    assert reply(**{key: 0})[0] == 0
    assert reply(**{key: None})[0] is None
    weight, message = reply(**{key: False, "weight": 0})
    assert (weight, message.keys()) == (0, {"role", "content"})
    with pytest.raises(UserError, match=f"weight and {key} differ; keep one"):
        reply(**{key: False, "weight": 1})
    with pytest.raises(UserError, match=f"{key} must be true, false or a number, got"):
        reply(**{key: [1, 0]})
    other = {"messages": [{**ASKED, key: True}, *HELLO[1:]]}
    with pytest.raises(UserError, match="would train words that are not the model's"):
        to_example(other)
    assert to_example({"messages": [{**ASKED, key: False}, *HELLO[1:]]}).weights == [0, None]


def test_sharegpt_turns_say_it_too():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "train": False}]
    more = [*turns, {"from": "gpt", "value": "x", "loss_weight": 0.5}]
    assert to_example({"conversations": more}).weights == [None, 0, 0.5]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"train_detail": [{"begin": 0}]}, "train_detail is not read; give the message a weight"),
        ({"mask": True}, "mask is not read; give the message a weight"),
        ({"images": ["a.png"]}, "images is not read; Whet trains on text alone"),
        ({"refusal": "No."}, "refusal is not read"),
        ({"function_call": {"name": "f"}, "tool_calls": CALLS}, "has function_call and tool_calls"),
        ({"tool_calls": "{"}, "tool_calls is a text that is not JSON"),
    ],
)
def test_what_a_message_says_is_read_or_refused(keys, told):
    with pytest.raises(UserError, match=f"a.jsonl:3: message 2 .*: {told}|a.jsonl:3: .*{told}"):
        reply(**keys)


@pytest.mark.parametrize("empty", ["", [], None])
@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_empty_means_absent(empty, role):
    keys = ("tool_calls", "reasoning_content", "reasoning", "thinking", "function_call", "images")
    message = {"role": role, "content": "x", **dict.fromkeys(keys, empty)}
    beside = {"tools": empty, "documents": empty, "functions": empty, "system": empty}
    for record in (
        {"messages": [*HELLO, message], **beside},
        {"prompt": [*HELLO, message], "completion": "x", **beside},
        {"conversations": [*HELLO, message], **beside},
        {"instruction": "x", "output": "y", **beside},
    ):
        datum = to_example(record)
        assert datum.tools is None
        assert datum.documents is None
        assert {"role": role, "content": "x"} in datum.messages or "output" in record
    assert to_example({"messages": json.dumps(HELLO), "tools": "[]"}).messages == HELLO


def test_calls_and_tools_under_older_names():
    tool = {"name": "f", "parameters": {}}
    called = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}
    result = {"role": "function", "name": "f", "content": "1"}
    record = {"messages": [ASKED, called, result, called]}
    datum = to_example({**record, "functions": [tool]})
    assert datum.tools == [{"type": "function", "function": tool}]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert datum.messages[1]["tool_calls"] == [call]
    assert datum.messages[2]["role"] == "tool"
    for key in ("tool_defs", "available_tools", "tools"):
        assert to_example({**record, key: [tool]}).tools == [tool]
        assert to_example({**record, key: json.dumps([tool])}).tools == [tool]
    with pytest.raises(UserError, match="tools and tool_defs differ; keep one of them"):
        to_example({**record, "tools": [tool], "tool_defs": [{"name": "g"}]})
    as_text = [ASKED, {"role": "assistant", "tool_calls": json.dumps(CALLS)}]
    assert to_example({"messages": as_text}).messages[1]["tool_calls"] == [call]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_messages(key):
    system = {"role": "system", "content": "S"}
    for record in ({"messages": HELLO}, {"prompt": "Hi", "completion": "Hello"}):
        assert to_example({**record, key: "S"}).messages == [system, *HELLO]
    assert to_example({"messages": [system, *HELLO], key: "S"}).messages == [system, *HELLO]
    with pytest.raises(UserError, match="has a field system and a system turn"):
        to_example({"messages": [system, *HELLO], key: "T"})


IDS = {"input_ids": [9, 9, 1, 2, 3, 9], "loss_mask": [0, 0, 0, 1, 1, 0]}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"attention_mask": [0, 0, 1, 0, 1, 1]}, "attention_mask must be 1 for the tokens of one"),
        ({"attention_mask": [1, 1, 1, 1, 0, 0]}, "a token is trained where attention_mask is 0"),
        ({"attention_mask": [1, 1]}, "input_ids has 6 entries, attention_mask 2"),
        ({"position_ids": [0, 1, 2, 0, 1, 2]}, "position_ids begin again at 4: it holds several"),
        ({"position_ids": [5, 6, 7, 8, 9, 10]}, "position 1 of position_ids is 5; .* count from 0"),
        ({"seq_lengths": [3, 3]}, "seq_lengths has several entries: it holds several texts"),
        ({"cu_seqlens": [0, 3, 6]}, "cu_seqlens has several entries"),
        ({"segment_ids": [1, 1, 1, 2, 2, 2]}, "segment_ids differ: it holds several texts"),
        ({"token_type_ids": [0, 0, 1, 1, 0, 0]}, "token_type_ids are not read"),
        ({"labels": [-100, -100, 1, 2, 3, -100]}, "loss_mask and labels train other tokens"),
        ({"loss_weights": [1, 1, 1, 1, 1, 1]}, "loss_weights: weights of tokens are read as"),
    ],
)
def test_what_stands_beside_ids_is_read_or_refused(more, told):
    with pytest.raises(UserError, match=told):
        to_example({**IDS, **more})


def test_padding_of_ids_goes():
    beside = {"attention_mask": [0, 0, 1, 1, 1, 0], "position_ids": [1, 1, 0, 1, 2, 1]}
    datum = to_example({**IDS, **beside, "cu_seqlens": [0, 6], "token_type_ids": [0] * 6})
    assert (datum.ids, datum.mask) == ([1, 2, 3], [0, 1, 1])
    assert datum.extra == {}
    assert to_example({**IDS, "completion_mask": [0, 0, 0, 1, 1, 0]}).ids == IDS["input_ids"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"images": ["a"]}, "has images, and Whet trains on text alone; --fields images= leaves"),
        ({"loss_weight": 0.5}, "loss_weight 0.5 of a whole record is not read"),
        ({"train": False}, "train false of a whole record"),
        ({"chat_template_kwargs": {"a": 1}}, "has chat_template_kwargs.*--template_kwargs"),
    ],
)
def test_what_stands_beside_messages_is_refused(more, told):
    with pytest.raises(UserError, match=told):
        to_example({"messages": HELLO, **more})
    assert to_example({"messages": HELLO, "images": [], "weight": 1}).messages == HELLO


def test_fields_of_other_names():
    fields = read_fields("messages=dialogue,role=speaker,content=said,system=intro,images=", FIELDS)
    turns = [{"speaker": m["role"], "said": m["content"]} for m in HELLO]
    seen = Counter()
    record = renamed({"dialogue": turns, "intro": "S", "images": ["x"], "id": 1}, fields, seen)
    assert [m["content"] for m in to_example(record).messages] == ["S", "Hi", "Hello"]
    assert to_example(record).extra == {"id": 1}
    assert seen == {"dialogue": 1, "intro": 1, "images": 1, "speaker": 2, "said": 2}
    record = {"question": "Hi", "prompt": "old", "completion": "x"}
    other = renamed(record, {"prompt": "question"}, seen)
    assert to_example(other).messages[0]["content"] == "Hi"
    for wrong in ("messages", "nothing=x", "a=b=c", "=x", "messages=a,messages=b"):
        with pytest.raises(UserError, match="--fields"):
            read_fields(wrong, FIELDS)
