import json
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making_games import saturating, table_game

from lora_lab.errors import LoraLabWarning, OptionError
from lora_lab.games.estimators import ESTIMATORS, estimate, exact, plan
from lora_lab.games.interactions import interactions
from lora_lab.games.regression import fit_pairs
from lora_lab.results.stats import mean_and_error, student

CASE = json.loads((Path(__file__).parents[1] / "cases/S01_exact_shapley_table/coalitions.json").read_text())
EXPECTED = json.loads((Path(__file__).parents[1] / "cases/S01_exact_shapley_table/expected.json").read_text())
PLAIN = [name for name, entry in ESTIMATORS.items() if not (entry.whole or entry.control or entry.ranking)]


def by_definition(game, n):
    """The mean marginal contribution over all orders."""
    total = np.zeros(n)
    for order in permutations(range(n)):
        row = np.zeros((n + 1, n), bool)
        for place, player in enumerate(order):
            row[place + 1 :, player] = True
        total[list(order)] += np.diff(game(row))
    return total / math.factorial(n)


tables = st.integers(2, 5).flatmap(
    lambda n: st.lists(st.floats(-5, 5, allow_nan=False, width=32), min_size=2**n, max_size=2**n)
)


def players(table):
    return int(math.log2(len(table)))


def test_the_table_of_case_s01():
    names = ["a", "b", "c"]
    table = [CASE[",".join(n for i, n in enumerate(names) if mask >> i & 1)] for mask in range(8)]
    found = exact(table_game(table), 3)
    assert found.values == pytest.approx([EXPECTED["shapley"][name] for name in names], abs=1e-12)
    assert found.values.sum() == pytest.approx(EXPECTED["sum"])
    assert found.efficiency_gap < 1e-12


@given(tables)
def test_exact_values_are_the_mean_over_all_orders(table):
    n = players(table)
    assert exact(table_game(table), n).values == pytest.approx(by_definition(table_game(table), n), abs=1e-9)


@given(tables)
def test_efficiency(table):
    n = players(table)
    for name in ("exact", "permutation", "antithetic", "stratified"):
        with_few = estimate(table_game(table), n, estimator=name, samples=2)
        assert with_few.values.sum() == pytest.approx(table[-1] - table[0], abs=1e-9)


@given(tables, st.integers(0, 99))
def test_a_null_player_gets_nothing_from_any_estimator_of_orders(table, seed):
    n = players(table)
    game = table_game(table)

    def with_null(coalitions):
        return game(coalitions[:, :n])

    for name in ("exact", "permutation", "antithetic", "stratified", "owen"):
        assert estimate(with_null, n + 1, estimator=name, samples=2, seed=seed).values[n] == pytest.approx(0, abs=1e-9)


@given(tables)
def test_symmetric_players_get_the_same(table):
    n = players(table)
    game = table_game(table)

    def twins(coalitions):  # the first two players count only by their number
        count = coalitions[:, 0].astype(int) + coalitions[:, 1]
        rest = coalitions.copy()
        rest[:, 0], rest[:, 1] = count == 2, False
        return game(rest) + count

    values = exact(twins, n).values
    assert values[0] == pytest.approx(values[1], abs=1e-9)


@given(tables, st.floats(-3, 3), st.integers(0, 9))
def test_linearity(table, factor, seed):
    n = players(table)
    other = np.random.default_rng(seed).normal(size=2**n)
    mixed = table_game(np.asarray(table) + factor * other)
    for name in ("exact", "antithetic", "owen", "regression"):
        if name == "regression" and n < 3:
            continue
        a, b, c = (
            estimate(g, n, estimator=name, samples=4, seed=seed).values
            for g in (table_game(table), table_game(other), mixed)
        )
        assert a + factor * b == pytest.approx(c, abs=1e-6)


def test_shapiq_agrees_on_exact_values_and_interactions():
    from shapiq import ExactComputer

    n = 7
    table = np.random.default_rng(3).normal(size=2**n)
    game = table_game(table)
    computer = ExactComputer(game=game, n_players=n)
    theirs = computer("SV", order=1)
    assert exact(game, n).values == pytest.approx([theirs[(i,)] for i in range(n)], abs=1e-10)
    theirs = computer("SII", order=2)
    ours = interactions(game, n, every=True).values
    for i in range(n):
        for j in range(i):
            assert ours[i, j] == ours[j, i] == pytest.approx(theirs[(j, i)], abs=1e-10)


