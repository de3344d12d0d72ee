"""Rows in a terminal and in a pipe."""

import io
import re

import numpy as np

from tests.report.worlds import sheet
from whet.report.terminal import Ink, choose_ink, header_lines, row_lines, spans_text

BRACKETS = Ink(("⟦", "⟧"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_and_underline_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert choose_ink().trained == ("\x1b[4;32m", "\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    assert choose_ink().trained == ("[[", "]]")  # StringIO has no encoding to show more


def test_brackets_in_a_pipe_that_knows_only_ascii(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert choose_ink().trained == ("[[", "]]")


def test_each_run_of_trained_tokens_is_marked_once():
    texts, mask = ["a", "b", "c↵\n", "d", "a"], np.array([0, 1, 0.5, 0, 1])
    assert spans_text(texts, mask, BRACKETS) == "a⟦bc↵\n⟧d⟦a⟧"
    assert spans_text(texts, np.ones(5), BRACKETS) == "⟦abc↵\nda⟧"
    assert spans_text([], mask[:0], BRACKETS) == ""
    # Colour ends at each line end: `less -R` shows every line by itself.
    colour = Ink(("\x1b[4;32m", "\x1b[0m"))
    assert spans_text(texts, np.ones(5), colour) == ("\x1b[4;32mabc↵\x1b[0m\n\x1b[4;32mda\x1b[0m")


def test_a_row_shows_its_documents_with_source_and_line():
    shown = sheet()
    text = "\n".join(row_lines(shown, 1, BRACKETS))
    documents = shown.documents[shown.documents["row"] == 1]
    assert text.startswith(f"Row 1  {len(documents)} documents")
    heads = re.findall(r"── (\S+?):(\d+): (\d+) tokens", text)
    assert [(int(line), int(length)) for _, line, length in heads] == [
        (d["line"], d["length"]) for d in documents
    ]
    assert text.count("⟦") == text.count("⟧") == len(documents)
    assert "padding" in text


def test_the_header_tells_the_account_and_what_was_left_out():
    shown = sheet()
    text = "\n".join(header_lines(shown, BRACKETS))
    assert "6 rows of 128 tokens" in text
    assert "12,345: exact duplicates" in text
    assert "data/gsm8k/train.jsonl:17: turn 2: content is a number" in text
    total = sum(account.tokens for account in shown.accounts)
    assert f"{total:,}" in text
