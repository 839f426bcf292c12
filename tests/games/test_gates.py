import itertools

import numpy as np
import pytest
from making_games import saturating, table_game

from lora_lab.errors import OptionError
from lora_lab.games import gates
from lora_lab.games.coalitions import every_coalition, orders
from lora_lab.games.estimators import ESTIMATORS, Estimator, estimate, exact

CONTROLLED = [name for name, entry in ESTIMATORS.items() if entry.control]
DRAWN = ["permutation+link", "antithetic+link"]


class Smooth:
    """A game that is a function of gates with a gradient."""

    def __init__(self, worth, gradient, n):
        self.worth, self.gradient, self.n = worth, gradient, n

    def __call__(self, coalitions):
        return np.array([self.worth(row.astype(float)) for row in coalitions])

    def along(self, places, shares, **options):
        lines = [np.full(self.n, place) for place in places]
        ends = self(np.array([[False] * self.n, [True] * self.n]))
        worths, slopes = (np.array(list(map(of, lines))) for of in (self.worth, self.gradient))
        return gates.Diagonal(places, shares, worths, slopes, ends)

    def slopes(self, gates, **options):
        return np.array(list(map(self.gradient, gates)))


def pairs_and_saturation(n, seed=0, strength=0.15):
    """1 − exp(−Σ a g) and pairs of both signs; and its Shapley values in closed form."""
    game, values = saturating(n, seed)
    a = np.log1p(-game(np.eye(n, dtype=bool))) * -1
    Q = np.triu(np.random.default_rng(seed + 99).normal(size=(n, n)) * strength / n, 1)
    Q = Q + Q.T
    return Smooth(
        lambda g: 1 - np.exp(-(g @ a)) + g @ Q @ g / 2, lambda g: a * np.exp(-(g @ a)) + Q @ g, n
    ), values + Q.sum(1) / 2


def test_one_node_gives_the_values_of_an_additive_game():
    c = np.array([0.5, -0.25, 2.0])
    found = estimate(Smooth(lambda g: 1 + g @ c, lambda g: c, 3), 3, estimator="gates", nodes=1)
    assert found.values == pytest.approx(c, abs=1e-12)
    assert found.se.tolist() == [0, 0, 0]
    assert found.efficiency_gap < 1e-12
    assert len(found.coalitions) == 2


def test_pairs_take_one_node_and_triples_two():
    pair = Smooth(lambda g: 4 * g[0] * g[1] + g[2], lambda g: np.array([4 * g[1], 4 * g[0], 1]), 3)
    assert estimate(pair, 3, estimator="gates", nodes=1).values == pytest.approx([2, 2, 1])
    triple = Smooth(np.prod, lambda g: np.array([g[1] * g[2], g[0] * g[2], g[0] * g[1]]), 3)
    assert estimate(triple, 3, estimator="gates", nodes=2).values == pytest.approx([1 / 3] * 3)
    one = estimate(triple, 3, estimator="gates", nodes=1)  # ∂f at 1/2 is 1/4 for each
    assert one.values == pytest.approx([1 / 4] * 3)
    assert one.efficiency_gap == pytest.approx(1 / 4)
    assert one.bias


def test_unequal_degrees_of_a_gate_are_a_bias_that_efficiency_does_not_show():
    game = Smooth(lambda g: g[0] ** 2 * g[1], lambda g: np.array([2 * g[0] * g[1], g[0] ** 2]), 2)
    found = estimate(game, 2, estimator="gates", nodes=2)
    assert found.values == pytest.approx([2 / 3, 1 / 3])  # the Shapley values are 1/2 each
    assert found.efficiency_gap < 1e-12


@pytest.mark.filterwarnings("ignore:.*the estimator exact is cheaper")
@pytest.mark.parametrize("seed", range(3))
def test_over_all_orders_the_link_leaves_no_bias(monkeypatch, seed):
    n = 4
    table = np.random.default_rng(seed).normal(size=2**n)
    game = type("Table", (), {"__call__": lambda self, c: table_game(table)(c), "along": odd_along})()
    every = list(map(np.array, itertools.permutations(range(n))))

    def in_turn(n, generator):
        yield from (orders([order]) for order in every)

    monkeypatch.setitem(ESTIMATORS.entries, "in-turn+link", Estimator(in_turn, control=gates.link))
    truth = exact(table_game(table), n).values
    whole = estimate(game, n, estimator="in-turn+link", samples=len(every))
    assert whole.draws == 24
    assert whole.values == pytest.approx(truth, abs=1e-10)
    assert np.abs(estimate(game, n, estimator="in-turn+link", samples=3).values - truth).max() > 1e-3


def odd_along(self, places, shares, **options):
    """Gates that have next to nothing to do with the coalitions, and cancel in part."""
    slopes = np.array([[1.0, -0.4, 0.3, 0.2 + place] for place in places])
    return gates.Diagonal(places, shares, slopes.sum(1) * places, slopes, np.array([0.0, 1.2]))


