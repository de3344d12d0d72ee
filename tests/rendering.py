"""Renderings of a chat template, as tests ask for them."""

from datetime import date
from typing import Any

from whet.chat.template import ChatTemplate


def render(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    today: date | None = None,
    variables: dict[str, Any] | None = None,
) -> str:
    """The text of `messages`."""
    return template.answer(
        ("render", messages, tools, None, add_generation_prompt), today, variables
    )
