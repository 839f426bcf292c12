"""The table of claims stays readable in the widths that terminals have."""

from pathlib import Path

import pytest

from lora_lab.cli import terminal
from lora_lab.cli.studies import reproduce
from lora_lab.results.result import Result

STORED = Path(__file__).parents[3] / "figures" / "results"


@pytest.fixture
def shown(monkeypatch, capsys):
    """Lines of the table at a width."""

    def show(name, width, *, published):
        monkeypatch.setattr(terminal.console, "_width", width)
        result = Result.load(STORED / f"claims_{name}.json")
        reproduce.show(result, published=published)
        return result, capsys.readouterr().out.splitlines()

    return show


@pytest.mark.parametrize("width", [100, 120, 150])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_no_name_or_number_is_broken_and_no_line_is_too_wide(shown, name, published, width):
    result, lines = shown(name, width, published=published)
    assert max(map(len, lines)) <= width
    rows = [line.split()[:2] for line in lines[2:] if line[:1].strip()][: len(result.rows())]
    tasks = {
        "digits/relabel": "relabel",
        "data/fashion/rotation.toml": "rotation",
        "data/fashion/rotated.toml": "rotated",
    }
    merged = str(len(result.parameters["merged"]))
    assert rows == [[row["claim"], tasks.get(row["task"], merged)] for row in result.rows()]
    if not published:
        assert len(lines) <= len(rows) + 6 + len(result.parameters["merged"]) // 4  # a line each, and what was merged
        assert all(f"{row['of_treated']:.3f}" in line for row, line in zip(result.rows(), lines[2:], strict=False))


def test_what_was_published_stands_in_one_column_and_tasks_of_merges_below(shown):
    _, lines = shown("digits", 150, published=True)
    (fusion,) = (line for line in lines if line.startswith("fusion-score "))
    assert "4 tasks  LLaMA-2-7B, 9 tasks: 47.2 → 58.5; +11.3 (mean score)" in fusion
    assert "4 tasks: identity, mod3, mod5, div2" in lines
    (ties,) = (line for line in lines if line.startswith("ties "))
    assert ties.split()[:4] == ["ties", "4", "tasks", "0.866"]  # nothing was published
