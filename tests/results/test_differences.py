"""p-values, their correction for many, and paired differences of merges: closed forms, and coverage by simulation."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from lora_lab.results.stats import (
    half_of_strata,
    holm,
    p_of_draws,
    p_of_strata,
    paired_differences,
)


def test_holm_by_hand():
    """Holm 1979: the smallest p times m, the next times m − 1 …, never below the one before, at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2, 0.9, 0.8]) == pytest.approx([0.6, 1.0, 1.0])
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_holm_rejects_what_the_step_down_procedure_does():
    generator = np.random.default_rng(0)
    for _ in range(200):
        p = generator.random(6) ** 3
        order, rejected = np.argsort(p), set()
        for j, i in enumerate(order):
            if p[i] > 0.05 / (6 - j):
                break
            rejected.add(int(i))
        assert {i for i, corrected in enumerate(holm(list(p))) if corrected <= 0.05} == rejected


def test_a_p_value_of_draws_counts_those_that_are_as_large():
    draws = np.arange(20.0)
    assert p_of_draws(18.5, draws) == pytest.approx(2 / 21)
    assert p_of_draws(19.0, draws) == pytest.approx(2 / 21)  # ties count
    assert p_of_draws(100.0, draws) == pytest.approx(1 / 21)
    assert p_of_draws(-1.0, draws) == 1.0
    assert p_of_draws(100.0, draws[:19]) is None
    assert p_of_draws(math.nan, draws) is None


def test_p_values_of_draws_are_uniform_where_value_and_draws_are_of_one_law():
    generator, K = np.random.default_rng(1), 20
    p = np.array([p_of_draws(values[0], values[1:]) for values in generator.normal(size=(4000, K + 1))])
    counts = np.bincount(np.rint(p * (K + 1)).astype(int) - 1, minlength=K + 1)
    assert reference.chisquare(counts).pvalue > 0.01
    assert np.mean(p <= 0.05) == pytest.approx(1 / 21, abs=0.012)


def test_a_p_value_of_one_stratum_is_that_of_the_t_test():
    values = np.array([0.3, -0.1, 0.4, 0.2, 0.25])
    strata = [(values.var(ddof=1) / 5, 5.0)]
    expected = reference.ttest_1samp(values, 0.0)
    assert p_of_strata(float(values.mean()), strata) == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert half_of_strata(strata) == pytest.approx((high - low) / 2)
    assert p_of_strata(0.0, [(0.0, 5.0)]) == 1.0
    assert p_of_strata(0.1, [(0.0, 5.0)]) == 0.0


def test_of_one_set_the_difference_is_that_of_agresti_and_min():
    """b and c discordant pairs of n: variance ((b + c + 1) − (b − c)²/(n + 2)) / (n + 2)²."""
    first, other = np.zeros(50), np.zeros(50)
    first[:6], other[4:14] = 1, 1  # four right in the first alone, eight in the other alone
    ((value, strata),) = paired_differences([[first]], [[[other]]], independent=1)
    assert value == pytest.approx(4 / 50)
    assert strata == [(pytest.approx((12 + 1 - 16 / 52) / 52**2), 50.0)]


def test_tasks_weigh_alike_and_their_errors_add():
    a, b = np.array([1.0, 0, 0, 0]), np.array([1.0, 1, 0, 0, 1, 0, 1, 1])
    zero = [[np.zeros(4), np.zeros(8)]]
    ((value, ((variance, draws),)),) = paired_differences(zero, [[[a, b]]], independent=1)
    parts = [paired_differences([[np.zeros(len(x))]], [[[x]]], independent=1)[0] for x in (a, b)]
    assert value == pytest.approx((1 / 4 + 5 / 8) / 2)
    assert variance == pytest.approx(sum(strata[0][0] for _, strata in parts) / 4)
    assert draws == 4


