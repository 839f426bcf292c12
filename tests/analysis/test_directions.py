"""Which way is better: merges, coefficients and verdicts by metrics of which more or less is better, in closed form."""

import numpy as np
import pytest
from making_measured import task

from lora_lab.analysis.merge_tables.coefficients import _best, _curve, kept_of
from lora_lab.analysis.merge_tables.rows import measured, signed
from lora_lab.analysis.merge_tables.verdicts import UNTOLD, NullScores, Outcomes, null_rows
from lora_lab.merging.validation.search import _order
from lora_lab.tasks.scores.judging import Judge, all_shares, kept
from lora_lab.tasks.task import Scores, Split

NO_EXAMPLES = Split({})


def of(metric, columns):
    """A judge by one metric, and scores of these columns."""
    scores = Scores({name: np.array(values) for name, values in columns.items()})
    return Judge(task(metric), NO_EXAMPLES, (), scores), scores


ACCURATE = of("accuracy", {"correct": [True, True, True, False], "loss": [0.1, 0.2, 0.3, 0.4]})
LOSSY = of("loss", {"loss": [0.5, 1.0, 1.5, 1.0]})
FALSE = of("unextracted", {"unextracted": [True, False, False, False], "loss": [1.0] * 4})


def other(judge, columns):
    return Scores({name: np.array(values) for name, values in columns.items()})


def test_only_shares_of_which_more_is_better_are_told_as_a_share_of_the_adapters_own():
    assert ACCURATE[0].shares
    assert not LOSSY[0].shares
    assert not FALSE[0].shares  # a share, of which less is better
    assert all_shares([ACCURATE[0]])
    assert not all_shares([ACCURATE[0], FALSE[0]])


def test_what_is_kept_is_more_where_it_is_better():
    judges, own = [LOSSY[0]], np.array([1.0])
    assert kept(judges, np.array([[0.8], [1.3]]), own).tolist() == pytest.approx([0.2, -0.3])
    judges, own = [ACCURATE[0]], np.array([0.5])
    assert kept(judges, np.array([[0.4], [0.6]]), own).tolist() == pytest.approx([0.8, 1.2])
    assert kept(judges, np.array([[0.4]]), np.array([0.0])).tolist() == [0.4]  # no share of nothing
    both = [ACCURATE[0], LOSSY[0]]  # in shares of |own|, 0.1/0.5 better and 0.5/2 worse
    assert kept(both, np.array([0.6, 2.5]), np.array([0.5, 2.0])) == pytest.approx((0.2 - 0.25) / 2)
    assert kept(both, np.array([0.6, -2.5]), np.array([0.5, -2.0])) == pytest.approx((0.2 + 0.25) / 2)


def test_what_a_merge_keeps_is_of_the_merge_and_not_of_the_adapters():
    judge, own = ACCURATE
    merged = other(judge, {"correct": [True, False, False, False], "loss": [1.0] * 4})
    assert kept_of([[merged]], [[own]], [judge]) == pytest.approx(0.25 / 0.75)


@pytest.mark.parametrize(
    ("judged", "columns", "cell", "value"),
    [
        (ACCURATE, {"correct": [True, False, True, False], "loss": [1.0] * 4}, "normalised", 0.5 / 0.75),
        (LOSSY, {"loss": [1.0, 2.0, 1.5, 1.5]}, "lost", 0.5),
        (FALSE, {"unextracted": [True, True, True, False], "loss": [1.0] * 4}, "lost", 0.5),
    ],
    ids=["accuracy", "loss", "unextracted"],
)
def test_a_row_tells_what_is_kept_or_how_much_worse_it_became(judged, columns, cell, value):
    judge, own = judged
    merged = other(judge, columns)
    (row,), whole = measured({}, [("task", "adapter")], [[merged]], [[own]], [judge], 0)
    assert row[cell] == whole[cell] == pytest.approx(value)
    assert row[f"{cell}_low"] <= value <= row[f"{cell}_high"]
    assert row["lost" if cell == "normalised" else "normalised"] is None
    assert row[judge.name] == pytest.approx(judge.value([merged]))


def test_outcomes_that_are_compared_are_more_where_they_are_better():
    judge, own = LOSSY
    assert signed(judge, [own], [own], [judge]).tolist() == [-0.5, -1.0, -1.5, -1.0]
    both = [judge, ACCURATE[0]]
    assert signed(judge, [own], [own], both).tolist() == [-0.5, -1.0, -1.5, -1.0]  # its own size is 1
    half = other(judge, {"loss": [1.0, 2.0, 3.0, 2.0]})
    assert signed(judge, [half], [half], both).tolist() == pytest.approx([-0.5, -1.0, -1.5, -1.0])
    below = other(judge, {"loss": [-1.0, -2.0, -3.0, -2.0]})  # such as a log-density: as better as it is lower
    assert signed(judge, [below], [below], both).tolist() == pytest.approx([0.5, 1.0, 1.5, 1.0])


