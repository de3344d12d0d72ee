"""Text that comes token by token is the text of all tokens."""

import pytest

from tests.tiny import tokenizer
from whet.generate.text import WINDOW, TextStream


@pytest.mark.parametrize("text", ["one two " * 3 * WINDOW, "🙂 é " * WINDOW, " plus", ""])
def test_pieces_are_the_whole_text_however_long(text: str) -> None:
    tok = tokenizer()
    stream = TextStream(tok)
    pieces = [stream.push(token) for token in tok.encode(text)]
    assert "".join(pieces) + stream.end() == text
    assert len(stream.window) <= WINDOW + 4
    assert not any("\ufffd" in piece for piece in pieces)
