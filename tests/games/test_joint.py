"""Gates joined with coalitions: algebra of the process, what few and many pairs give, and honest intervals."""

import itertools
import math

import numpy as np
import pytest
from making_games import Multilinear, saturating, table_game
from test_gates import Smooth, pairs_and_saturation

from lora_lab.games import joint
from lora_lab.games.coalitions import all_coalitions, every_coalition
from lora_lab.games.estimators import estimate, exact
from lora_lab.games.expansion import Expansion, expansion
from lora_lab.games.gates import Diagonal, Rows, additive, diagonal, link
from lora_lab.games.joint import _Prior, _Process
from lora_lab.games.regression import balanced, regression
from lora_lab.results.stats import student

pytestmark = pytest.mark.filterwarnings("ignore:.*the estimator exact is cheaper")


def error(found, truth):
    return np.linalg.norm(found.values - truth) / np.linalg.norm(truth)


def asked(game, n, count, seed=0, name="joint"):
    """An estimate from so many pairs of complements."""
    return estimate(game, n, estimator=name, samples=10_000, budget=2 + 2 * count, seed=seed)


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("n", [2, 3, 6])
def test_covariances_of_values_are_those_of_the_games_they_are_values_of(n, part):
    """Values are W v, so that Cov(φ, v) = W Cov(v, v) and Var φ = diag(W Cov(v, v) Wᵀ), over all coalitions."""
    generator = np.random.default_rng(n)
    every = every_coalition(n)
    z = 2.0 * every.coalitions - 1
    w = generator.random(n)
    w = w / w.sum()
    g = z @ w
    odd = generator.normal(size=(2**n, 3))
    features = np.column_stack([g**3, odd - odd[::-1]])
    process = _Process(z, w, features, every.weights @ features)
    theta = np.eye(8)[part]
    of_games = process.covariance(theta)
    if part == 0:  # noise is odd, too: what a coalition has, its complement lacks
        of_games = np.eye(2**n) - np.eye(2**n)[::-1]
    assert process.of_values(theta) == pytest.approx(every.weights @ of_games, abs=1e-9)
    assert process.prior(theta) == pytest.approx(np.diag(every.weights @ of_games @ every.weights.T), abs=1e-9)


def test_triples_are_products_of_three_different_players():
    z = 2.0 * all_coalitions(4) - 1
    w = np.array([0.1, 0.2, 0.3, 0.4])
    found = _Process(z, w, np.zeros((16, 4)), np.zeros((4, 4))).parts()[1]
    triples = [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]
    expected = sum(w[list(t)].prod() * np.outer(z[:, t].prod(1), z[:, t].prod(1)) for t in triples)
    assert found == pytest.approx(expected / sum(w[list(t)].prod() for t in triples))


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_with_all_pairs_the_values_are_exact_whatever_the_gates_say(n):
    generator = np.random.default_rng(0)
    game = Multilinear(generator.normal(size=2**n), gates=generator.normal(size=2**n))
    found = estimate(game, n, estimator="joint", samples=500)
    assert found.values == pytest.approx(exact(game, n).values, abs=1e-9)
    assert found.se.tolist() == [0] * n


@pytest.mark.parametrize("count", [0, 1, 2, 7, 30])
def test_efficiency_holds_whatever_the_gates_say(count):
    generator = np.random.default_rng(1)
    game = Multilinear(generator.normal(size=2**8), gates=generator.normal(size=2**8))
    found = asked(game, 8, count)
    assert len(found.coalitions) == 2 + 2 * count
    assert found.efficiency_gap < 1e-9
    assert np.isfinite(found.se).all()


def test_without_pairs_it_is_what_the_gates_say():
    game, truth = pairs_and_saturation(10)
    alone = asked(game, 10, 0)
    along = diagonal(game)
    assert alone.values == pytest.approx(expansion(along, along.ends, link(along, along.ends)).values, abs=1e-9)
    assert error(alone, truth) < 0.05


@pytest.mark.parametrize("count", [4, 12, 40, 120])
def test_it_is_at_or_below_the_link_and_the_regression_at_every_budget(count):
    errors = {"joint": [], "link": [], "regression": []}
    for seed in range(12):
        game, truth = pairs_and_saturation(12, seed, strength=0.3)
        for name, found in errors.items():
            if name != "regression" or count >= 12:
                found.append(error(asked(game, 12, count, seed, name), truth))
    ours = np.mean(errors["joint"])
    assert ours < 1.05 * np.mean(errors["link"])
    if count >= 12:
        assert ours < 0.8 * np.mean(errors["regression"])


def test_gates_that_mislead_are_no_worse_than_none():
    errors = {"joint": [], "regression": []}
    for seed in range(12):
        game, truth = pairs_and_saturation(12, seed)
        wrong = Smooth(game.worth, lambda g, game=game: np.roll(game.gradient(g), 5), 12)
        for name, found in errors.items():
            found.append(error(asked(wrong, 12, 40, seed, name), truth))
    assert np.mean(errors["joint"]) < 1.0 * np.mean(errors["regression"])


def voted(coalitions):
    return (coalitions @ np.array([5.0, 4, 3, 2, 2, 1, 1, 1]) > 9).astype(float)


def held(table, gates, count):
    """How often the intervals of all players hold the truth."""
    game, truth = Multilinear(table, gates), exact(table_game(table), 8).values
    inside = []
    for seed in range(8):
        found = asked(game, 8, count, seed)
        inside.append(np.abs(found.values - truth) <= student(count) * found.se + 1e-9)
    return np.mean(inside)


