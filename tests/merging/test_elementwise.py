"""Every rule for matrices against numbers made by hand, loops over single entries, and means over seeds."""

import inspect
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import MismatchError, OptionError
from lora_lab.merging.kinds import ENTRIES
from lora_lab.merging.methods import MERGES, rules
from lora_lab.merging.rules import elementwise, rows, trimming
from lora_lab.merging.rules.trimming import cuts_of

RULES = rules()

FEW = settings(max_examples=20)
SEEDS = st.integers(0, 2**16)
WEIGHTS = st.lists(st.floats(0.1, 3), min_size=1, max_size=4)
LOSSLESS = {"density": 1.0, "window": 0.0, "gamma": 0.0}
"""What leaves every entry in its place, for rules that have such an option."""


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random(count: int, seed: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape or (3, 4), generator=generator, dtype=torch.float64) for _ in range(count)]


def small_integers(count: int, seed: int) -> list[Tensor]:
    """Matrices full of ties, zeros and sums that cancel."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-2, 3, (3, 4), generator=generator).double() for _ in range(count)]


def options_of(name: str) -> set[str]:
    parameters = inspect.signature(RULES[name]).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def lossless(name: str) -> dict[str, float]:
    return {option: value for option, value in LOSSLESS.items() if option in options_of(name)}


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def kept(matrix: Tensor, skip: int, count: int) -> Tensor:
    """The entries of largest size after the first `skip`, by a loop; of equal ones, the first in order."""
    values = matrix.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[skip : skip + count]
    return torch.tensor([v if i in order else 0.0 for i, v in enumerate(values)], dtype=matrix.dtype).view_as(matrix)


def elected(matrices: list[Tensor], weights: list[float]) -> Tensor:
    """TIES after trimming, by a loop over entries."""
    columns = list(zip(*(matrix.flatten().tolist() for matrix in matrices), strict=True))
    sums = [sum(w * v for w, v in zip(weights, column, strict=True)) for column in columns]
    signs = [(total > 0) - (total < 0) for total in sums]
    majority = (sum(signs) > 0) - (sum(signs) < 0)
    found = []
    for column, sign in zip(columns, signs, strict=True):
        agree = [(w, v) for w, v in zip(weights, column, strict=True) if w * v * (sign or majority) > 0]
        found.append(sum(w * v for w, v in agree) / sum(abs(w) for w, _ in agree) if agree else 0.0)
    return torch.tensor(found, dtype=torch.float64).view_as(matrices[0])


# sums


def test_task_arithmetic_is_the_weighted_sum_times_its_scale():
    a, b = matrix([1, 2], [3, 4]), matrix([10, 0], [0, -10])
    assert_equal(RULES["task-arithmetic"]([a, b], [2.0, -0.5]), matrix([-3, 4], [6, 13]))
    assert_equal(RULES["task-arithmetic"]([a, b], [1.0, 1.0], scale=0.3), matrix([3.3, 0.6], [0.9, -1.8]))


def test_average_divides_by_the_sum_of_the_weights():
    a, b = matrix([1, 2], [3, 4]), matrix([10, 0], [0, -10])
    assert_equal(RULES["average"]([a, b], [3.0, 1.0]), matrix([3.25, 1.5], [2.25, 0.5]))
    assert_equal(RULES["average"]([a, b], [3.0, -1.0], scale=2.0), matrix([-7, 6], [9, 22]))


@pytest.mark.parametrize("rule", ["average", "slerp"])
@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [0.1 + 0.2, -0.3]])
def test_weights_that_sum_to_zero_have_no_average(rule, weights):
    text = "negative weights" if rule == "slerp" and min(weights) < 0 else "sum to 0"
    with pytest.raises(OptionError, match=text):
        RULES[rule](random(2, 0), weights)


def test_slerp_of_orthogonal_matrices_goes_along_the_quarter_circle_at_the_mean_norm():
    a, b = matrix([2, 0], [0, 0]), matrix([0, 0], [0, 6])
    half, third = math.sqrt(0.5), math.pi / 6
    assert_equal(RULES["slerp"]([a, b], [1.0, 1.0]), matrix([4 * half, 0], [0, 4 * half]))
    norm = 2 * 2 / 3 + 6 / 3
    wanted = matrix([norm * math.cos(third), 0], [0, norm * math.sin(third)])
    assert_equal(RULES["slerp"]([a, b], [2.0, 1.0]), wanted)


@given(SEEDS, st.floats(0.001, 0.999))
def test_slerp_of_two_is_the_closed_form(seed, t):
    a, b = random(2, seed)
    angle = math.acos(float((a * b).sum() / a.norm() / b.norm()))
    unit = math.sin((1 - t) * angle) * a / a.norm() + math.sin(t * angle) * b / b.norm()
    wanted = ((1 - t) * a.norm() + t * b.norm()) * unit / math.sin(angle)
    torch.testing.assert_close(RULES["slerp"]([a, b], [1 - t, t]), wanted, rtol=1e-9, atol=1e-9)


def test_slerp_of_three_orthogonal_matrices_is_their_middle():
    stack = [matrix([3, 0, 0]), matrix([0, 5, 0]), matrix([0, 0, 7])]
    assert_equal(RULES["slerp"](stack, [2.0] * 3), matrix([1, 1, 1]) * 5 / math.sqrt(3))


@given(SEEDS, st.lists(st.floats(0.1, 3), min_size=3, max_size=5))
def test_of_more_than_two_slerp_is_where_the_weighted_logarithms_cancel(seed, weights):
    stack = random(len(weights), seed)
    mean = RULES["slerp"](stack, weights)
    norm = sum(w * float(m.norm()) for w, m in zip(weights, stack, strict=True)) / sum(weights)
    assert float(mean.norm()) == pytest.approx(norm, rel=1e-9)
    mean /= mean.norm()
    pull = torch.zeros_like(mean)
    for weight, m in zip(weights, stack, strict=True):
        cosine = float((m * mean).sum() / m.norm())
        tangent = m / m.norm() - cosine * mean
        pull += weight * math.acos(cosine) * tangent / tangent.norm()
    assert float(pull.norm()) < 1e-8 * sum(weights)


@pytest.mark.parametrize(("height", "third", "mean"), [(2.7, 0.02, 1.1), (2.5, -0.06, -0.53), (0.5, 0.9, 0.3)])
def test_slerp_of_a_pair_on_either_side_of_a_plane_and_a_third_in_it_is_the_closed_form(height, third, mean):
    """By symmetry the mean lies in the plane, where its angle ψ solves (φ − ψ) = 2w · θ/sin θ · cos γ sin ψ.

    Directions are (cos γ, 0, ±sin γ) with weight w and (cos φ, sin φ, 0) with weight 1; cos θ = cos γ cos ψ.
    """
    theta = math.acos(math.cos(height) * math.cos(mean))
    weight = (third - mean) * math.sin(theta) / (2 * theta * math.cos(height) * math.sin(mean))
    pair = [matrix([math.cos(height), 0, sign * math.sin(height)]) for sign in (1, -1)]
    stack = [*pair, matrix([math.cos(third), math.sin(third), 0])]
    wanted = matrix([math.cos(mean), math.sin(mean), 0])
    torch.testing.assert_close(RULES["slerp"](stack, [weight, weight, 1.0]), wanted, rtol=0, atol=1e-9)


def test_slerp_between_two_nearly_opposite_matrices_still_goes_along_the_circle():
    a, b = matrix([1, 0]), matrix([math.cos(3.1), math.sin(3.1)])
    assert_equal(RULES["slerp"]([a, b], [0.9, 0.1]), matrix([math.cos(0.31), math.sin(0.31)]))


def test_slerp_is_linear_where_there_is_no_direction_or_no_way():
    a, b, zero = matrix([1, 2], [3, 4]), matrix([5, 0], [0, 0]), torch.zeros(2, 2, dtype=torch.float64)
    assert_equal(RULES["slerp"]([a, zero], [1.0, 3.0]), a / 4)
    assert_equal(RULES["slerp"]([zero, zero], [1.0, 1.0]), zero)
    assert_equal(RULES["slerp"]([a, -3 * a], [1.0, 1.0]), -a)
    assert_equal(RULES["slerp"]([a, b, -a], [1.0, 1.0, 2.0]), (a + b - 2 * a) / 4)


def test_slerp_of_directions_that_cancel_is_linear_too():
    stack = [matrix([math.cos(angle), math.sin(angle)]) for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    torch.testing.assert_close(RULES["slerp"](stack, [1.0] * 3), sum(stack) / 3, rtol=0, atol=1e-9)


def test_a_matrix_of_weight_zero_is_no_point_of_slerp():
    a, b, c = random(3, 0)
    zero = torch.zeros_like(a)
    alone = RULES["slerp"]([a, b], [1.0, 2.0])
    for other in (c, zero, -a):
        assert_equal(RULES["slerp"]([a, other, b], [1.0, 0.0, 2.0]), alone)


def test_slerp_refuses_negative_weights():
    with pytest.raises(OptionError, match=r"slerp has no negative weights, and -0\.5 was given"):
        RULES["slerp"](random(2, 0), [1.0, -0.5])


# trimmed


def test_magnitude_sums_the_largest_entries_of_each():
    a, b = matrix([1, -4, 2], [3, 0, -5]), matrix([9, 1, 1], [-8, 7, 1])
    assert_equal(RULES["magnitude"]([a, b], [1.0, 1.0], density=0.5), matrix([9, -4, 0], [-5, 7, -5]))
    assert_equal(RULES["magnitude"]([a, b], [2.0, -1.0], density=1 / 6), matrix([-9, 0, 0], [0, 0, -10]))


@pytest.mark.parametrize("rule", ["magnitude", "ties"])
def test_of_entries_that_tie_at_the_threshold_the_first_are_kept(rule):
    ones = matrix([1, -1, 1], [1, -1, 2])
    assert_equal(RULES[rule]([ones], [1.0], density=0.5), matrix([1, -1, 0], [0, 0, 2]))


@pytest.mark.parametrize("rule", ["magnitude", "ties", "breadcrumbs"])
def test_the_least_density_still_keeps_one_entry(rule):
    options = {"gamma": 0.0} if rule == "breadcrumbs" else {}
    assert_equal(RULES[rule]([matrix([1, -9, 2, 3])], [1.0], density=1e-9, **options), matrix([0, -9, 0, 0]))


@given(SEEDS, WEIGHTS, st.floats(0.05, 1))
def test_magnitude_is_the_loop_over_sorted_entries(seed, weights, density):
    for stack in (small_integers(len(weights), seed), random(len(weights), seed)):
        count = max(1, round(density * 12))
        wanted = sum(w * kept(m, 0, count) for w, m in zip(weights, stack, strict=True))
        assert_equal(RULES["magnitude"](stack, weights, density=density), wanted)


# TIES


def test_ties_of_case_m10_by_hand_and_of_the_negated_pair_its_exact_negative():
    a, b = matrix([3, -1], [0.5, 2], [-4, 0.1], [1, -2]), matrix([-1, -2], [0.2, -2], [5, 0.3], [1, 2])
    wanted = matrix([3, -2], [0, 2], [5, 0], [0, 2])  # two sums are 0, and most elected signs are +
    assert torch.equal(RULES["ties"]([a, b], [1.0, 1.0], density=0.5), wanted)
    assert torch.equal(RULES["ties"]([-a, -b], [1.0, 1.0], density=0.5), -wanted)


def test_ties_trims_elects_and_averages_what_agrees():
    a, b = matrix([6, -1], [2, 0.5]), matrix([-4, -3], [0.1, 5])
    # trimmed: a = [6, 0 | 2, 0], b = [-4, 0 | 0, 5]; elected: + 0 | + +
    assert_equal(RULES["ties"]([a, b], [1.0, 1.0], density=0.5), matrix([6, 0], [2, 5]))
    c = matrix([2, 0], [0, 0])
    assert_equal(RULES["ties"]([a, b, c], [1.0, 1.0, 1.0], density=0.5), matrix([4, 0], [2, 5]))


def test_ties_weighs_the_vote_and_the_mean():
    stack = [matrix([1, 1]), matrix([-4, 2]), matrix([2, 3])]
    assert_equal(RULES["ties"](stack, [1.0, 1.0, 1.0], density=1.0), matrix([-4, 2]))
    assert_equal(RULES["ties"](stack, [3.0, 1.0, 1.0], density=1.0), matrix([5 / 4, 8 / 5]))
    assert_equal(RULES["ties"](stack, [1.0, 2.0, 1.0], density=1.0), matrix([-4, 2]))


def test_a_negative_weight_in_ties_is_the_negated_matrix():
    a, b, c = random(3, 0)
    turned = RULES["ties"]([a, -b, c], [1.0, 0.7, 2.0], density=0.5)
    assert_equal(RULES["ties"]([a, b, c], [1.0, -0.7, 2.0], density=0.5), turned)


@given(SEEDS, st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=4), st.floats(0.05, 1))
def test_ties_is_the_loop_over_entries_even_where_sums_cancel(seed, weights, density):
    for stack in (small_integers(len(weights), seed), random(len(weights), seed)):
        trimmed = [kept(m, 0, max(1, round(density * 12))) for m in stack]
        assert_equal(RULES["ties"](stack, weights, density=density), elected(trimmed, weights))


def test_where_the_sum_is_zero_the_majority_of_the_elected_signs_decides():
    a, b = matrix([2, 1, 1, 3]), matrix([-2, 1, 1, -1])
    assert_equal(RULES["ties"]([a, b], [1.0, 1.0], density=1.0), matrix([2, 1, 1, 3]))
    assert_equal(RULES["ties"]([-a, -b], [1.0, 1.0], density=1.0), matrix([-2, -1, -1, -3]))
    even = matrix([2, 1, -1]), matrix([-2, 1, -1])
    assert_equal(RULES["ties"](even, [1.0, 1.0], density=1.0), matrix([0, 1, -1]))


@pytest.mark.parametrize("weights", [[1.0, 2.0, 0.5], [1.0, 1.0, 1.0]])
def test_a_matrix_of_more_entries_than_one_piece_is_the_loop_over_all_its_entries(weights):
    stack = random(3, 0, 300, 500)
    trimmed = [m * (m.abs() >= m.abs().flatten().kthvalue(m.numel() * 7 // 10 + 1).values) for m in stack]
    assert_equal(RULES["ties"](stack, weights, density=0.3), elected(trimmed, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@FEW
@given(
    seed=SEEDS,
    density=st.floats(0.01, 1),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    whole=st.booleans(),
)
def test_the_largest_entries_of_a_vector_in_pieces_are_those_of_the_whole(dtype, seed, density, sizes, whole):
    """Also with ties at the threshold, in numbers down to the smallest and up to the largest."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    pieces = [p.round() if whole else torch.exp(80 * p.clamp(-1.1, 1.1)) * p.sign() for p in pieces]
    pieces = [p.to(dtype) for p in pieces]
    other = [torch.ones(3, dtype=dtype)] * len(pieces)
    rounds = lambda: [{0: p, 5: o} for p, o in zip(pieces, other, strict=True)]  # noqa: E731
    cuts = cuts_of(rounds, density, dtype)
    found = torch.cat([cuts[0].keep(p) for p in pieces])
    together = torch.cat(pieces)
    assert torch.equal(found, kept(together, 0, max(1, round(density * len(together)))))
    count = max(1, round(density * 3 * len(pieces)))
    assert torch.cat([cuts[5].keep(o) > 0 for o in other]).tolist() == [i < count for i in range(3 * len(pieces))]


