"""What a chat is rendered with travels: the prompt that was trained is the prompt that is asked."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.chat import rules, suite
from tests.chat.suite import said, user
from tests.chat.test_templates import templates
from tests.rendering import render
from whet.chat.certificate import Refused
from whet.chat.chat import Chat, load_tokenizer
from whet.chat.conversation import Conversation, read_conversation
from whet.chat.encode import encode_chat, encode_prompt
from whet.chat.template import ChatTemplate
from whet.errors import UserError

TALKS: list[tuple[list[dict[str, Any]], Any]] = [
    (suite.TEXT_ONLY["many turns"], None),
    (suite.THINKING["thinking"], None),
    (suite.CALLS["call"], suite.TOOLS),
]
EFFORT = """{%- macro header(role) %}<|im_start|>{{ role }}
{{ effort }}{% endmacro %}{% for m in messages %}{{ header(m.role) }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}{{ header('assistant') }}
{% endif %}"""


@pytest.fixture(scope="module")
def chatml(shared_data: Path) -> Chat:
    return suite.fitted(
        shared_data / "tokenizers/minimind", shared_data / "chat_templates/vllm-chatml.jinja"
    )


def asks_as_trained(chat: Chat, opened: Chat, messages: list[dict[str, Any]], tools: Any) -> int:
    """How many prompts of `opened` were seen to be those of what `chat` trains."""
    talk, count = read_conversation(messages, tools=tools), 0
    for example in encode_chat(talk, chat).examples:
        for span in example.spans:
            asked = Conversation(talk.messages[: span.message], talk.tools)
            prompt = encode_prompt(asked, opened, go_on=False)
            assert prompt == example.ids[: span.start].tolist()
            count += 1
    return count


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_every_template_is_asked_as_it_was_trained(
    shared_data: Path, tmp_path: Path, every: int
) -> None:
    """Encoded, saved, opened and asked: without variables and with each that changes anything."""
    count = with_variables = 0
    for number, path in enumerate(templates(shared_data)[::every]):
        chat = suite.fitted(shared_data / "tokenizers/minimind", path)
        for variables, variant in [({}, chat), *chat.alternatives[:3]]:
            home = tmp_path / f"{number}_{json.dumps(variables)[:40].replace('/', '_')}"
            variant.save(home)
            opened = load_tokenizer(home)
            for messages, tools in TALKS:
                try:
                    seen = asks_as_trained(variant, opened, messages, tools)
                except Refused:
                    continue
                count += seen
                with_variables += bool(variables) * seen
    assert count > 640 / every
    assert with_variables > 80 / every


def test_variables_travel_within_the_template_which_others_read(
    chatml: Chat, tmp_path: Path
) -> None:
    chat = suite.with_template(chatml, EFFORT).with_variables({"effort": 'a "b"\né {% %}'})
    chat.save(tmp_path)
    opened, talk = load_tokenizer(tmp_path), [user("Hi"), said("Yes.")]
    expected = render(chat.template, talk, variables=chat.variables)
    assert render(opened.template, talk) == expected
    assert rules.Oracle(opened).text(talk, None, False) == expected
    assert asks_as_trained(chat, opened, talk, None) == 1
    again = opened.with_variables({"effort": None})
    assert render(again.template, talk, variables=again.variables) != expected
    again.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").template.source.count("set effort") == 1


def test_a_date_travels_where_the_template_asks_for_one(chatml: Chat, tmp_path: Path) -> None:
    chat = suite.with_template(chatml, "{{ strftime_now('%d %B %Y') }}\n" + chatml.template.source)
    chat = chat.with_variables({}, "2024-02-29")
    chat.save(tmp_path / "dated")
    opened = load_tokenizer(tmp_path / "dated")
    assert opened.today == date(2024, 2, 29)
    assert asks_as_trained(chat, opened, [user("Hi"), said("Yes.")], None) == 1
    chatml.with_variables({}, "2024-02-29").save(tmp_path / "undated")
    assert load_tokenizer(tmp_path / "undated").today == date.today()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"efort": 1}, "reads no variable efort; it reads effort"),
        ({"bos_token": ""}, "bos_token is the tokenizer's own"),
        ({"messages": []}, "messages can't be set"),
    ],
)
def test_variables_that_do_nothing_or_harm_are_refused(
    chatml: Chat, variables: dict[str, Any], told: str
) -> None:
    chat = suite.with_template(chatml, "{{ bos_token }}" + EFFORT)
    with pytest.raises(UserError, match=told):
        chat.with_variables(variables)


THOUGHTS = {
    "<think>\n\n</think>\n\n": "<think>\n{t}\n</think>\n\n",
    "</think>": "<think>{t}</think>",
    "[THINK][/THINK]": "",
    "<|channel>thought\n<channel|>": "<|channel>thought\n{t}<channel|>",
    "<|START_THINKING|><|END_THINKING|>": "<|START_THINKING|>{t}<|END_THINKING|>",
}


def thinking(prompt: str, thought: str) -> str:
    """ChatML whose prompt ends with `prompt`, and that writes a thought, if any, as `thought`."""
    before, _, after = thought.partition("{t}")
    written = f"{before!r} + m.reasoning_content + {after!r}"
    written = "{%- if m.reasoning_content %}{{ " + written + " }}{% endif -%}" if thought else ""
    return (
        "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ '' }}" + written
        + "{{ m.content }}<|im_end|>\n{% endfor -%}{%- if add_generation_prompt %}"
        + "<|im_start|>assistant\n{{ " + repr(prompt) + " }}{% endif -%}"
    )  # fmt: skip


@pytest.mark.parametrize(("prompt", "thought"), THOUGHTS.items())
def test_a_plain_reply_follows_the_empty_thought_of_its_prompt(
    chatml: Chat, prompt: str, thought: str
) -> None:
    chat = suite.with_template(chatml, thinking(prompt, thought))
    encoded = rules.check([user("Hi"), said("Yes.")], None, chat, rules.Oracle(chat))
    start = encoded.examples[0].spans[0].start
    assert chat.tokenizer.decode(encoded.ids[:start], skip_special=False).endswith(prompt)
    trained = encoded.ids[encoded.loss_mask > 0]
    assert chat.tokenizer.decode(trained, skip_special=False) == "Yes.<|im_end|>"
    if thought:
        with pytest.raises(Refused) as caught:
            encode_chat([user("Hi"), said("Yes.", reasoning_content="hm")], chat)
        assert caught.value.refusal.kind == "not_a_prefix"


@pytest.mark.parametrize("prompt", ["<think>\n", "Let me think:\n", "<|im_end|>", "</s>"])
def test_a_plain_reply_does_not_follow_an_open_thought_or_an_end(chatml: Chat, prompt: str) -> None:
    chat = suite.with_template(chatml, thinking(prompt, "<think>\n{t}</think>"))
    with pytest.raises(Refused, match="the prompt at inference ends with"):
        encode_chat([user("Hi"), said("Yes.")], chat)


def test_what_a_packed_file_records_is_a_chat_again(chatml: Chat) -> None:
    chat = suite.with_template(chatml, EFFORT).with_variables({"effort": 2})
    chat = Chat(chat.tokenizer, chat.template, ChatTemplate("T{{ effort }}"), chat.variables)
    again = chatml.rendering_as(json.loads(json.dumps(chat.as_dict())), "a.h5")
    assert again.as_dict() == chat.as_dict()
    assert render(again.template, [user("a")]) == render(
        chat.template, [user("a")], variables={"effort": 2}
    )
    assert again.tool_template is not None
    assert render(again.tool_template, []) == "T2"
    with pytest.raises(UserError, match=r"a\.h5: its attribute chat holds no template"):
        chatml.rendering_as({"template": 5}, "a.h5")


def test_stop_ids_are_read_from_a_packed_file_where_they_are_this_chats(chatml: Chat) -> None:
    """Recorded of another vocabulary, eos, template or date, or damaged, they are found again."""
    chat = suite.with_template(chatml, "{{ strftime_now('%Y') }}" + chatml.template.source)
    chat = chat.with_variables({}, "2024-02-29")
    record = json.loads(json.dumps(chat.record()))
    assert record["stop_ids"] == list(chat.stop_ids)
    marked = {**record, "stop_ids": [7]}
    assert chat.rendering_as(marked, "a.h5").stop_ids == (7,)
    assert chatml.rendering_as(marked, "a.h5").stop_ids == (7,), "the template comes from the file"
    tokenizer = chatml.tokenizer
    others = [
        (chatml, {**marked, "template": chatml.template.source}),
        (chatml, {**marked, "date": "2023-02-28"}),
        (chatml, {**marked, "hash": "0" * 64}),
        (chatml, {**marked, "stop_ids": "7"}),
        (chatml, {**marked, "stop_ids": [7, -1]}),
        (chatml, {**marked, "stop_ids": [tokenizer.vocab_size]}),
        (Chat(tokenizer.with_tokens(["<|more|>"])), marked),
        (Chat(replace(tokenizer, further_eos_ids=(9,))), marked),
        (Chat(replace(tokenizer, named={**tokenizer.named, "eos_token": "a"})), marked),
    ]
    for other, kept in others:
        again = other.rendering_as(kept, "a.h5")
        assert again.stop_ids == Chat(other.tokenizer, again.template).stop_ids != (7,)
    assert chat.rendering_as(marked, "a.h5").with_variables({}, "2023-01-01").stop_ids != (7,)
