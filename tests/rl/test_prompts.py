"""The prompts of a policy: each field of a line is honoured or refused by name."""

import json

import pytest

from tests import tiny
from whet.chat.chat import add_chat_tokens
from whet.errors import UserError
from whet.rl.prompts import load_prompts

SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "2 + 3?"}


@pytest.fixture(scope="module")
def chat():
    return add_chat_tokens(tiny.chat(), "chatml")[0]


@pytest.fixture
def load(tmp_path, chat):
    def loaded(*lines, **options):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return load_prompts(path, chat, **options)

    return loaded


@pytest.mark.parametrize(
    ("line", "messages", "gold"),
    [
        ({"prompt": "2 + 3?", "gold": 5}, [USER], "5"),
        ({"question": "2 + 3?", "answer": "so\n#### 1,005"}, [USER], "1005"),
        ({"prompt": None, "question": "2 + 3?", "gold": None, "answer": "5"}, [USER], "5"),
        ({"prompt": [USER], "system": "be kind"}, [SYSTEM, USER], None),
        ({"messages": [SYSTEM, USER], "system_prompt": ""}, [SYSTEM, USER], None),
        ({"prompt": "2 + 3?", "gold": True}, [USER], None),
        ({"prompt": "2 + 3?", "gold": "true"}, [USER], None),
        ({"prompt": "2 + 3?", "gold": -0.0}, [USER], "-0.0"),
        ({"prompt": "2 + 3?", "gold": 2e-7}, [USER], "0.0000002"),
        ({"prompt": "2 + 3?", "gold": 1e100}, [USER], "1" + 100 * "0"),
        ({"prompt": "2 + 3?", "gold": 2**70}, [USER], str(2**70)),
        ({"prompt": json.dumps([SYSTEM, USER]), "gold": "1/0"}, [SYSTEM, USER], None),
    ],
)
def test_a_line_is_what_its_fields_say(load, line, messages, gold):
    prompts, notes = load(line)
    assert (prompts.prompts[0].messages, prompts.prompts[0].gold) == (messages, gold)
    assert not notes


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prompt": ""}, ":2: prompt must be a text or a list of messages, got"),
        ({"text": "x"}, ":2: expected the field prompt, messages or question, got text"),
        ({"prompt": [USER, {"role": "assistant", "content": "5"}]}, "end with the assistant's"),
        ({"prompt": [SYSTEM, USER], "system": "x"}, "has a field system and a system turn"),
        ({"prompt": "x", "system": 3}, "system must be a text, got 3"),
        ({"prompt": "x", "images": ["a.png"]}, ":2: has images, and Whet trains on text alone"),
        ({"prompt": "x", "functions": 3}, ":2: tools must be a list of objects, got 3"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(load, line, told):
    with pytest.raises(UserError, match=told):
        load({"prompt": "one"}, line)


def test_all_bad_lines_are_told_at_once(load):
    with pytest.raises(UserError) as caught:
        load(*[{"text": "x"}] * 30)
    told = str(caught.value).splitlines()
    assert ":1: expected" in told[0]
    assert len(told) == 4
    assert told[-1].endswith("27 further lines cannot be read")


def test_prompts_that_leave_no_room_are_left_out_and_told(load):
    lines = [{"prompt": "one"}, {"prompt": "one " * 40}]
    prompts, notes = load(*lines, longest=30)
    assert [prompt.line for prompt in prompts.prompts] == [1]
    assert "1 of 2 prompts were left out" in notes[0]
    with pytest.raises(UserError, match=r"needs a gold number .* line 1 has none"):
        load(lines[0], needs_gold="correct")