EVERY = all_coalitions(8)
SMOOTH = pairs_and_saturation(8, strength=1.0)[0](EVERY)
TURNED = SMOOTH[EVERY[:, ::-1] @ (1 << np.arange(8))]  # the last player has the first one's gate
TABLES = {
    "additive": EVERY @ np.linspace(-1, 2, 8),
    "saturating": saturating(8)[0](EVERY),
    "interactions": SMOOTH,
    "voting": voted(EVERY),
    "four needed": EVERY[:, :4].all(1).astype(float),
}


@pytest.mark.parametrize("count", [4, 20])
def test_intervals_hold_the_truth_about_as_often_as_they_say(count):
    inside = {name: held(table, None, count) for name, table in TABLES.items()}
    inside |= {f"{name}, misled": held(table, TURNED, count) for name, table in TABLES.items()}
    assert min(inside.values()) > 0.85, inside
    assert np.mean(list(inside.values())) > 0.93, inside


def test_the_expansion_is_the_link_game_where_slopes_keep_their_proportions():
    n = 9
    game, _ = pairs_and_saturation(n, strength=0.0)
    along = diagonal(game)
    every = all_coalitions(n)
    assert Expansion(along, along.ends)(every) == pytest.approx(link(along, along.ends).game(every), abs=1e-9)


def test_many_players_of_one_sum_are_valued_as_the_link_values_them():
    game, truth = pairs_and_saturation(20, strength=0.0)
    assert error(asked(game, 20, 0), truth) < 1e-3
    assert error(asked(game, 20, 30), truth) < 1e-3


def margins(examples, n):
    """An accuracy: the share of examples whose sum of parts is above 0, with its gates by example."""
    generator = np.random.default_rng(0)
    parts, start = generator.normal(0.3, 1, (examples, n)), generator.normal(-1, 1, examples)

    def worth(coalitions):
        return (start + coalitions @ parts.T > 0).mean(1)

    def along(places, shares, **options):
        numbers = start + np.outer(places, parts.sum(1))
        slopes = np.repeat(parts[None], len(places), 0)
        ends = np.stack([start, start + parts.sum(1)])
        rows = Rows(numbers, slopes, ends, lambda found: (found > 0).astype(float))
        smooth = 1 / (1 + np.exp(-numbers / 2))
        slopes_of_all = ((smooth * (1 - smooth) / 2)[..., None] * slopes).mean(1)
        return Diagonal(places, shares, smooth.mean(1), slopes_of_all, 1 / (1 + np.exp(-ends / 2)).mean(1), rows)

    return type("Margins", (), {"__call__": lambda self, c: worth(c), "along": lambda self, *a, **o: along(*a, **o)})()


@pytest.mark.parametrize("n", [6, 13])
def test_margins_by_example_tell_an_accuracy_that_has_no_gradient(n):
    game = margins(50, n)
    found = asked(game, n, 0)
    assert found.values == pytest.approx(exact(game, n).values, abs=1e-6)
    blunt = estimate(game, n, estimator="link")
    assert np.abs(blunt.values - exact(game, n).values).max() > 1e-3


@pytest.mark.parametrize("count", [0, 9])
def test_values_are_means_of_those_of_the_examples(count):
    n = 6
    game = margins(40, n)
    found = asked(game, n, count, seed=3)
    generator = np.random.default_rng(0)
    parts, start = generator.normal(0.3, 1, (40, n)), generator.normal(-1, 1, 40)
    by_example = (start + found.coalitions @ parts.T > 0).astype(float)
    values = found.known_of + found.weights @ by_example
    assert values.mean(1) == pytest.approx(found.values, abs=1e-9)
    each = exact(lambda c: (start[0] + c @ parts[0] > 0).astype(float), n).values
    assert values[:, 0] == pytest.approx(each, abs=1e-6)  # the expansion is exact here, on every example


def test_thousands_of_players_overflow_nothing():
    n = 1100  # C(1100, 550) is no float
    game = Smooth(lambda g: 1 - math.exp(-g.mean()), lambda g: np.full(n, math.exp(-g.mean()) / n), n)
    along = diagonal(game)
    known = additive(along, along.ends)
    drawn = np.concatenate([draw.coalitions for draw in itertools.islice(balanced(n, np.random.default_rng(0)), 5)])
    found = _Prior(known, known).fit(drawn, game(drawn) - known.game(drawn))
    assert np.isfinite(found.values).all()
    assert np.isfinite(found.se).all()
    assert found.efficiency_gap < 1e-9


def test_balanced_pairs_are_all_there_are_and_the_first_foresee_each_other_least():
    n = 7
    drawn = np.concatenate([draw.coalitions for draw in balanced(n, np.random.default_rng(0))])
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 2**n

    def spread(draws, seed):
        first = [draw.coalitions[0] for draw in itertools.islice(draws(20, np.random.default_rng(seed)), 1, 30)]
        z = 2.0 * np.array(first) - 1
        return np.trace(np.linalg.inv(z.T @ z))

    planned, chance = (np.mean([spread(draws, seed) for seed in range(5)]) for draws in (balanced, regression))
    assert planned < 0.8 * chance


def test_more_pairs_than_a_process_takes_go_to_a_regression(monkeypatch):
    monkeypatch.setattr(joint, "_MOST", 40)
    game, truth = pairs_and_saturation(10)
    few, many = (asked(game, 10, count) for count in (35, 100))
    assert max(error(many, truth), error(few, truth)) < 0.01
    assert (many.draws, few.draws) == (100, 35)
    assert many.efficiency_gap < 1e-9