@pytest.mark.parametrize("name", DRAWN)
def test_the_link_takes_most_of_the_sampling_error_away(name):
    errors = {"link": [], "plain": []}
    for seed in range(20):
        game, truth = pairs_and_saturation(12, seed)
        for which, estimator in (("link", name), ("plain", name.partition("+")[0])):
            found = estimate(game, 12, estimator=estimator, samples=6, seed=seed)
            errors[which].append(np.linalg.norm(found.values - truth) / np.linalg.norm(truth))
    assert np.mean(errors["link"]) < 0.5 * np.mean(errors["plain"])


def test_the_link_alone_is_the_values_of_a_game_of_one_sum():
    game, truth = pairs_and_saturation(12, strength=0.0)
    found = estimate(game, 12, estimator="link")
    assert found.values == pytest.approx(truth, abs=2e-4)  # ψ is within 1e-4 of 1 − exp
    assert np.abs(estimate(game, 12, estimator="gates").values - truth).max() > 5e-3
    assert found.efficiency_gap < 1e-12


def test_orders_of_many_players_give_the_link_games_values():
    game, _ = pairs_and_saturation(13)
    along = gates.diagonal(game)
    found = gates.link(along, along.ends)
    every = every_coalition(13)
    expected = every.weights @ found.game(every.coalitions)
    assert (found.se > 0).all()
    assert (np.abs(found.values - expected) < 4 * found.se + 1e-9).all()
    assert found.se.max() < 1e-4


def test_shares_that_cancel_become_equal_ones():
    game = Smooth(lambda g: g[0] - g[1] + 0.01 * g[2], lambda g: np.array([1, -1, 0.01]), 3)
    along = gates.diagonal(game)
    assert gates.link(along, along.ends).values == pytest.approx([0.01 / 3] * 3)
    assert estimate(game, 3, estimator="permutation+link", samples=1).values == pytest.approx([1, -1, 0.01])


def test_the_link_runs_between_the_ends_of_the_worth_itself():
    game, _ = pairs_and_saturation(5)
    along = gates.diagonal(game)
    stretched = gates.link(along, np.array([10.0, 30.0]))
    assert stretched.game(np.array([[False] * 5, [True] * 5])) == pytest.approx([10, 30])
    same = gates.link(along, along.ends)
    assert stretched.values == pytest.approx(same.values * 20 / (along.ends[1] - along.ends[0]))


@pytest.mark.parametrize("name", DRAWN)
def test_intervals_hold_the_truth_about_as_often_as_they_say(name):
    inside = []
    game, truth = pairs_and_saturation(8, strength=0.6)
    for seed in range(40):
        found = estimate(game, 8, estimator=name, samples=30, seed=seed)
        inside += list(np.abs(found.values - truth) <= 1.96 * found.se)
    assert 0.85 < np.mean(inside) < 1


@pytest.mark.parametrize("name", CONTROLLED)
def test_values_are_what_is_known_and_the_weights_times_the_worths(name):
    game, _ = pairs_and_saturation(6)
    found = estimate(game, 6, estimator=name, samples=12, seed=3)
    assert found.known + found.weights @ found.worths == pytest.approx(found.values, abs=1e-9)
    assert found.worths == pytest.approx(game(found.coalitions))
    assert found.trace[-1]["values"] == pytest.approx(found.values.tolist(), abs=1e-9)
    assert found.trace[-1]["se"] == pytest.approx(found.se.tolist())
    again = estimate(game, 6, estimator=name, samples=12, seed=3)
    assert (again.values == found.values).all()


@pytest.mark.parametrize("name", DRAWN)
def test_the_seed_decides(name):
    game, _ = pairs_and_saturation(6)
    a, b = (estimate(game, 6, estimator=name, samples=12, seed=seed) for seed in (1, 2))
    assert (a.values != b.values).any()


def test_two_coalitions_are_budget_enough_for_gates():
    game, _ = pairs_and_saturation(6)
    assert len(estimate(game, 6, estimator="gates", budget=2).coalitions) == 2
    linked = estimate(game, 6, estimator="permutation+link", samples=60, budget=30)
    assert 20 < len(linked.coalitions) <= 30


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nodes": 0}, "0 nodes; at least 1"),
        ({"temperature": 0.0}, "temperature of 0.0; a number above 0"),
        ({"batch": -1}, "a batch of -1 examples"),
    ],
)
def test_options_out_of_range_are_refused(options, text):
    with pytest.raises(OptionError, match=text):
        estimate(pairs_and_saturation(4)[0], 4, estimator="gates", **options)


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_game_without_gates_is_refused(name):
    with pytest.raises(OptionError, match="this game has no gates"):
        estimate(saturating(4)[0], 4, estimator=name, samples=2)