def test_of_two_merges_in_many_sets_the_sets_alone_are_a_paired_t_test():
    """Examples that all do alike leave what differs between the sets."""
    effects = np.array([0.1, 0.3, 0.2, 0.5])
    first = [[np.zeros(30)] for _ in effects]
    other = [[np.full(30, effect)] for effect in effects]
    ((value, strata),) = paired_differences(first, [other], independent=4)
    assert p_of_strata(value, strata) == pytest.approx(reference.ttest_1samp(effects, 0).pvalue)


def test_sets_of_one_size_by_chance_are_not_without_variance():
    """Two sets with equal differences on other examples: what a set's own examples tell is the least there is."""
    first = [[np.zeros(20)], [np.zeros(20)]]
    other = [[np.arange(20) < 4], [np.arange(20) >= 16]]
    other = [[task.astype(float) for task in each] for each in other]
    ((value, strata),) = paired_differences(first, [other], independent=2)
    assert value == 0.2
    assert half_of_strata(strata) > 0.08


def test_sets_that_share_their_adapters_are_counted_as_fewer():
    generator = np.random.default_rng(0)
    first = [[np.zeros(40)] for _ in range(10)]
    other = [[(generator.random(40) < 0.2 + 0.05 * s).astype(float)] for s in range(10)]
    wide, narrow = (half_of_strata(paired_differences(first, [other], independent=n)[0][1]) for n in (2.5, 10))
    assert wide > 1.8 * narrow


def test_sets_of_other_tasks_are_as_uncertain_as_the_worst_of_them():
    first, other = [[np.zeros(10)], [np.zeros(40)]], [[np.ones(10)], [np.arange(40.0) % 2]]
    ((value, strata),) = paired_differences(first, [other], independent=2)
    assert value == 0.75
    assert strata[0][0] > 0


def simulated(sets, spread, *, merges=4, examples=60, seed=0, uneven=1.0):
    """Outcomes with effects of the merge in each set, and examples that are hard for all; in truth all are alike."""
    generator = np.random.default_rng(seed)
    hard = generator.normal(0, 1, (3, examples))

    def of_merge(size):
        effects = generator.normal(0, size, sets)
        noise = generator.normal(0, 1, (sets, 3, examples))
        # on average over effects, noise and difficulty, right with probability Φ(1)
        edge = math.sqrt(2 + size**2)
        return [[(edge + effects[s] + hard[t] + noise[s, t] > 0) * 1.0 for t in range(3)] for s in range(sets)]

    made = [of_merge(spread * (uneven if m == merges - 1 else 1)) for m in range(merges)]
    return made[0], made[1:]


@pytest.mark.parametrize("sets", [1, 2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_intervals_of_differences_hold_the_truth(sets, spread):
    """95 %, at least .90 found; of one set, what other sets would do is not in it."""
    if sets == 1 and spread:
        pytest.skip("one set tells of its examples alone")
    held = np.zeros(3)
    for seed in range(300):
        first, others = simulated(sets, spread, seed=seed)
        found = paired_differences(first, others, independent=sets)
        held += [abs(value) <= half_of_strata(strata) for value, strata in found]
    assert (held / 300).min() >= 0.90
    assert held.mean() / 300 >= 0.93


def test_a_merge_whose_sets_differ_more_than_those_of_others_has_an_honest_interval():
    held = 0
    for seed in range(300):
        first, others = simulated(3, 0.2, seed=seed, uneven=3.0)
        value, strata = paired_differences(first, others, independent=3)[-1]
        held += abs(value) <= half_of_strata(strata)
    assert held / 300 >= 0.87


def test_five_merges_alike_are_told_apart_in_five_percent_of_the_tables():
    wrong = 0
    for seed in range(300):
        first, others = simulated(3, 0.1, merges=5, seed=seed)
        found = paired_differences(first, others, independent=3)
        wrong += min(holm([p_of_strata(value, strata) for value, strata in found])) < 0.05
    assert wrong / 300 <= 0.08
