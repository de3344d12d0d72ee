"""The text of a reply as its tokens come."""

from collections.abc import Sequence

from whet.chat.tokenizer import Tokenizer

WINDOW = 64
"""Tokens after which the beginning is no longer decoded again, so that long replies stay cheap."""
KEPT = 8


def opened_thought(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """`<think>` where the prompt ends with it: the template begins the thinking for the model, so
    that the reply holds its end only. Else nothing."""
    asked = tokenizer.decode(prompt[-16:], skip_special=False)
    return "<think>" if asked.rstrip().endswith("<think>") else ""


class TextStream:
    """Decodes token by token; half a character waits for its other half.

    Decoders treat the beginning of a text in their own way (a leading space goes); so a text that
    goes on after some tokens, `before`, is decoded after them, and their text is taken away.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int] = (), show_control: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.show_control = show_control
        self.window = list(before)
        self.shown = len(self._decoded())

    def push(self, token: int) -> str:
        """What becomes certain with `token`."""
        self.window.append(token)
        text = self._decoded()
        if text.endswith("\ufffd"):
            return ""
        new = text[self.shown :]
        if len(self.window) > WINDOW:
            self.window = self.window[-KEPT:]
            text = self._decoded()
        self.shown = len(text)
        return new

    def end(self) -> str:
        """What is left, complete or not."""
        return self._decoded()[self.shown :]

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.window, skip_special=not self.show_control)
