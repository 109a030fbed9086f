"""What the console says while something runs, with a clock that the tests set."""

import pytest

from keyreduce.cli import console as consoles
from keyreduce.cli.console import Console, speed


@pytest.fixture
def clock(monkeypatch):
    """A list whose last entry is the time, in seconds."""
    times = [1000.0]
    monkeypatch.setattr(consoles.time, "monotonic", lambda: times[-1])
    return times


def test_a_log_gets_a_line_every_half_minute(clock, capsys):
    with Console(as_json=False).progress("calibrating", 120_000, "tokens") as advance:
        for second in range(0, 100, 10):
            clock.append(1000.0 + second)
            advance(1000)
    out, err = capsys.readouterr()
    assert out == ""
    # After 30, 60 and 90 s: 4,000, 7,000 and 10,000 tokens; so 133, 117 and 111 of them a second.
    assert err.splitlines() == [
        "calibrating: 3% of 120k tokens, 133 tokens/s, 0:14:30 left",
        "calibrating: 6% of 120k tokens, 117 tokens/s, 0:16:09 left",
        "calibrating: 8% of 120k tokens, 111 tokens/s, 0:16:30 left",
    ]


def test_without_a_total_a_line_counts(clock, capsys):
    with Console(as_json=True).progress("reading", None, "B") as advance:
        clock.append(1040.0)
        advance(5_000_000_000)
    assert capsys.readouterr() == ("", "reading: 5 GB, 125 MB/s\n")


def test_what_is_short_or_quiet_says_nothing(clock, capsys):
    with Console(as_json=False).progress("writing", 10, "B") as advance:
        clock.append(1029.0)
        advance(10)
    with Console(as_json=False, is_quiet=True).progress("writing", 10, "B") as advance:
        clock.append(2000.0)
        advance(10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("rate", "unit", "words"),
    [
        (123_000_000, "B", "123 MB/s"),
        (999, "B", "999 B/s"),
        (12_345, "tokens", "12.3k tokens/s"),
        (0.5, "layers", "30 layers/min"),
        (0.001, "runs", "3.6 runs/h"),
        (0, "runs", "0 runs/h"),
    ],
)
def test_speed(rate, unit, words):
    assert speed(rate, unit) == words
