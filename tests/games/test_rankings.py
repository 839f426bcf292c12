import numpy as np
import pytest
from making_games import saturating
from test_gates import Smooth

from lora_lab.errors import OptionError
from lora_lab.games.estimators import ESTIMATORS, estimate

RANKINGS = [name for name, entry in ESTIMATORS.items() if entry.ranking]


class Counted(Smooth):
    """A game that tells what its players put out."""

    def outputs(self):
        return np.array([1.0, 3.0, 0.0])


@pytest.fixture
def game():
    def gradient(g):
        return np.array([2 * g[1], 2 * g[0], -1])

    return Counted(lambda g: 2 * g[0] * g[1] - g[2], gradient, 3)


def test_taylor_is_the_slope_with_everything_on(game):
    found = estimate(game, 3, estimator="taylor")
    assert found.values.tolist() == [2, 2, -1]
    assert found.se.tolist() == [0, 0, 0]
    assert len(found.coalitions) == 2


def test_drop_is_the_share_of_what_is_put_out(game):
    assert estimate(game, 3, estimator="drop").values.tolist() == [0.25, 0.75, 0]


def test_sensitivity_is_the_mean_size_of_the_slope_over_coalitions(game):
    """Sizes k of the coalition that 0 is in: 2, 4, 3 ninths for k = 1, 2, 3; player 1 is in it with (k − 1)/2."""
    found = estimate(game, 3, estimator="sensitivity", passes=4000, seed=1)
    expected = 2 * (4 / 9 * 1 / 2 + 3 / 9)
    assert found.values == pytest.approx([expected, expected, 1], abs=5 * found.se.max())
    assert 0 < found.se[0] < 0.03
    assert found.se[2] < 1e-9 or found.values[2] == 1
    again = estimate(game, 3, estimator="sensitivity", passes=4000, seed=1)
    assert (again.values == found.values).all()


def test_rankings_say_that_they_are_no_values(game):
    for name in RANKINGS:
        assert "ranking alone" in estimate(game, 3, estimator=name).bias


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("sensitivity", {"passes": 1}, "1 passes; a coalition and its complement are 2"),
        ("taylor", {"temperature": 0.0}, "temperature of 0.0; a number above 0"),
        ("taylor", {"batch": -1}, "a batch of -1 examples"),
    ],
)
def test_options_out_of_range_are_refused(game, name, options, text):
    with pytest.raises(OptionError, match=text):
        estimate(game, 3, estimator=name, **options)


@pytest.mark.parametrize("name", RANKINGS)
def test_a_game_without_gates_is_refused(name):
    with pytest.raises(OptionError, match="needs a game with gates"):
        estimate(saturating(4)[0], 4, estimator=name)
