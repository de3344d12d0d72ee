"""Renderings asked for many at a time: the same results, and bounds that hold for each alone."""

from typing import Any

import pytest

from tests.chat import suite
from tests.chat.suite import said, user
from tests.chat.test_encode import REWRITES, chatml, plain  # noqa: F401 -- fixtures
from whet.chat import encode, template
from whet.chat.certificate import Refusal
from whet.chat.chat import Chat
from whet.chat.conversation import read_conversation
from whet.chat.encode import Encoded, EncodeOptions, encode_many
from whet.chat.template import ChatTemplate, TemplateError

DROP = EncodeOptions()
BAD = """{%- for m in messages -%}
{%- if 'loop for ever' in m.content %}{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}
{%- elif 'fill memory' in m.content %}{{ m.content * 199999999 }}
{%- elif 'refuse' in m.content %}{{ raise_exception('no ' + m.content) }}{% endif -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def talk(number: int, turns: int = 1) -> list[dict[str, Any]]:
    return [m for i in range(turns) for m in (user(f"Q{number}.{i}"), said(f"A{number}.{i}"))]


def outcomes(talks: list[list[dict[str, Any]]], chat: Chat) -> list[Any]:
    """Of each conversation the ids and masks, or the refusal."""
    results = encode_many([read_conversation(messages) for messages in talks], chat, DROP)
    return [
        [(e.ids.tolist(), e.loss_mask.tolist(), e.turns) for e in result.examples]
        if isinstance(result, Encoded)
        else result
        for result in results
    ]


@pytest.mark.parametrize("what", ["loop for ever", "fill memory"])
def test_one_bad_conversation_of_a_block_is_refused_alone(
    chatml: Chat,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    talks = [talk(i) for i in range(20)]
    talks[3], talks[7] = [user("refuse"), said("this")], [user(what), said("Yes.")]
    chat = suite.with_template(chatml, BAD)
    outcomes(talks[:1], chat)  # what is found out about the template is found out once
    monkeypatch.setattr(template, "SECONDS", 1.0)
    results = encode_many([read_conversation(messages) for messages in talks], chat, DROP)
    assert [i for i, result in enumerate(results) if isinstance(result, Refusal)] == [3, 7]
    bound = "1 s of processor time" if what == "loop for ever" else "1,024 MB of memory"
    assert [text in str(results[i]) for i, text in [(3, "no refuse"), (7, bound)]] == [True, True]


@pytest.mark.parametrize("source", [None, REWRITES, BAD], ids=["chatml", "rewrites", "refuses"])
def test_blocks_of_1_and_of_256_give_the_same(
    chatml: Chat,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    source: str | None,
) -> None:
    chat = suite.with_template(chatml, source) if source else chatml
    talks = [talk(i, turns=1 + i % 7) for i in range(20)]
    talks[5] += [user("refuse"), said("it")]  # fails in the middle
    talks[6][1]["content"] = "a <|im_end|> in a text"
    talks[7] = [user("a"), said("b", reasoning_content="c"), user("d"), said("e")]
    together = outcomes(talks, chat)
    monkeypatch.setattr(encode, "BATCH", 1)
    assert outcomes(talks, chat) == together


def test_a_block_is_one_message(
    chatml: Chat,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talks = [talk(i, turns) for i, turns in enumerate([1, 2, 4, 9, 40])]  # marked from 9 on
    outcomes(talks, chatml)  # what is found out about the template is found out once
    messages = []
    ask = template._Renderer.ask

    def counted(self: Any, request: memoryview, count: int) -> Any:
        messages.append(count)
        return ask(self, request, count)

    monkeypatch.setattr(template._Renderer, "ask", counted)
    outcomes(talks, chatml)
    assert len(messages) == 1


def test_answers_end_before_what_breaks_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = ChatTemplate(BAD)
    monkeypatch.setattr(template, "SECONDS", 1.0)
    texts = ["a", "refuse", "b", "loop for ever", "c"]
    asks: list[Any] = [("render", [user(text)], None, None, False) for text in texts]
    assert len(bad.answers(asks[:3], None, None)) == 3
    answers = bad.answers(asks, None, None)
    assert len(answers) <= 3
    refused = [isinstance(answer, TemplateError) for answer in answers]
    assert refused == [False, True, False][: len(answers)]