def test_an_unknown_scope_is_refused():
    for name in ("ties", "magnitude"):
        with pytest.raises(OptionError, match="unknown scope 'modules'"):
            RULES[name](random(2, 0), [1.0, 1.0], scope="modules")


# at random


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_every_entry_of_dare_is_dropped_or_divided_by_the_density(density):
    (a,) = random(1, 0, 20, 20)
    thinned = RULES["dare"]([a], [1.0], density=density)
    dropped = thinned == 0
    assert_equal(thinned[~dropped], (a / density)[~dropped])
    assert abs(float(dropped.double().mean()) - (1 - density)) < 5 * math.sqrt(density * (1 - density) / 400)


def test_the_mean_of_dare_over_seeds_is_task_arithmetic():
    stack, weights, density, seeds = random(3, 0, 4, 5), [1.0, -0.5, 2.0], 0.3, 600
    found = torch.stack([RULES["dare"](stack, weights, density=density, seed=s) for s in range(seeds)])
    variance = sum((w * m).square() for w, m in zip(weights, stack, strict=True)) * (1 - density) / density
    wanted = RULES["task-arithmetic"](stack, weights)
    assert bool(((found.mean(0) - wanted).abs() < 5 * (variance / seeds).sqrt()).all())
    torch.testing.assert_close(found.var(0), variance, rtol=0.5, atol=0)


