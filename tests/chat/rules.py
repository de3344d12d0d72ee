"""The rules of docs/chat_templates.md, checked from outside: transformers renders and tokenises."""

import re
import unicodedata
from typing import Any

import numpy as np
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from whet.chat.chat import Chat
from whet.chat.conversation import Conversation, read_conversation
from whet.chat.encode import Encoded, EncodeOptions, Example, Span, encode_chat, encode_prompt


class Oracle:
    """transformers' own tokenizer around the same tokens and template."""

    def __init__(self, chat: Chat) -> None:
        self.theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=chat.tokenizer.backend, **chat.tokenizer.named
        )
        self.theirs.chat_template = chat.template.source

    def text(self, messages: list, tools: Any, prompt: bool, **variables: Any) -> str:
        named = {**self.theirs.special_tokens_map, **variables}
        template = self.theirs.chat_template
        # Not through apply_chat_template: this drops `content: None`, which some templates ask for.
        return render_jinja_template(
            [messages], tools, chat_template=template, add_generation_prompt=prompt, **named
        )[0][0]

    def ids(self, messages: list, tools: Any, prompt: bool, **variables: Any) -> list[int]:
        if any(value is None for message in messages for value in message.values()):
            text = self.text(messages, tools, prompt, **variables)
            return self.theirs(text, add_special_tokens=False).input_ids
        return self.theirs.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=prompt,
            tokenize=True,
            return_dict=False,
            **variables,
        )


def check(
    messages: list[dict[str, Any]],
    tools: Any,
    chat: Chat,
    oracle: Oracle,
    options: EncodeOptions | None = None,
) -> Encoded:
    """Encode a conversation and hold all rules against the oracle. Raises Refused."""
    conversation = read_conversation(messages, tools=tools)
    encoded = encode_chat(conversation, chat, options)
    read = conversation.messages
    shaped = chat.dialect.form(read).shape(read)
    assert encoded.examples
    trained = sorted(turn for example in encoded.examples for turn in example.turns)
    wanted = [i for i, message in enumerate(read) if message["role"] == "assistant"]
    left_out = [number - 1 for number in encoded.certificate.untrained_turns]
    if (options or EncodeOptions()).train_on == "last":
        wanted = wanted[-1:]
    assert sorted(trained + left_out) == wanted, "each turn is trained exactly once"
    for example in encoded.examples:
        same_ids(example, encoded, shaped, tools, oracle)
        for span in example.spans:
            own_words(example, span, encoded, read, shaped, tools, chat, oracle)
            same_context(example, span, encoded, read, shaped, tools, chat, oracle, options)
        mask = np.zeros(len(example.ids), np.float32)
        for span in example.spans:
            mask[span.start : span.end] = span.weight
        assert np.array_equal(mask, example.loss_mask)
    no_smuggled(encoded, read, tools, chat, options)
    return encoded


def same_ids(example: Example, encoded: Encoded, shaped: list, tools: Any, oracle: Oracle) -> None:
    """Rule 1."""
    if not encoded.certificate.same_ids:
        return
    last = example.turns[-1]
    possible = []
    for count in {len(shaped), last + 1}:
        try:
            possible.append(oracle.ids(shaped[:count], tools, False))
        except Exception:
            assert count != last + 1, "a template that refuses cannot have been used"
    assert list(example.ids) in possible


def own_words(
    example: Example,
    span: Span,
    encoded: Encoded,
    read: list,
    shaped: list,
    tools: Any,
    chat: Chat,
    oracle: Oracle,
) -> None:
    """Rule 2."""
    ids = [int(i) for i in example.ids[span.start : span.end]]
    assert ids[-1] in chat.stop_ids, "the stop token is trained"
    assert ids[-1] not in ids[:-1], "nothing behind the first stop token is trained"
    whole = oracle.text(shaped[: span.message + 1], tools, False)
    words = blankless(chat.tokenizer.decode(ids, skip_special=False))
    stop = blankless(chat.tokenizer.decode(ids[-1:], skip_special=False))
    if encoded.certificate.composed:
        content = blankless(str(read[span.message].get("content") or ""))
        assert words in blankless(whole + stop) or content.endswith(words.removesuffix(stop))
    elif encoded.certificate.closed:
        assert blankless(whole).endswith(words.removesuffix(stop))
    else:
        prompt = oracle.text(shaped[: span.message], tools, True)
        assert whole.startswith(prompt)
        assert blankless(whole[len(prompt) :]).startswith(words)


def same_context(
    example: Example,
    span: Span,
    encoded: Encoded,
    read: list,
    shaped: list,
    tools: Any,
    chat: Chat,
    oracle: Oracle,
    options: EncodeOptions | None,
) -> None:
    """Rules 3 and 4."""
    before = [int(i) for i in example.ids[: span.start]]
    asked = Conversation(read[: span.message], tools)
    prompt = encode_prompt(asked, chat, options, go_on=False)
    assert before == prompt
    if not encoded.certificate.split_tokens and not encoded.certificate.escaped:
        assert before == oracle.ids(shaped[: span.message], tools, True)


def no_smuggled(
    encoded: Encoded,
    read: list,
    tools: Any,
    chat: Chat,
    options: EncodeOptions | None,
) -> None:
    """Rule 5: as many control tokens as in the same conversation without any in its texts."""
    if not encoded.certificate.escaped:
        return
    control = sorted(chat.control, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, control)))
    harmless = [{**m, "content": pattern.sub("x", m.get("content", ""))} for m in read]
    other = encode_chat(read_conversation(harmless, tools=tools), chat, options)
    for mine, theirs in zip(encoded.examples, other.examples, strict=True):
        assert steering(mine, chat) == steering(theirs, chat)


def steering(example: Example, chat: Chat) -> list[int]:
    return [int(i) for i in example.ids if int(i) in chat.special_ids]


def blankless(text: str) -> str:
    """Without blanks, which some tokenizers put where a stretch begins, and composed.

    Without ▁, too: such tokenizers decode it to a blank even within `<｜end▁of▁sentence｜>`.
    """
    return unicodedata.normalize("NFC", re.sub(r"[\s▁]+", "", text))
