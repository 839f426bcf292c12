"""Progress where there is no terminal: a line when the last one is old enough."""

import io

import pytest
from rich.console import Console

from lora_lab import progress


def test_where_there_is_no_terminal_a_line_is_written_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    with progress.bar("merging by ties", Console(file=text, width=200)) as report:
        for second in range(0, 100, 10):
            now[0] = float(second)
            report(second // 10, 20)
    assert text.getvalue().splitlines() == [
        "merging by ties: 3 of 20 after 30 s, about 3 min left",
        "merging by ties: 6 of 20 after 60 s, about 2 min left",
        "merging by ties: 9 of 20 after 2 min, about 2 min left",
    ]


@pytest.mark.parametrize(("total", "left"), [(4, ", about 2 min left"), (160, "")])
def test_the_first_of_many_pieces_tells_no_time_left(monkeypatch, total, left):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    with progress.bar("training", Console(file=text, width=200)) as report:
        now[0] = 45.0
        report(1, total)
    assert text.getvalue() == f"training: 1 of {total} after 45 s{left}\n"


def test_what_is_soon_done_says_nothing_in_a_pipe():
    text = io.StringIO()
    with progress.bar("merging", Console(file=text)) as report:
        report(1, 2)
    assert text.getvalue() == ""
