"""WUDI against its objective, its closed form, and gradient descent written out on dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making_updates import gauged, random_update

from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.errors import OptionError
from lora_lab.merging.rules.interference import wudi

F64 = torch.float64
FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 2**16)
WEIGHTS = [1.0, -0.5, 2.0]


def several(seed, count=3, columns=12, rank=3):
    return [random_update(100 * seed + i, rows=9, columns=columns, rank=rank) for i in range(count)]


def weighted(updates):
    return [w * u.delta() for u, w in zip(updates, WEIGHTS, strict=True)]


def objective(W, deltas):
    return sum(float(((W - D) @ D.T).square().sum() / D.square().sum()) for D in deltas)


def close(found, wanted, tolerance=1e-8):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.norm())))


@FEW
@given(SEEDS)
def test_with_independent_rows_the_minimum_is_the_closed_form_and_nothing_is_left(seed):
    updates = several(seed)
    deltas, A = weighted(updates), torch.cat([u.A for u in updates])
    wanted = torch.cat([D @ u.A.T for D, u in zip(deltas, updates, strict=True)], dim=1) @ torch.linalg.inv(A @ A.T) @ A
    found = wudi(updates, WEIGHTS, ridge=0.0).delta()
    close(found, wanted, 1e-6)
    assert objective(found, deltas) < 1e-10 * objective(sum(deltas), deltas)
    close(wudi([gauged(u, i) for i, u in enumerate(updates)], WEIGHTS, ridge=0.0).delta(), found, 1e-5)
    close(wudi([3 * u for u in updates], WEIGHTS, ridge=0.0).delta(), 3 * found, 1e-6)


@FEW
@given(SEEDS, st.sampled_from([0.0, 1e-3, 0.3]))
def test_with_shared_rows_it_is_the_solution_of_the_normal_equations_with_its_ridge(seed, ridge):
    updates = several(seed, columns=5)  # 9 rows of A in 5 dimensions
    deltas = weighted(updates)
    grams = [D.T @ D / D.square().sum() for D in deltas]
    H, S = sum(grams), sum(deltas)
    eye = torch.eye(5, dtype=F64)
    pull = ridge * H.trace() / 5 * eye  # towards the sum
    wanted = torch.linalg.solve(H + pull, (sum(D @ G for D, G in zip(deltas, grams, strict=True)) + S @ pull).T).T
    close(wudi(updates, WEIGHTS, ridge=ridge).delta(), wanted, 1e-6)


@pytest.mark.parametrize("steps", [0, 1, 7, 40])
def test_steps_are_those_of_gradient_descent_on_the_dense_objective(steps):
    updates = several(5)
    deltas = weighted(updates)
    H = sum(D.T @ D / D.square().sum() for D in deltas)
    W = sum(deltas).clone().requires_grad_()
    for _ in range(steps):
        loss = sum(((W - D) @ D.T).square().sum() / D.square().sum() for D in deltas)
        (gradient,) = torch.autograd.grad(loss, W)
        W = (W - 0.5 * 0.7 / float(torch.linalg.eigvalsh(H).max()) * gradient).detach().requires_grad_()
    close(wudi(updates, WEIGHTS, steps=steps, rate=0.7).delta(), W.detach(), 1e-8)


@FEW
@given(SEEDS)
def test_more_steps_bring_it_from_the_sum_nearer_to_the_minimum(seed):
    updates = several(seed)
    deltas = weighted(updates)
    close(wudi(updates, WEIGHTS, steps=0).delta(), sum(deltas))
    values = [objective(wudi(updates, WEIGHTS, steps=steps).delta(), deltas) for steps in (0, 1, 5, 50, 500)]
    assert values == sorted(values, reverse=True)
    close(wudi(updates, WEIGHTS, steps=10**9).delta(), wudi(updates, WEIGHTS, ridge=0.0).delta(), 1e-4)
    assert wudi(updates, WEIGHTS).rank <= sum(u.rank for u in updates)


def test_one_adapter_or_the_same_several_times_is_that_adapter():
    one = several(2, 1)[0]
    close(wudi([one], [1.0]).delta(), one.delta())
    close(wudi([one, gauged(one, 1), gauged(one, 2)], [1.0] * 3, ridge=0.0).delta(), one.delta(), 1e-6)


def test_adapters_that_share_their_rows_almost_are_held_near_the_sum_where_they_differ():
    one, other = several(3, 2)
    other = LowRank(one.A + 1e-5 * other.A, other.B)
    free = wudi([one, other], [1.0, 1.0], ridge=0.0).delta()
    held = wudi([one, other], [1.0, 1.0]).delta()
    size = float(combine([one, other], [1.0, 1.0]).norm())
    assert float(free.norm()) > 1e3 * size
    assert float(held.norm()) < size


def test_zeros_stay_zeros_and_an_absent_adapter_counts_for_nothing():
    one = several(2, 1)[0]
    assert float(wudi([0.0 * one, 0.0 * one], [1.0, 1.0]).delta().abs().max()) == 0
    absent = LowRank(one.A[:0], one.B[:, :0], one.shape)
    close(wudi([one, absent], [2.0, 1.0]).delta(), 2 * one.delta())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": -1}, "steps is -1; a whole number of at least 0 is needed"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": 3, "rate": 2.0}, "rate is 2; a number above 0 and below 2 is needed"),
        ({"ridge": -1.0}, "ridge is -1; a number of at least 0 is needed"),
    ],
)
def test_it_says_what_cannot_be(options, text):
    with pytest.raises(OptionError, match=text):
        wudi(several(0), WEIGHTS, **options)
