"""Balanced factors turned onto each other, and their mean, against closed forms and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making_updates import gauged, random_update

from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import MismatchError, OptionError
from lora_lab.geometry import aligned, factor_distance, procrustes_mean

F64 = torch.float64
FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 2**16)


def several(seed, ranks=(3, 3, 2)):
    return [random_update(100 * seed + i, rows=9, columns=7, rank=rank) for i, rank in enumerate(ranks)]


def stacked(update):
    return torch.cat([update.B, update.A.T])


def close(one, other, tolerance=1e-8):
    torch.testing.assert_close(one.delta(), other.delta(), rtol=0, atol=tolerance * float(other.delta().norm()))


@FEW
@given(SEEDS)
def test_aligned_updates_keep_their_delta_and_the_first_its_balanced_factors(seed):
    updates = several(seed)
    turned = aligned(updates)
    for before, after in zip(updates, turned, strict=True):
        close(after, before)
        assert after.rank == 3
        gram = after.A @ after.A.T
        torch.testing.assert_close(after.B.T @ after.B, gram, rtol=0, atol=1e-8 * float(gram.norm()))
    torch.testing.assert_close(turned[0].A, updates[0].balanced().A)


@FEW
@given(SEEDS)
def test_the_distance_has_its_closed_form_and_knows_no_gauge(seed):
    one, other, _ = several(seed)
    Z, Y = stacked(one.balanced()), stacked(other.balanced())
    nuclear = torch.linalg.svdvals(Z.T @ Y).sum()
    expected = math.sqrt(Z.square().sum() + Y.square().sum() - 2 * nuclear)
    assert factor_distance(one, other) == pytest.approx(expected, rel=1e-8)
    assert factor_distance(other, one) == pytest.approx(expected, rel=1e-8)
    assert factor_distance(gauged(one, 1), gauged(other, 2)) == pytest.approx(expected, rel=1e-7)
    assert factor_distance(one, gauged(one, 3)) == pytest.approx(0, abs=1e-6 * math.sqrt(one.norm()))


def test_the_distance_of_rank_one_updates_in_orthogonal_planes_is_that_of_their_norms():
    # ‖Z‖² = 2σ for ΔW = σ u vᵀ, and nothing can be turned: d² = 2σ + 2τ
    one = LowRank(torch.tensor([[2.0, 0.0]], dtype=F64), torch.tensor([[1.0], [0.0]], dtype=F64))
    other = LowRank(torch.tensor([[0.0, 1.0]], dtype=F64), torch.tensor([[0.0], [3.0]], dtype=F64))
    assert factor_distance(one, other) == pytest.approx(math.sqrt(2 * 2 + 2 * 3))


@FEW
@given(SEEDS)
def test_the_mean_is_stationary_and_below_every_other_turn(seed):
    updates, weights = several(seed), [1.0, 2.0, 0.5]
    found = procrustes_mean(updates, weights)
    total, mean = sum(weights), stacked(found.mean)
    assert found.mean.rank == 3
    turned = [stacked(each) for each in found.turned]
    torch.testing.assert_close(mean, sum(w / total * Z for w, Z in zip(weights, turned, strict=True)))
    for update, after in zip(updates, found.turned, strict=True):
        close(after, update)
        # polar(ZᵀZ̄) = I: ZᵀZ̄ is symmetric, and has no negative eigenvalue
        core = stacked(after).T @ mean
        torch.testing.assert_close(core, core.T, rtol=0, atol=1e-7 * float(core.norm()))
        assert float(torch.linalg.eigvalsh(core).min()) > -1e-7 * float(core.norm())
    spread = sum(w / total * (Z - mean).square().sum() for w, Z in zip(weights, turned, strict=True))
    assert found.spread == pytest.approx(float(spread), rel=1e-10)
    for other in updates:  # the value Σ w d² at each of the updates themselves
        value = sum(w / total * factor_distance(u, other) ** 2 for w, u in zip(weights, updates, strict=True))
        assert found.spread <= value + 1e-9


@FEW
@given(SEEDS)
def test_the_mean_knows_neither_gauge_nor_order_and_grows_with_its_updates(seed):
    updates, weights = several(seed), [1.0, 2.0, 0.5]
    mean = procrustes_mean(updates, weights).mean
    found, turned = (procrustes_mean(us, weights) for us in (updates, [gauged(u, i) for i, u in enumerate(updates)]))
    close(turned.mean, mean, 1e-6)
    for one, other in zip(found.turned, turned.turned, strict=True):
        torch.testing.assert_close(one.A, other.A, rtol=0, atol=1e-5 * float(one.A.norm()))
    close(procrustes_mean(updates[::-1], weights[::-1]).mean, mean, 1e-6)
    close(procrustes_mean([3 * u for u in updates], weights).mean, 3 * mean, 1e-7)
    assert mean.norm() <= max(u.norm() for u in updates)


def test_one_delta_in_several_gauges_is_its_own_mean():
    update = random_update(4)
    found = procrustes_mean([update, gauged(update, 1), gauged(update, 2)])
    close(found.mean, update)
    assert found.spread == pytest.approx(0, abs=1e-10)
    gram = stacked(found.mean).T @ stacked(found.mean)
    torch.testing.assert_close(
        gram, gram.diagonal().sort(descending=True).values.diag(), rtol=0, atol=1e-7 * update.norm()
    )
    for turned in found.turned:
        torch.testing.assert_close(turned.A, found.mean.A, rtol=0, atol=1e-6)


def test_the_mean_of_rank_one_updates_is_that_of_their_rows_and_columns():
    # of σ u vᵀ and τ u yᵀ, v and y at a right angle: Z̄ = (Z₁ + Z₂) / 2
    u, v, y = (torch.eye(3, dtype=F64)[i] for i in range(3))
    one, other = LowRank(4 * v[None], u[:, None]), LowRank(9 * y[None], u[:, None])
    expected = torch.outer((2 * u + 3 * u) / 2, (2 * v + 3 * y) / 2)
    torch.testing.assert_close(procrustes_mean([one, other]).mean.delta(), expected)


def test_what_has_no_mean_is_named():
    updates = several(0)
    with pytest.raises(OptionError, match="weights of 0 or more, not all of them 0; they are 1, -1, 0"):
        procrustes_mean(updates, [1, -1, 0])
    with pytest.raises(OptionError, match="they are 0, 0, 0"):
        procrustes_mean(updates, [0, 0, 0])
    with pytest.raises(MismatchError, match="different shapes"):
        procrustes_mean([updates[0], random_update(1)])
    with pytest.raises(MismatchError, match="3 updates and 2 weights"):
        procrustes_mean(updates, [1, 1])