@pytest.mark.filterwarnings("ignore:6000 samples")
@pytest.mark.parametrize("name", ["permutation", "antithetic", "stratified", "owen"])
def test_draws_are_unbiased(name):
    n = 5
    table = np.random.default_rng(1).normal(size=2**n)
    truth = exact(table_game(table), n).values
    found = estimate(table_game(table), n, estimator=name, samples=6000, seed=2)
    assert np.abs(found.values - truth).max() < 4.5 * found.se.max()
    assert found.se.max() < 0.05


@pytest.mark.filterwarnings("ignore:4000 samples")
def test_owen_with_enough_nodes_has_no_error_in_p_and_says_so_otherwise():
    n = 6
    game = table_game(np.random.default_rng(0).normal(size=2**n))
    assert estimate(game, n, estimator="owen", samples=6).bias is None
    assert "2 probabilities" in estimate(game, n, estimator="owen", samples=6, nodes=2).bias
    assert "grid" in estimate(game, n, estimator="owen", samples=6, grid="trapezoid", nodes=5).bias

    for grid in ("gauss", "trapezoid"):  # the shares of the probabilities sum to 1, or sums would come out larger
        added = estimate(lambda coalitions: coalitions @ np.arange(6.0), n, estimator="owen", samples=20, grid=grid)
        assert added.values == pytest.approx(np.arange(6.0), abs=1e-12)

    def only_sizes(coalitions):  # every R of one size is alike, so that only the grid could be wrong
        return (coalitions.sum(1) / n) ** 5

    for nodes in (0, 3):
        found = estimate(only_sizes, n, estimator="owen", samples=4000, nodes=nodes, seed=1)
        assert found.values == pytest.approx(np.full(n, 1 / n), abs=5 * found.se.max())


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_the_fit_to_all_pairs_is_exact_whatever_the_game(n):
    found = exact(table_game(np.random.default_rng(n).normal(size=2**n)), n)
    fitted = fit_pairs(found.coalitions, found.worths)
    assert fitted.values == pytest.approx(found.values, abs=1e-6)
    assert fitted.se.max() == 0
    assert fitted.values.sum() == pytest.approx(found.worths[-1] - found.worths[0])


def test_the_fit_is_exact_from_few_pairs_where_the_game_is_additive():
    weights = np.arange(1.0, 13.0)
    found = estimate(lambda coalitions: coalitions @ weights, 12, estimator="regression", samples=8, seed=0)
    assert len(found.coalitions) < 100
    assert found.values == pytest.approx(weights, rel=1e-3)


def test_too_few_pairs_give_no_standard_error_and_stop_nothing():
    n = 12
    game, truth = saturating(n)
    few = estimate(game, n, estimator="regression", samples=3, seed=0)
    assert np.isnan(few.se).all()
    stopped = estimate(game, n, estimator="regression", samples=200, seed=0, until_se=1e6)
    assert len(stopped.coalitions) >= 2 * 2 * n
    assert (np.abs(stopped.values - truth) <= 4 * stopped.se.max()).all()


def test_the_fit_beats_orders_on_a_saturating_game():
    n = 24
    game, truth = saturating(n)
    errors = {
        name: np.mean(
            [
                np.linalg.norm(estimate(game, n, estimator=name, samples=200, budget=8 * n, seed=seed).values - truth)
                for seed in range(5)
            ]
        )
        for name in ("antithetic", "regression")
    }
    assert errors["regression"] < 0.5 * errors["antithetic"]


@pytest.mark.parametrize("name", PLAIN)
def test_values_are_the_weights_times_the_worths(name):
    n = 6
    table = np.random.default_rng(0).normal(size=2**n)
    found = estimate(table_game(table), n, estimator=name, samples=12, seed=3)
    assert found.weights @ found.worths == pytest.approx(found.values, abs=1e-9)
    assert len(np.unique(found.coalitions, axis=0)) == len(found.coalitions)
    assert found.worths == pytest.approx(table_game(table)(found.coalitions))
    assert found.trace[-1]["values"] == pytest.approx(found.values.tolist(), abs=1e-9)