def test_the_coefficient_at_which_most_is_kept_is_chosen_then_the_one_of_least_loss():
    assert _best([0.5, 1.0, 2.0], [0.7, 0.9, 0.8], [1.0, 2.0, 0.5]) == 1.0
    assert _best([0.5, 1.0, 2.0], [0.9, 0.9, 0.8], [1.0, 2.0, 0.5]) == 0.5
    assert _best([0.5, 1.0], [np.nan, -3.0], [0.0, 9.0]) == 1.0
    assert _best([0.5, 1.0], [0.9, 0.9], [np.inf, 9.0]) == 1.0


def test_a_curve_over_coefficients_is_kept_by_the_metric_that_judges():
    judge, own = LOSSY
    tried = {c: [[other(judge, {"loss": [c] * 4})]] for c in (2.0, 0.5)}
    curve, judged = _curve(tried, [[own]], [judge])
    assert curve["coefficient"] == [0.5, 2.0]
    assert curve["loss"] == [0.5, 2.0]
    assert list(judged) == pytest.approx([0.5, -1.0])
    assert np.isnan(curve["normalised"]).all()


def tried(better, loss, names=("accuracy",)):
    return {"loss": loss}, better, set(names)


def test_a_search_takes_the_best_mean_then_the_lowest_loss():
    assert _order([tried([0.5], 1.0), tried([0.9], 3.0), tried([0.9], 2.0)]) == [2, 1, 0]
    assert _order([tried([np.nan], 0.1), tried([-5.0], 9.0)]) == [1, 0]
    assert _order([tried([0.9], np.nan), tried([0.9], 9.0)]) == [1, 0]


def test_a_search_by_several_metrics_goes_by_places_and_not_by_their_sizes():
    names = ("accuracy", "rmse")
    # by size the first would win for its rmse alone; by places the second is best in one and second in the other
    rows = [([0.1, -1.0], 1.0), ([0.9, -90.0], 1.0), ([0.8, -100.0], 1.0)]
    assert _order([tried(better, loss, names) for better, loss in rows])[0] == 1


def test_a_merge_of_more_is_ahead_and_one_of_less_is_behind():
    generator, made = np.random.default_rng(0), Outcomes()
    for i in range(4):
        noise = generator.normal(size=50)
        made.members.append((2 * i, 2 * i + 1))
        for name, shift in (("first", 0.0), ("more", 0.5), ("less", -0.5)):
            made.add(name, [noise + shift + 0.01 * generator.normal(size=50)] * 2)
    found = made.compared("first")
    assert found["more"]["difference"] == pytest.approx(0.5, abs=0.01)
    assert (found["more"]["verdict"], found["less"]["verdict"]) == ("ahead", "behind")


def test_what_one_merge_would_tell_twenty_do_not():
    """Of one p-value between .0025 and .05: Holm's of twenty such are above .05."""
    generator = np.random.default_rng(1)
    noise = [generator.normal(size=200) for _ in range(4)]
    shifts = [each - each.mean() + 0.09 for each in noise]

    def compared(count):
        made = Outcomes()
        for i, shift in enumerate(shifts):
            made.members.append((2 * i, 2 * i + 1))
            for name in ["first", *map(str, range(count))]:
                made.add(name, [shift * (name != "first")])
        return made.compared("first")

    (one,) = compared(1).values()
    assert 0.0025 < one["p"] < 0.05
    assert one["verdict"] == "ahead"
    twenty = compared(20)
    assert {row["verdict"] for row in twenty.values()} == {UNTOLD}
    assert {row["p"] for row in twenty.values()} == {one["p"]}


def test_sets_that_share_adapters_count_for_fewer():
    apart, shared = Outcomes(), Outcomes()
    generator = np.random.default_rng(2)
    for i in range(4):
        noise = 0.2 * i + generator.normal(size=30)
        for made, members in ((apart, (2 * i, 2 * i + 1)), (shared, (0, i + 1))):
            made.members.append(members)
            made.add("first", [np.zeros(30)])
            made.add("other", [noise])
    wide, narrow = (made.compared("first")["other"] for made in (shared, apart))
    assert wide["difference"] == pytest.approx(narrow["difference"])
    assert wide["p"] > narrow["p"]


@pytest.mark.parametrize(
    ("value", "verdict", "p", "p_below"),
    [
        (38.5, "above the null", 2 / 40, 39 / 40),
        (37.5, UNTOLD, 3 / 40, 38 / 40),
        (1.5, "below the null", 39 / 40, 2 / 40),
        (2.5, UNTOLD, 38 / 40, 3 / 40),
    ],
)
def test_what_is_above_all_draws_of_a_null_but_one_in_forty_is_told(value, verdict, p, p_below):
    draws = tuple(range(1, 40))
    (row,) = null_rows([NullScores(("lora", None), "ties", "gaussian", "all", value, draws)], {"gaussian": True})
    assert (row["p"], row["p_below"], row["verdict"]) == (pytest.approx(p), pytest.approx(p_below), verdict)
