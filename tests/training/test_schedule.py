import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.errors import OptionError
from lora_lab.training.schedule import MASK_LAWS, RAMPS, Schedule, activation_probability, conditional_bernoulli

probabilities = st.floats(0, 1, allow_nan=False)


def draws(law, p, groups, n=20_000):
    generator = np.random.default_rng(0)
    return np.stack([MASK_LAWS[law].draw(p, groups, generator) for _ in range(n)])


def exact_conditional(p):
    """P(mask | at least one) for every mask, by enumeration."""
    masks = np.array(list(np.ndindex(*(2,) * len(p))))
    weight = np.prod(np.where(masks, p, 1 - np.asarray(p)), axis=1)
    weight[masks.sum(1) == 0] = 0
    return masks, weight / weight.sum()


@pytest.mark.parametrize("p0", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 300, 301])
def test_p_starts_at_p0_grows_and_is_one_in_the_last_quarter(p0, steps):
    schedule = Schedule(p0=p0)
    p = [schedule.probability(t, steps) for t in range(steps)]
    end = math.ceil(0.75 * steps)
    assert p[0] == p0
    assert all(a <= b for a, b in itertools.pairwise(p))
    assert p[end:] == [1.0] * (steps - end)


def test_the_linear_ramp_is_the_published_formula():
    schedule = Schedule(p0=0.1)
    assert schedule.probability(90, 300) == pytest.approx(0.1 + 0.9 * 90 / 225)


@pytest.mark.parametrize(("ramp", "half"), [("linear", 0.5), ("exponential", 0.37754), ("sine", math.sqrt(0.5))])
def test_ramps_go_from_0_to_1_by_their_formula(ramp, half):
    assert RAMPS[ramp](0.0) == 0
    assert RAMPS[ramp](1.0) == pytest.approx(1)
    assert RAMPS[ramp](0.5) == pytest.approx(half, abs=1e-5)


@pytest.mark.parametrize(("p0", "expected"), [(0.0, 0.625), (0.1, 0.6625)])
def test_mean_activity_of_a_run_is_as_derived(p0, expected):
    schedule = Schedule(p0=p0)
    assert np.mean([schedule.probability(t, 4000) for t in range(4000)]) == pytest.approx(expected, abs=1e-3)


@given(st.lists(probabilities, min_size=1, max_size=12), st.integers(0, 10**6))
def test_at_least_one_group_is_always_on(p, seed):
    assert conditional_bernoulli(p, np.random.default_rng(seed)).any()


@pytest.mark.parametrize("p", [[0.1, 0.1, 0.1], [0.5, 0.2, 0.9], [0.0, 0.3, 0.0], [1e-9, 1e-9, 1e-9]])
def test_masks_follow_the_conditional_law_exactly(p):
    generator = np.random.default_rng(0)
    n = 40_000
    found = np.stack([conditional_bernoulli(p, generator) for _ in range(n)])
    masks, weight = exact_conditional(p)
    for mask, expected in zip(masks, weight, strict=True):
        share = (found == mask.astype(bool)).all(1).mean()
        assert share == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n))


def test_p_zero_switches_exactly_one_group_on_uniformly():
    found = draws("uniform", 0.0, 12)
    assert (found.sum(1) == 1).all()
    assert found.mean(0) == pytest.approx([1 / 12] * 12, abs=0.01)


def test_conditional_activation_probability_is_as_derived():
    assert activation_probability(0.1, 12) == pytest.approx(0.139, abs=5e-4)
    assert draws("uniform", 0.1, 12).mean() == pytest.approx(activation_probability(0.1, 12), abs=0.005)
    assert activation_probability(0.0, 5) == pytest.approx(0.2)
    assert activation_probability(1.0, 5) == 1.0


def test_high_keeps_the_lowest_groups_and_low_the_highest():
    for mask in draws("high", 0.4, 6, 500):
        assert list(mask) == sorted(mask, reverse=True)
    for mask in draws("low", 0.4, 6, 500):
        assert list(mask) == sorted(mask)


def test_nested_dropout_keeps_as_many_groups_as_independent_dropout():
    counts = draws("high", 0.3, 6).sum(1)
    masks, weight = exact_conditional([0.3] * 6)
    expected = [weight[masks.sum(1) == k].sum() for k in range(7)]
    assert np.bincount(counts, minlength=7) / len(counts) == pytest.approx(expected, abs=0.015)


def test_stochastic_depth_survival_falls_with_depth_and_is_constant_in_time():
    schedule = Schedule(law="depth", p0=0.5)
    assert {schedule.probability(t, 100) for t in range(100)} == {0.5}
    expected = [1 - (level / 6) * 0.5 for level in range(1, 7)]
    assert draws("depth", 0.5, 6).mean(0) == pytest.approx(expected, abs=0.015)


def test_a_mask_is_a_function_of_seed_and_step():
    schedule = Schedule()
    assert (schedule.mask(7, 300, 6, seed=3) == schedule.mask(7, 300, 6, seed=3)).all()
    several = np.stack([schedule.mask(30, 300, 6, seed=s) for s in range(50)])
    assert len(np.unique(several, axis=0)) > 10


def test_another_seed_is_no_other_step():
    """With seed + step as the one number, seed 1 would have the masks of seed 0, a step earlier."""
    schedule = Schedule(p0=0.5)
    masks = {(seed, step): schedule.mask(step, 300, 24, seed=seed) for seed in range(4) for step in range(12)}
    for seed, step in masks:
        if (seed + 1, step - 1) in masks:
            assert (masks[seed, step] != masks[seed + 1, step - 1]).any()
    assert len({mask.tobytes() for mask in masks.values()}) == len(masks)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ramp": "linaer"}, "did you mean 'linear'"),
        ({"law": "unifrom"}, "did you mean 'uniform'"),
        ({"p0": 1.5}, "p0 is 1.5; a probability between 0 and 1"),
        ({"stage": -0.1}, "stage ratio is -0.1"),
    ],
)
def test_wrong_options_are_named_with_what_would_be_right(options, text):
    with pytest.raises(OptionError, match=text):
        Schedule(**options)
