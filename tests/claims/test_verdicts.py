"""The rule of claims: standard errors against closed forms, the right share of false verdicts, and directions."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lora_lab.claims.verdicts import FAILS, HOLDS, OPEN, PValues, difference, p_values, verdicts


def singles(values, half=0.0):
    return {(seed,): (float(value), half) for seed, value in enumerate(values)}


def pairs(of):
    return {(i, j): (float(of[i] + of[j]), 0.0) for i, j in itertools.combinations(range(len(of)), 2)}


def test_of_single_seeds_the_interval_and_p_values_are_those_of_a_paired_t_test():
    generator = np.random.default_rng(0)
    treated, control = generator.normal(size=6), generator.normal(size=6) - 1
    found = difference(singles(treated), singles(control))
    wanted = ttest_rel(treated, control)
    assert found.value == pytest.approx((treated - control).mean())
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    one_sided = ttest_rel(treated, control, alternative="greater").pvalue
    assert p_values(found, "higher", 0).holds == pytest.approx(one_sided)
    assert p_values(found, "lower", 0).holds == pytest.approx(1 - one_sided)
    assert p_values(found, "higher", 0).fails == pytest.approx(1 - one_sided)


def test_of_additive_pairs_the_jackknife_is_the_variance_of_the_mean_over_seeds():
    # of h(i, j) = x_i + x_j the mean over pairs is 2·x̄, whose standard error is 2·s/√n
    x = np.random.default_rng(1).normal(size=7)
    found = difference(pairs(x), None)
    assert found.error == pytest.approx(2 * x.std(ddof=1) / math.sqrt(7))
    assert (found.units, found.seeds) == (21, 7)


def test_pairs_that_share_seeds_hold_the_truth_as_often_as_they_say():
    generator, held = np.random.default_rng(2), 0
    for _ in range(400):
        x = generator.normal(size=5)
        noise = {unit: generator.normal() * 0.3 for unit in itertools.combinations(range(5), 2)}
        found = difference({unit: (x[unit[0]] * x[unit[1]] + noise[unit], 0.0) for unit in noise}, None)
        low, high = found.interval
        held += low <= 0 <= high
    assert held / 400 > 0.9
    naive = np.mean(
        [
            abs(np.mean(v := [a + b for a, b in itertools.combinations(generator.normal(size=5), 2)]))
            < 2.262 * np.std(v, ddof=1) / math.sqrt(10)
            for _ in range(400)
        ]
    )
    assert naive < 0.8  # as if ten pairs of five seeds were ten independent values


def test_the_noise_of_examples_is_added_as_if_both_had_examples_of_their_own():
    found = difference(singles([0.9, 0.9, 0.9], half=0.0196), singles([0.8, 0.8, 0.8], half=0.0196))
    assert found.error == pytest.approx(math.sqrt(2) * 0.01, rel=1e-4)
    assert found.value == pytest.approx(0.1)


def test_units_that_only_one_side_has_and_values_that_are_none_are_left_out():
    treated = {(0,): (1.0, 0.0), (1,): (2.0, 0.0), (2,): (math.nan, 0.0), (5,): (9.0, 0.0)}
    found = difference(treated, singles([0.0, 0.0, 0.0]))
    assert (found.value, found.seeds) == (1.5, 2)
    assert difference({}, None) is None
    assert difference({(0,): (1.0, 0.0)}, {(1,): (1.0, 0.0)}) is None


def test_one_seed_alone_tells_nothing():
    found = difference(singles([0.9]), singles([0.1]))
    assert math.isnan(found.error)
    assert p_values(found, "higher", 0.01) == PValues(1.0, 1.0)
    two = difference({(0, 1): (0.9, 0.0)}, {(0, 1): (0.1, 0.0)})  # one pair: without a seed there is none
    assert math.isnan(two.interval[0])


@pytest.mark.parametrize(
    ("direction", "value", "least", "verdict"),
    [
        ("higher", 0.10, 0.01, HOLDS),
        ("higher", -0.10, 0.01, FAILS),
        ("higher", 0.000, 0.05, FAILS),  # as large as counts is rejected
        ("higher", 0.004, 0.01, OPEN),
        ("lower", -0.10, 0.01, HOLDS),
        ("lower", 0.10, 0.01, FAILS),
        ("equal", 0.00, 0.05, HOLDS),
        ("equal", 0.10, 0.05, FAILS),
        ("equal", -0.10, 0.05, FAILS),
        ("equal", 0.05, 0.05, OPEN),
    ],
)
def test_directions_and_the_smallest_difference_that_counts(direction, value, least, verdict):
    spread = np.array([-0.01, 0.0, 0.01, -0.005, 0.005])
    found = difference(singles(value + spread), singles(np.zeros(5)))
    assert verdicts([p_values(found, direction, least)])[0][0] == verdict


def test_verdicts_are_corrected_over_all_claims_by_holm():
    tested = [PValues(0.02, 1.0), PValues(0.03, 1.0), PValues(0.9, 0.001)]
    found = verdicts(tested)
    assert [name for name, *_ in found] == [OPEN, OPEN, FAILS]
    assert [holds for _, holds, _ in found] == pytest.approx([0.06, 0.06, 0.9])
    assert verdicts(tested[:1])[0][0] == HOLDS


def test_where_nothing_is_true_hardly_any_family_of_claims_has_one_that_holds():
    generator, wrong = np.random.default_rng(3), 0
    for _ in range(300):
        found = [difference(singles(generator.normal(size=5)), singles(generator.normal(size=5))) for _ in range(8)]
        wrong += any(name == HOLDS for name, *_ in verdicts([p_values(each, "higher", 0.0) for each in found]))
    assert wrong / 300 < 0.09