@pytest.mark.parametrize("name", ["antithetic", "regression", "permutation"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(name):
    n = 10
    game, truth = saturating(n, total=2.0)
    inside = []
    for seed in range(40):
        found = estimate(game, n, estimator=name, samples=30, seed=seed)
        inside += list(np.abs(found.values - truth) <= 1.96 * found.se)
    assert np.mean(inside) > 0.85


@pytest.mark.parametrize("name", PLAIN)
def test_the_seed_decides(name):
    game, _ = saturating(8)
    a, b, c = (estimate(game, 8, estimator=name, samples=16, seed=seed) for seed in (1, 1, 2))
    assert (a.values == b.values).all()
    assert (a.values != c.values).any()


@pytest.mark.parametrize("name", ["antithetic", "regression"])
def test_it_stops_at_the_standard_error_asked_for(name):
    game, _ = saturating(10)
    samples = 600 if name == "antithetic" else 80  # as many as leave pairs unseen
    whole = estimate(game, 10, estimator=name, samples=samples, seed=0)
    early = estimate(game, 10, estimator=name, samples=samples, seed=0, until_se=4 * whole.se.max())
    assert early.se.max() * student(early.draws) / 1.959964 <= 4 * whole.se.max()  # as few draws leave it uncertain
    assert early.draws < 0.7 * whole.draws


@pytest.mark.parametrize("name", ["permutation", "antithetic", "regression"])
def test_a_budget_is_kept(name):
    asked = set()
    game, _ = saturating(9)

    def counting(coalitions):
        asked.update(row.tobytes() for row in coalitions)
        return game(coalitions)

    estimate(counting, 9, estimator=name, samples=500, budget=70)
    assert 40 < len(asked) <= 70


def test_the_pairs_of_the_fit_are_all_different_and_in_the_end_all():
    game = table_game(np.random.default_rng(1).normal(size=64))
    with pytest.warns(LoraLabWarning, match="exact is cheaper"):
        found = estimate(game, 6, estimator="regression", samples=200)
    assert len(found.coalitions) == 64
    assert found.values == pytest.approx(exact(game, 6).values, abs=1e-6)
    shorten = plan(12, estimator="regression", samples=20)
    rows = {row.tobytes() for draw in shorten for row in draw.coalitions}
    assert len(rows) == 2 * len(shorten)


@pytest.mark.parametrize(
    ("name", "budget", "text"),
    [
        ("antithetic", 7, "one draw of antithetic alone asks for 12"),
        ("stratified", 10, "one draw of stratified alone asks for"),
        ("owen", 10, "one draw of owen alone asks for"),
        ("exact", 10, "exact values of 6 players need 64"),
        ("regression", 10, "too few for a fit to 6 players; a larger budget"),
    ],
)
def test_a_budget_too_small_is_refused_with_the_number_needed(name, budget, text):
    game, _ = saturating(6)
    with pytest.raises(OptionError, match=text):
        estimate(game, 6, estimator=name, samples=20, budget=budget)


def test_what_is_planned_is_what_is_asked_for():
    asked = set()
    game, _ = saturating(7)

    def counting(coalitions):
        asked.update(row.tobytes() for row in coalitions)
        return game(coalitions)

    estimate(counting, 7, estimator="antithetic", samples=10, seed=4)
    draws = plan(7, estimator="antithetic", samples=10, seed=4)
    assert asked == {row.tobytes() for draw in draws for row in draw.coalitions}
    assert len(draws) == 5  # pairs of orders


def test_draws_with_a_worth_that_is_not_finite_are_left_out():
    game, _ = saturating(6)

    def with_hole(coalitions):
        worths = game(coalitions)
        worths[(coalitions[:, 0]) & (coalitions.sum(1) == 3)] = np.nan
        return worths

    found = estimate(with_hole, 6, estimator="permutation", samples=60, seed=0)
    assert found.draws < 60
    assert np.isfinite(found.values).all()
    assert np.isfinite(estimate(with_hole, 6, estimator="regression", samples=30).values).all()
    with pytest.raises(OptionError, match="10 of 64 have no finite worth"):
        exact(with_hole, 6)
    with pytest.raises(OptionError, match="no draw of coalitions has finite worths"):
        estimate(lambda coalitions: np.full(len(coalitions), np.nan), 6, samples=4)


def test_interactions_of_a_product_and_of_a_sum():
    def product(coalitions):
        return (coalitions[:, 0] & coalitions[:, 1]).astype(float) + coalitions[:, 2] * 2.0

    for options in ({"every": True}, {"samples": 60}):
        values = interactions(product, 4, **options).values
        assert values[0, 1] == values[1, 0] == pytest.approx(1)
        values[0, 1] = values[1, 0] = 0
        assert values == pytest.approx(np.zeros((4, 4)))


def test_sampled_interactions_are_unbiased():
    n = 5
    game = table_game(np.random.default_rng(5).normal(size=2**n))
    truth = interactions(game, n, every=True).values
    found = interactions(game, n, samples=4000, seed=0)
    assert (np.abs(found.values - truth) <= 4.5 * found.se).all()


def test_standard_errors_are_those_of_a_mean_of_draws():
    """Sample standard deviation over √draws: 3 draws of 1, 2, 6 have √7 / √3."""
    draws = np.array([[1.0, 4.0], [2.0, 4.0], [6.0, np.nan]])
    mean, error = mean_and_error(draws)
    assert mean == pytest.approx([3, 4])
    assert error[0] == pytest.approx(math.sqrt(7) / math.sqrt(3))
    # two equal draws: another one, 5 away as draws of the other column are, may have a probability of 1 − √.025
    assert student(2) * error[1] == pytest.approx(5 * (1 - math.sqrt(0.025)))
    assert np.isnan(mean_and_error(draws[:1])[1]).all()
    game, _ = saturating(5)
    found = estimate(game, 5, estimator="permutation", samples=7, seed=0)
    each = []
    for draw in plan(5, estimator="permutation", samples=7, seed=0):
        each.append(draw.weights @ game(draw.coalitions))
    assert found.se == pytest.approx(np.std(each, axis=0, ddof=1) / math.sqrt(7))


def test_one_player_has_everything():
    for name in ESTIMATORS:
        found = estimate(lambda coalitions: coalitions[:, 0] * 3.0 + 1, 1, estimator=name, samples=1)
        assert found.values == pytest.approx([3.0])
        assert found.se.tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"estimator": "antithetc"}, r"did you mean 'antithetic'\?"),
        ({"samples": 0}, "0 samples; at least 1"),
        ({"until_se": 0.0}, "a number above 0"),
        ({"budget": 3}, "one order of 5 players alone needs 6"),
        ({"estimator": "owen", "samples": 9, "grid": "simpson"}, "there are: gauss, trapezoid"),
        ({"estimator": "owen", "samples": 9, "nodes": -1}, "-1 nodes"),
        ({"estimator": "regression", "samples": 1}, "2 draws of coalitions are too few"),
    ],
)
def test_options_that_cannot_be_are_refused(options, text):
    game, _ = saturating(5)
    with pytest.raises(OptionError, match=text):
        estimate(game, 5, **options)


