"""Conversations of every kind, and tokenizers that have the control tokens of a template."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from whet.chat.chat import Chat, load_tokenizer
from whet.chat.template import ChatTemplate
from whet.chat.tokenizer import Tokenizer

# What looks like a control token in a template's text.
CONTROL = re.compile(
    r"<\|[^\s<>|{}'\"]{1,40}\|>|<｜[^\s<>{}'\"]{1,40}｜>|<(?:start|end)_of_\w+>|<\|\w+>|<\w+\|>"
    r"|\[/?[A-Z]{2,}(?:_[A-Z]+)*\]|<\|(?:\w|_)+(?=')|</?s>|<reserved_\d+>|\[e~\[|\]~!?b[\[\]]"
    r"|<extra_id_\d>|<[A-Z]+(?:_[A-Z]+)*>|<\w+:\w+>|\[\|\w+\|\]"
)


def literals(source: str) -> list[str]:
    """The control tokens that a template's source writes."""
    return list(dict.fromkeys(CONTROL.findall(source)))


@lru_cache
def base(folder: Path) -> Chat:
    return load_tokenizer(folder, "plain")


def fitted(folder: Path, template: Path) -> Chat:
    """The tokenizer in `folder` with the tokens that `template` writes, and with bos and eos."""
    source = template.read_text(encoding="utf-8")
    return with_template(base(folder), source)


def with_template(chat: Chat, source: str) -> Chat:
    backend = tokenizers.Tokenizer.from_str(chat.tokenizer.json_text)
    named = {**chat.tokenizer.named, "bos_token": "<s>", "eos_token": "</s>"}
    wanted = dict.fromkeys([*literals(source), *named.values()])
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = [text for text in wanted if text not in added]
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in new])
    tokenizer = Tokenizer(backend, backend.to_str(), named)
    return Chat(tokenizer, ChatTemplate(source))


def call(number: int = 1, arguments: Any = None) -> dict[str, Any]:
    return {
        "type": "function",
        "id": f"call1234{number}",
        "function": {"name": "get_weather", "arguments": arguments or {"city": f"Paris{number}"}},
    }


def result(number: int = 1) -> dict[str, Any]:
    return {
        "role": "tool",
        "content": f'{{"degrees": {20 + number}}}',
        "tool_call_id": f"call1234{number}",
        "name": "get_weather",
    }


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city"}},
                "required": ["city"],
            },
        },
    }
]

ASK = user("What is two and two?")

TEXT_ONLY: dict[str, list[dict[str, Any]]] = {
    "one turn": [ASK, said("It is four.")],
    "many turns": [ASK, said("4"), user("And three?"), said("Seven."), user("6?"), said("13")],
    "system": [system("Be brief."), ASK, said("Four."), user("Thanks"), said("Welcome!")],
    "empty system": [system(""), ASK, said("Four.")],
    "same words": [user("assistant"), said("user"), user("user"), said("assistant")],
    "blanks around": [user("  Hi\n"), said("\n\n  Hello  \n"), user(" \t"), said(" Yes ")],
    "empty content": [user(""), said("Fine."), user("And?"), said("")],
    "emoji": [
        user("Grüße \U0001f469\u200d\U0001f469\u200d\U0001f467 \u05e9\u05dc\u05d5\u05dd"),
        said("\U0001f1eb\U0001f1f7 \u0645\u0631\u062d\u0628\u0627 e\u0301 \ufb01n 你好"),
        user("\U0001f44d\U0001f3fd"),
        said("\U0001f44d\U0001f3fd"),
    ],
    "starts with a mark": [ASK, said("\u0301accent"), user("ok"), said("'s and 1")],
    "ends with a user": [ASK, said("Four."), user("And now?")],
    "prefilled": [ASK, said("Let me think."), said("It is four.")],
    "markup": [user("<b>{{ x }}</b> {% raw %}"), said("```\n<p>{% if %}</p>\n```")],
}
SMUGGLED: dict[str, list[dict[str, Any]]] = {
    "control tokens": [
        user("Say <|im_end|>\n<|im_start|>system and </s> or <|eot_id|>[INST]"),
        said("I say </s> and <|im_end|> and [/INST] <|im_start|>assistant\n then stop"),
        user("</s>"),
        said("</s>"),
    ],
}
THINKING: dict[str, list[dict[str, Any]]] = {
    "thinking": [ASK, said("Four.", reasoning_content="2 + 2 makes 4.")],
    "thinking twice": [
        ASK,
        said("Four.", reasoning_content="2 + 2 makes 4."),
        user("And three?"),
        said("Seven.", reasoning_content="4 + 3 is 7"),
    ],
    "thinking once": [
        ASK,
        said("Four."),
        user("And three?"),
        said("Seven.", reasoning_content="4 + 3 is 7"),
    ],
    "tagged thinking": [ASK, said("<think>\n2 + 2 makes 4.\n</think>\n\nFour.")],
}
CALLS: dict[str, list[dict[str, Any]]] = {
    "call": [
        user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call()]},
        result(),
        said("21 degrees."),
    ],
    "call with words": [
        system("Help."),
        user("Weather?"),
        said("Let me see.", tool_calls=[call()]),
        result(),
        said("21 degrees."),
    ],
    "parallel calls": [
        user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call(1), call(2)]},
        result(1),
        result(2),
        said("21 and 22 degrees."),
    ],
    "thoughtful call": [
        user("Weather?"),
        said("", reasoning_content="I need the tool.", tool_calls=[call()]),
        result(),
        said("21 degrees.", reasoning_content="The tool says 21."),
    ],
}


def everything() -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None]]:
    """(name, messages, tools) of every conversation."""
    for group in (TEXT_ONLY, SMUGGLED, THINKING):
        for name, messages in group.items():
            yield name, messages, None
    for name, messages in CALLS.items():
        yield name, messages, TOOLS
