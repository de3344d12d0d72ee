"""Progress lines say how much is done, how fast and how long it will take."""

import io
import sys

import pytest

from whet import progress
from whet.progress import count, duration, track


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY_S", 0.0)
    with track("Packing", total=4, unit="rows") as bar:
        bar.advance(1)
        bar.advance(3, note="full 99 %")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Packing: 1 of 4 rows (25 %), ")
    assert "s left" in lines[0]
    assert lines[-1].startswith("Packing: 4 of 4 rows (100 %), ")
    assert lines[-1].endswith("full 99 %")


def test_what_is_short_or_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with track("Short", total=1) as bar:
        bar.advance()
    with track("Quiet", total=1, quiet=True) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def test_a_pause_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with track("Training", total=4, unit="steps") as bar:
        bar.started = 0.0
        with bar.paused():
            clock[0] = 1000.0
        clock[0] += 2.0
        bar.advance(2)
        assert bar.line() == "Training: 2 of 4 steps (50 %), 1 steps/s, 2 s left"


def test_slow_work_is_told_by_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with track("Examining", total=4, unit="checks") as bar:
        bar.started, clock[0] = 0.0, 60.0
        assert bar.line() == "Examining: 0 of 4 checks (0 %)"
        bar.advance(2)
        assert bar.line() == "Examining: 2 of 4 checks (50 %), 30 s a check, 60 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "1:40 min"), (3599, "59:59 min"), (291_043, "80:50 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bars_take_turns_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with track("Training", total=2, unit="steps") as bar:
        bar.advance()
        with bar.paused(), track("Dev loss", total=1, unit="rows") as inner:
            inner.advance()
        bar.advance()
    words = [screen.getvalue().rfind(word) for word in ("Dev loss", "Training")]
    assert 0 < words[0] < words[1]


@pytest.mark.parametrize(
    ("total", "done", "text"),
    [
        (2.2, 0.44, "Encoding: 0.44 of 2.20 MB (20 %)"),
        (220.4, 44.1, "Encoding: 44 of 220 MB (20 %)"),
        (None, 0.44, "Encoding: 0.44 MB"),
    ],
)
def test_little_is_not_shown_as_nothing(total, done, text) -> None:
    with track("Encoding", total=total, unit="MB", quiet=True) as bar:
        bar.advance(done)
        assert bar.line().startswith(text)


def test_a_count_of_one_is_no_plural() -> None:
    found = [count(1, "rows"), count(0, "rows"), count(2000, "rows of text"), count(1, "rows of x")]
    assert found == ["1 row", "0 rows", "2,000 rows of text", "1 row of x"]