def test_more_samples_than_coalitions_are_remarked_on():
    game, _ = saturating(4)
    with pytest.warns(LoraLabWarning, match="only 16 coalitions of 4 players: the estimator exact is cheaper"):
        estimate(game, 4, samples=20)


def test_too_many_players_are_not_enumerated():
    with pytest.raises(OptionError, match=r"2\^30 coalitions are too many"):
        exact(lambda coalitions: coalitions.sum(1), 30)


@pytest.mark.parametrize("estimator", ["permutation", "antithetic", "stratified", "owen"])
def test_intervals_of_few_draws_hold_the_values_as_often_as_they_say(estimator):
    """Or nearly: a single order's contributions are skewed. Intervals of 1.96 standard errors hold far fewer."""
    n, inside, too_narrow = 8, [], []
    game, values = saturating(n)
    per_draw = plan(n, estimator=estimator, samples=1)[0].marginals
    for seed in range(150):
        found = estimate(game, n, estimator=estimator, samples=4 * per_draw, seed=seed)
        assert found.draws == 4
        error = np.abs(found.values - values)
        inside.append(error <= student(4) * found.se + 1e-12)
        too_narrow.append(error <= 1.96 * found.se + 1e-12)
    assert 0.87 < np.mean(inside) < 0.99
    assert np.mean(too_narrow) < np.mean(inside) - 0.04
