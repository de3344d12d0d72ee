"""What a template does is found by trying it: where a reply ends, or why it is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.chat import suite
from tests.chat.suite import said, user
from whet.chat.certificate import Refused
from whet.chat.chat import Chat
from whet.chat.conversation import read_conversation
from whet.chat.encode import encode_chat
from whet.chat.template import ChatTemplate
from whet.chat.tokenizer import Tokenizer, train_tokenizer

TALK = [user("Hi"), said("Hello!")]
CALL = [
    user("Weather?"),
    {"role": "assistant", "content": None, "tool_calls": [suite.call()]},
    suite.result(),
    said("21"),
]
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
WITH_CALLS = """{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>
{{ m.content or '' }}{% for c in m.tool_calls or [] %}
<tool_call>{{ c.function|tojson }}</tool_call>{% endfor %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""
CHATML = Path("whet/chat/chatml.jinja").read_text(encoding="utf-8")


def chat(source: str, eos: Sequence[str] = (), unflagged: Sequence[str] = ()) -> Chat:
    """The template `source` and a tokenizer with the tokens that it writes; `eos` are further ones
    of generation_config.json."""
    backend = tokenizers.Tokenizer.from_str(train_tokenizer([CHATML], 300).json_text)
    names = ["<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|end|>"]
    names += ["<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in names])
    backend.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in unflagged])
    named, further = {"eos_token": "<|endoftext|>"}, [backend.token_to_id(text) for text in eos]
    tokenizer = Tokenizer(backend, backend.to_str(), named, {}, tuple(i for i in further if i))
    return Chat(tokenizer, ChatTemplate(source))


def words(chat: Chat, talk: list[dict[str, Any]], tools: Any = None) -> list[str]:
    encoded = encode_chat(read_conversation(talk, tools=tools), chat)
    return [
        chat.tokenizer.decode(example.ids[span.start : span.end], skip_special=False)
        for example in encoded.examples
        for span in example.spans
    ]


@pytest.mark.parametrize(
    ("source", "eos", "expected"),
    [
        (TURNS + "{% endfor %}<|assistant|>", [], "Hello!<|endoftext|>"),
        (TURNS + "<|end|>{% endfor %}<|assistant|>", [], "Hello!<|end|>"),
        (TURNS + "{{ eos_token }}{% endfor %}<|assistant|>", [], "Hello!<|endoftext|>"),
        (
            TURNS + "{% endfor %}{% if messages[-1].role == 'user' %}<|assistant|>{% else %}"
            "<|user|>{% endif %}", [], "Hello!<|endoftext|>",
        ),
        (TURNS + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
         ["<|user|>"], "Hello!<|user|>"),
    ],
)  # fmt: skip
def test_a_header_is_no_stop_token_unless_it_is_an_eos(
    source: str, eos: list[str], expected: str
) -> None:
    """Also where the template writes its generation prompt whether asked to or not."""
    made = chat(source, eos)
    assert words(made, TALK) == [expected]
    stops = [made.tokenizer.decode([i], skip_special=False) for i in made.stop_ids]
    assert stops[0] == expected.removeprefix("Hello!")
    assert "<|assistant|>" not in stops


def test_a_call_that_ends_with_a_tag_stops_at_the_eos_that_follows() -> None:
    eos = ["<|user|>", "<|observation|>"]
    made = chat(WITH_CALLS, eos, unflagged=["<tool_call>", "</tool_call>"])
    call, reply = words(made, CALL, suite.TOOLS)
    assert call.endswith("</tool_call><|observation|>")
    assert reply == "21<|user|>"


TWO_WAYS = """{%- for m in messages -%}<|{{ m.role }}|>
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking %}<think></think>
{%- endif %}{% endif %}"""
ASKS_FIRST = "{% if messages[0].role == 'assistant' %}{{ raise_exception('ask') }}{% endif %}"


@pytest.mark.parametrize(
    ("source", "talk", "told"),
    [
        (
            TWO_WAYS, [user("a"), said("b", reasoning_content="hm")],
            """--template_kwargs '{"enable_thinking": true}' encodes it""",
        ),
        (ASKS_FIRST + CHATML, [said("a"), *TALK], "begins with the assistant: put a user turn"),
        ("{{ messages[0].role }}" + CHATML, [said("a"), *TALK], "begins with the assistant"),
        (TURNS + "</end>{% endfor %}", TALK, "eos_token_id in generation_config.json"),
        (TURNS + "</end>{% endfor %}", CALL, "get_weather, as it writes no tool calls"),
    ],
)  # fmt: skip
def test_a_refusal_says_the_true_reason_and_a_way_out(
    source: str, talk: list[dict[str, Any]], told: str
) -> None:
    with pytest.raises(Refused) as caught:
        words(chat(source), talk)
    assert told in str(caught.value)
    assert "needs tools" not in str(caught.value)
    assert "switch" not in str(caught.value)


def test_the_way_out_that_is_named_works() -> None:
    made = chat(TWO_WAYS).with_variables({"enable_thinking": True})
    talk = [user("a"), said("b", reasoning_content="hm")]
    assert words(made, talk) == ["<think>hm</think>b<|endoftext|>"]


def test_no_variable_is_named_where_none_helps() -> None:
    made = chat(TURNS + "<|end|>{% if x %}!{% endif %}{% endfor %}<|assistant|>")
    with pytest.raises(Refused) as caught:
        words(made, [user("a"), said("b", reasoning_content="hm")])
    assert "--template_kwargs" not in str(caught.value)
