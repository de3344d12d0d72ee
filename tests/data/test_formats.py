import pytest

from whet.chat.conversation import Conversation, RawText, Tokenised
from whet.data.formats import FORMATS, SIGNATURES, detect_format, to_example
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


def test_a_null_weight_does_not_train_the_prompt():
    """Tables with one schema for all messages hold nulls where a message says nothing."""
    prompt = [*({**message, "weight": None} for message in HELLO), {**HELLO[0], "weight": None}]
    read = to_example({"prompt": prompt, "completion": [{**HELLO[1], "weight": None}]})
    assert read.weights == [None, 0, None, None]


def test_text_and_tokenised():
    assert to_example({"text": " a "}, line=3) == RawText(" a ", line=3)
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
