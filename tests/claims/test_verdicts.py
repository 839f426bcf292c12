"""The rule of claims: standard errors against closed forms, the right share of false verdicts, and directions."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lora_lab.claims.verdicts import FAILS, HOLDS, OPEN, PValues, Value, difference, p_values, verdicts
from lora_lab.results.stats import proportion


def singles(values, half=0.0):
    return {(seed,): Value(float(value), half) for seed, value in enumerate(values)}


def pairs(of):
    return {(i, j): Value(float(of[i] + of[j])) for i, j in itertools.combinations(range(len(of)), 2)}


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
        found = difference({unit: Value(x[unit[0]] * x[unit[1]] + noise[unit]) for unit in noise}, None)
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


def test_where_no_numbers_of_examples_are_known_their_noise_is_added_as_if_both_had_examples_of_their_own():
    found = difference(singles([0.9, 0.9, 0.9], half=0.0196), singles([0.8, 0.8, 0.8], half=0.0196))
    assert found.error == pytest.approx(math.sqrt(2) * 0.01, rel=1e-4)
    assert found.value == pytest.approx(0.1)
    assert found.paired is False
    assert difference(singles([0.9, 0.8]), singles([0.8, 0.9])).paired is None


def scored(right, units):
    """Outcomes [units, examples] as the values of units, with Wilson's half intervals."""
    found = {}
    for unit, outcomes in zip(units, right, strict=True):
        value, low, high = proportion(outcomes)
        found[unit] = Value(value, (high - low) / 2, (outcomes.astype(np.float32),))
    return found


def drawn(generator, *, units, examples=300, gain=0.0, hard=1.5, own=1.0, seeds=0.15):
    """Outcomes of treated and control: hard examples are hard for both, and some are so for one of them."""
    difficulty = generator.normal(0, hard, examples)
    sides = []
    for shift in (gain, 0.0):
        side = difficulty + generator.normal(0, 0.7, examples) - 1.0 - shift
        trained = generator.normal(0, seeds, 5)
        of_units = [side - np.mean(trained[list(unit)]) + generator.logistic(0, own, examples) for unit in units]
        sides.append(scored(np.stack(of_units) < 0, units))
    return sides


SEEDS = [(seed,) for seed in range(5)]


def test_of_one_seed_more_the_variance_of_examples_is_that_of_the_paired_differences():
    # in closed form: no interaction, so that the variance of the mean is s²/n of b_e, and nothing between seeds
    b = np.random.default_rng(4).normal(size=50)
    treated = {unit: Value(float(b.mean()), 9.0, (b + 5,)) for unit in SEEDS}
    control = {unit: Value(0.0, 9.0, (np.full(50, 5.0),)) for unit in SEEDS}
    found = difference(treated, control)
    assert found.paired is True
    assert found.error == pytest.approx(b.std(ddof=1) / math.sqrt(50))
    assert found.freedom == 49
    swapped = difference(control, treated)
    assert (swapped.value, swapped.error) == pytest.approx((-found.value, found.error))


def test_what_seeds_and_examples_do_together_is_counted_once():
    # d_se = ε alone: the variance of the mean is σ²/Sn, which is what the seeds' jackknife has of it already
    generator, errors = np.random.default_rng(5), []
    for _ in range(300):
        noise = generator.normal(size=(5, 200))
        found = difference(
            {unit: Value(float(row.mean()), 0, (row,)) for unit, row in zip(SEEDS, noise, strict=True)}, None
        )
        errors.append(found.error**2)
    assert np.mean(errors) == pytest.approx(1 / 1000, rel=0.15)


def test_what_all_seeds_have_in_common_is_added_to_what_each_has_of_its_own():
    # d_se = b_e + ε: the variance of the mean is σ_b²/n + σ_ε²/Sn
    generator, errors = np.random.default_rng(8), []
    for _ in range(200):
        noise = generator.normal(size=(5, 200)) + generator.normal(0, 0.5, size=200)
        found = difference(
            {unit: Value(float(row.mean()), 0, (row,)) for unit, row in zip(SEEDS, noise, strict=True)}, None
        )
        errors.append(found.error**2)
    assert np.mean(errors) == pytest.approx(0.25 / 200 + 1 / 1000, rel=0.1)


def test_several_tasks_have_examples_of_their_own():
    generator = np.random.default_rng(6)
    tasks = [generator.normal(size=40), 3 * generator.normal(size=60)]
    treated = {unit: Value(1.0, 0.0, tuple(tasks)) for unit in SEEDS}
    wanted = sum(task.var(ddof=1) / len(task) for task in tasks)
    assert difference(treated, None).error == pytest.approx(math.sqrt(wanted))


def test_where_hardly_an_example_differs_the_unpaired_rule_stays():
    same = np.ones(500, bool)
    other = same.copy()
    other[:9] = False
    sides = scored(np.stack([other] * 5), SEEDS), scored(np.stack([same] * 5), SEEDS)
    assert difference(*sides).paired is False
    assert difference(sides[1], sides[1]).error > 0
    other[:10] = False
    assert difference(scored(np.stack([other] * 5), SEEDS), sides[1]).paired is True


@pytest.mark.parametrize("units", [SEEDS, list(itertools.combinations(range(5), 2))], ids=["seeds", "pairs"])
@pytest.mark.parametrize("hard", [0.5, 3.0])
def test_on_the_same_examples_the_null_is_rejected_in_5_percent_and_more_that_is_true_is_found(units, hard):
    generator = np.random.default_rng(7)

    def rejected(gain, keep, count):
        found = 0
        for _ in range(count):
            sides = drawn(generator, units=units, gain=gain, hard=hard)
            if not keep:
                sides = [{unit: Value(each.value, each.half) for unit, each in side.items()} for side in sides]
            found += p_values(difference(*sides), "higher", 0.0).holds < 0.05
        return found / count

    assert rejected(0.0, True, 300) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)
    assert rejected(0.5, True, 60) > rejected(0.5, False, 60) + 0.15


def test_units_that_only_one_side_has_and_values_that_are_none_are_left_out():
    treated = {(0,): Value(1.0), (1,): Value(2.0), (2,): Value(math.nan), (5,): Value(9.0)}
    found = difference(treated, singles([0.0, 0.0, 0.0]))
    assert (found.value, found.seeds) == (1.5, 2)
    assert difference({}, None) is None
    assert difference({(0,): Value(1.0)}, {(1,): Value(1.0)}) is None


def test_one_seed_alone_tells_nothing():
    found = difference(singles([0.9]), singles([0.1]))
    assert math.isnan(found.error)
    assert p_values(found, "higher", 0.01) == PValues(1.0, 1.0)
    two = difference({(0, 1): Value(0.9)}, {(0, 1): Value(0.1)})  # one pair: without a seed there is none
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