def test_dare_thins_each_matrix_in_its_own_way():
    ones = torch.ones(20, 20, dtype=torch.float64)
    sum_of_two = RULES["dare"]([ones, ones], [1.0, 1.0], density=0.5)
    assert set(sum_of_two.unique().tolist()) == {0.0, 2.0, 4.0}


@pytest.mark.parametrize("rule", ["dare-ties", "della"])
@FEW
@given(seed=SEEDS, density=st.floats(0.1, 1))
def test_dare_ties_and_della_without_a_window_elect_among_matrices_thinned_as_in_dare(rule, seed, density):
    stack, weights = random(3, seed), [1.0, 0.5, -2.0]
    options = {"window": 0.0} if rule == "della" else {}
    alone = [[w if i == j else 0.0 for j in range(3)] for i, w in enumerate((1.0, 1.0, 1.0))]
    thinned = [RULES["dare"](stack, one, density=density, seed=seed) for one in alone]
    assert_equal(RULES[rule](stack, weights, density=density, seed=seed, **options), elected(thinned, weights))


def test_the_chances_of_della_rise_with_the_rank_in_the_row():
    row = matrix([4, -1, 3, 2, -5])  # ranks 3 0 2 1 4
    density, window, seeds = 0.5, 0.4, 2000
    chance = matrix([0.6, 0.3, 0.5, 0.4, 0.7])
    both = torch.cat([row, 100 * row.flip(1)])
    chances = torch.cat([chance, chance.flip(1)])
    found = torch.stack([RULES["della"]([both], [1.0], density=density, window=window, seed=s) for s in range(seeds)])
    stayed = found != 0
    assert bool(((stayed.double().mean(0) - chances).abs() < 5 * (chances * (1 - chances) / seeds).sqrt()).all())
    torch.testing.assert_close(found, torch.where(stayed, both / chances, 0.0), rtol=1e-6, atol=0)
    error = (both.square() * (1 - chances) / chances / seeds).sqrt()
    assert bool(((found.mean(0) - both).abs() < 5 * error).all())  # unbiased


