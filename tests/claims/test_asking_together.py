"""Questions of claims side by side, in processes of their own, which see the whole digits."""

import contextlib

import pytest

from lora_lab.claims.reproduce import Reproduce

pytestmark = pytest.mark.usefixtures("quick_figures")

MINE = """
[testbed.small]
about = "digits, a few steps"
tasks = ["digits/relabel"]
recipe = { steps = 4, batch_size = 8, target_modules = ["q_proj"] }

[[claim]]
name = "score"
says = "It scores something"
source = "nobody"
statistic = "task-score"
direction = "higher"
treated = { method = "lora" }
least = 0.01

[[claim]]
name = "halfway"
says = "Halfway there is something"
source = "nobody"
statistic = "on-line"
where = { space = "delta", t = 0.5 }
options = { points = 3, spaces = ["delta"] }
direction = "higher"
treated = { method = "lora" }
least = 0.01

[[claim]]
name = "nothing"
says = "A question that cannot be asked"
source = "nobody"
statistic = "with-layers"
where = { family = "none", label = "x", rescaled = false }
options = { players = "nobody" }
direction = "higher"
treated = { method = "lora" }
least = 0.01
"""


def test_two_processes_ask_what_one_does_and_a_question_without_an_answer_says_why(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(MINE)
    told = {}

    @contextlib.contextmanager
    def stage(what):
        yield lambda *pieces: told.setdefault(what, []).append(pieces)

    question = Reproduce(testbed="small", file=mine, seeds=2)
    result = question.run(tmp_path / "both", processes=2, stage=stage)
    assert list(told)[:2] == ["training 2 adapters", "3 questions, in hundredths"]
    hundredths = told["3 questions, in hundredths"]
    assert hundredths == sorted(hundredths)
    assert hundredths[-1] == (300, 300)
    rows = {row["claim"]: row for row in result.rows()}
    assert "'nobody'" in rows["nothing"]["why"]
    assert [rows[name]["units"] for name in rows] == [2, 1, 0]
    answers = sorted((tmp_path / "both" / "results").iterdir())
    assert len(answers) == 4  # two, each with numbers of examples beside it
    for each in answers:
        each.unlink()
    for name, column in question.run(tmp_path / "both", processes=1).columns.items():
        wanted = result.columns[name]
        assert column == (pytest.approx(wanted) if isinstance(wanted[0], float) else wanted), name