@pytest.mark.parametrize("rule", ["dare", "della", "ties", "breadcrumbs"])
def test_large_matrices_given_by_their_factors_are_merged_in_blocks_as_their_products_would_be(rule, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    updates = [
        LowRank(torch.randn(3, 700, generator=generator), torch.randn(500, 3, generator=generator)) for _ in range(3)
    ]
    matrices, weights = [update.delta() for update in updates], [1.0, -0.5, 2.0]
    monkeypatch.setattr(rows, "_WHOLE", 1)  # numbers are drawn block by block
    monkeypatch.setattr(rows, "_BLOCK", 1 << 14)
    found = RULES[rule](updates, weights)
    torch.testing.assert_close(found, RULES[rule](matrices, weights), rtol=1e-4, atol=1e-4)
    if rule == "dare":
        one = RULES[rule](updates[:1], [1.0], density=0.3)
        stayed = one != 0
        torch.testing.assert_close(one[stayed], (matrices[0] / 0.3)[stayed])
        assert abs(float(stayed.float().mean()) - 0.3) < 5 * math.sqrt(0.21 / stayed.numel())
        assert not torch.equal(stayed[:250], stayed[250:])


def test_a_row_of_a_kernel_is_an_output_channel_to_della():
    (kernel,) = random(1, 0, 50, 40, 1, 1)
    stayed = [RULES["della"]([kernel], [1.0], density=0.5, window=0.4, seed=s) != 0 for s in range(5)]
    flat = [RULES["della"]([kernel.flatten(1)], [1.0], density=0.5, window=0.4, seed=s) != 0 for s in range(5)]
    assert all(torch.equal(a.flatten(1), b) for a, b in zip(stayed, flat, strict=True))


@pytest.mark.parametrize("rule", ["dare", "dare-ties", "della"])
def test_equal_seeds_give_equal_matrices_whatever_torch_has_drawn_before(rule):
    stack = random(2, 0, 10, 10)
    before = torch.get_rng_state()
    first = RULES[rule](stack, [1.0, 1.0], seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(RULES[rule](stack, [1.0, 1.0], seed=3), first)
    torch.set_rng_state(before)
    assert not torch.equal(RULES[rule](stack, [1.0, 1.0], seed=4), first)


# breadcrumbs


def test_breadcrumbs_drops_the_very_largest_and_the_smallest():
    a = matrix([10, -9, 8, -7, 6], [5, -4, 3, -2, 1])
    rule = RULES["breadcrumbs"]
    assert_equal(rule([a], [1.0], density=0.5, gamma=0.2), matrix([0, 0, 8, -7, 6], [5, -4, 0, 0, 0]))
    assert_equal(rule([a], [2.0], density=0.9, gamma=0.1), matrix([0, -18, 16, -14, 12], [10, -8, 6, -4, 2]))
    assert_equal(rule([a], [1.0], density=0.1, gamma=0.0), matrix([10, 0, 0, 0, 0], [0] * 5))


@given(SEEDS, WEIGHTS, st.floats(0.05, 0.95), st.floats(0, 1))
def test_breadcrumbs_is_the_loop_over_sorted_entries(seed, weights, density, share):
    gamma = share * (1 - density)
    for stack in (small_integers(len(weights), seed), random(len(weights), seed)):
        skip, count = round(gamma * 12), max(1, round(density * 12))
        wanted = sum(w * kept(m, skip, count) for w, m in zip(weights, stack, strict=True))
        assert_equal(RULES["breadcrumbs"](stack, weights, density=density, gamma=gamma), wanted)


# what all rules have in common


@pytest.mark.parametrize("name", RULES)
def test_one_matrix_of_weight_one_is_its_own_merge_where_nothing_is_dropped(name):
    for seed in range(3):
        (a,) = small_integers(1, seed)
        assert_equal(RULES[name]([a], [1.0], **lossless(name)), a)


@pytest.mark.parametrize("name", RULES)
def test_two_equal_matrices_are_one_of_them_or_their_sum(name):
    (a,) = random(1, 0)
    factor = 2.0 if name in ("task-arithmetic", "magnitude", "dare", "breadcrumbs") else 1.0
    assert_equal(RULES[name]([a, a], [1.0, 1.0], **lossless(name)), factor * a)


@pytest.mark.parametrize("name", RULES)
@FEW
@given(seed=SEEDS)
def test_the_merge_of_negated_matrices_is_the_negated_merge(name, seed):
    for stack in (small_integers(3, seed), random(3, seed)):
        assert_equal(RULES[name]([-m for m in stack], [1.0, 2.0, 0.5]), -RULES[name](stack, [1.0, 2.0, 0.5]))


@pytest.mark.parametrize("name", RULES)
@FEW
@given(seed=SEEDS, factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_the_merge_of_scaled_matrices_is_the_scaled_merge(name, seed, factor):
    stack, weights = random(3, seed), [1.0, 2.0, 0.5]
    wanted = factor * RULES[name](stack, weights)
    assert_equal(RULES[name]([factor * m for m in stack], weights), wanted)
    assert_equal(RULES[name](stack, weights, scale=factor), wanted)


@pytest.mark.parametrize("name", [name for name in RULES if "seed" not in options_of(name)])
@FEW
@given(seed=SEEDS)
def test_the_order_of_the_matrices_does_not_matter_to_a_rule_without_chance(name, seed):
    a, b, c = small_integers(3, seed)
    wanted = RULES[name]([a, b, c], [1.0, 2.0, 0.5])
    assert_equal(RULES[name]([c, a, b], [0.5, 1.0, 2.0]), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_keeps_dtype_and_shape_takes_a_generator_and_leaves_its_inputs_alone(name, dtype):
    stack = [m.to(dtype) for m in random(2, 0, 3, 4, 2)]
    before = [m.clone() for m in stack]
    found = RULES[name]((m for m in stack), [1.0, 0.5])
    assert (found.dtype, found.shape) == (dtype, (3, 4, 2))
    assert torch.equal(found, RULES[name](stack, [1.0, 0.5]))
    found.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(stack, before, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_weights_are_never_zipped_short(name):
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        RULES[name](random(2, 0), [1.0, 1.0, 1.0])


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
@pytest.mark.parametrize("name", [name for name in RULES if MERGES[name].kind is ENTRIES])
def test_a_density_that_is_no_share_is_refused_by_name(name, density):
    with pytest.raises(OptionError, match=f"density is {density:g}; a share above 0 and up to 1"):
        RULES[name](random(2, 0), [1.0, 1.0], density=density)


@pytest.mark.parametrize("gamma", [-0.1, 0.6, math.nan])
def test_a_gamma_that_leaves_no_room_for_the_density_is_refused(gamma):
    with pytest.raises(OptionError, match=rf"gamma is {gamma:g}; with density 0\.5 it must be from 0 to 0\.5"):
        RULES["breadcrumbs"](random(2, 0), [1.0, 1.0], density=0.5, gamma=gamma)


@pytest.mark.parametrize(
    ("density", "window"),
    [
        (0.5, -0.1),
        (0.1, 0.2),
        (1.0, 0.2),
        (0.95, 0.2),
        (0.5, math.nan),
    ],
)
def test_a_window_whose_chances_are_none_is_refused(density, window):
    with pytest.raises(OptionError, match=f"density {density:g} with window {window:g} gives chances"):
        RULES["della"](random(2, 0), [1.0, 1.0], density=density, window=window)


# what is no number


@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", RULES)
def test_a_matrix_that_is_not_finite_is_refused_by_every_rule(name, place, entry):
    stack = random(2, 0)
    stack[place][1, 2] = entry
    with pytest.raises(MismatchError, match="ΔW is not finite"):
        RULES[name](stack, [1.0, 1.0])


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("average", "slerp")])
def test_a_sum_that_leaves_the_numbers_is_refused_even_where_only_its_sign_counts(name):
    one = torch.full((3, 4), 1e30)
    with pytest.raises(MismatchError, match="ΔW is not finite"):
        RULES[name]([one, -one], [1e30, 1e30])


def test_the_chances_of_della_may_reach_one_and_no_more():
    """density ± window/2: of 0.9 and 0.2 from 0.8 to 1."""
    matrices = [torch.arange(1.0, 13).reshape(3, 4)]
    merged = RULES["della"](matrices, [1.0], density=0.9, window=0.2)
    assert torch.equal(merged[:, -1], matrices[0][:, -1])  # the largest of each row, whose chance is 1
    with pytest.raises(OptionError, match="chances from"):
        RULES["della"](matrices, [1.0], density=0.95, window=0.2)


def test_breadcrumbs_makes_the_rows_of_a_matrix_once_for_both_of_its_cuts(monkeypatch):
    """One in sixteen rows for either sample, all for the counting and all for the sum."""
    generator = torch.Generator().manual_seed(0)
    update = LowRank(torch.randn(3, 64, generator=generator), torch.randn(1 << 14, 3, generator=generator))
    entries = []
    for module in (elementwise, trimming):
        monkeypatch.setattr(module, "made", lambda m, which: entries.append(rows.made(m, which)) or entries[-1].clone())
    found = RULES["breadcrumbs"]([update], [1.0], density=0.6, gamma=0.1)
    assert sum(block.numel() for block in entries) <= (2 + 2 / 16) * found.numel()
    torch.testing.assert_close(found, _between_quantiles(update.delta(), 0.6, 0.1))


def _between_quantiles(matrix: Tensor, density: float, gamma: float) -> Tensor:
    """The matrix with 0 in place of its largest entries, a share gamma, and of what is smaller than the next ones."""
    sizes = matrix.abs().flatten().sort(descending=True).values
    top = round(gamma * len(sizes))
    last = sizes[top + round(density * len(sizes)) - 1]
    return torch.where((matrix.abs() >= last) & (matrix.abs() <= sizes[top]), matrix, 0.0)


@pytest.mark.parametrize("columns", [2049, 2050])
def test_numbers_of_large_matrices_are_those_of_numpys_generator_whatever_the_blocks(columns):
    matrices = [torch.empty(2100, columns)] * 2
    noise, device = rows.Noise(matrices, 7), torch.device("cpu")
    wanted = numpy.random.Generator(numpy.random.SFC64([7, 1])).random((8, columns), dtype=numpy.float32)
    found = torch.cat([noise.of(1, slice(start, start + 1 + start % 2), device) for start in (0, 1, 3, 5, 7)])
    assert torch.equal(found[:8], torch.from_numpy(wanted))
