"""Intruders, and the share of ΔW among the leading directions of W: as dense decompositions have them."""

import math

import numpy as np
import pytest
import torch
from making_updates import gauged, random_update

from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import MismatchError
from lora_lab.geometry import intruders
from lora_lab.geometry.intruders import Weight

SHAPES = [(30, 20), (20, 30), (24, 24)]


def weight(seed, rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(W, delta, top):
    """By the definition: each leading left vector of W + ΔW beside all of W; and both shares of ΔW."""
    U, _, Vh = np.linalg.svd(W, full_matrices=False)
    moved, values, _ = np.linalg.svd(W + delta, full_matrices=False)
    shares = [
        np.linalg.norm(part) ** 2 / np.linalg.norm(delta) ** 2 for part in (U[:, :top].T @ delta, delta @ Vh[:top].T)
    ]
    return np.abs(U.T @ moved[:, :top]).max(0), values[:top], *shares


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_similarities_and_shares_are_those_of_dense_decompositions(shape, whole, size, monkeypatch):
    monkeypatch.setattr(intruders, "_DENSE", 1000 if whole else 0)
    update = random_update(1, *shape, rank=3) * size
    W = weight(0, *shape)
    found = Weight(W).inside(update, 4)
    similarities, values, left, right = dense(W.numpy(), update.delta().numpy(), 4)
    np.testing.assert_allclose(found.similarities, similarities, atol=1e-9)
    np.testing.assert_allclose(found.values, values, rtol=1e-10)
    assert found.left == pytest.approx((left, 4 / shape[0]), rel=1e-9)
    assert found.right == pytest.approx((right, 4 / shape[1]), rel=1e-9)
    assert found.norm == pytest.approx(np.linalg.norm(W))
    assert found.sigma == pytest.approx(np.linalg.norm(W, 2))
    assert found.intruders(0.8) == (similarities < 0.8).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_intruders_are_the_directions_that_the_weight_has_not(shape):
    """ΔW = σ u vᵀ across all of W's directions comes first and is like none; along one of W's, it is none."""
    W = weight(0, *shape)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    count = min(shape)
    spread = (U.sum(1) / math.sqrt(count))[:, None]
    v = Vh[3][None]
    across, along = LowRank(v, 1e6 * spread), LowRank(v, 1e6 * U[:, 3:4])
    first, second = (Weight(W).inside(update, 3) for update in (across, along))
    assert first.similarities[0] == pytest.approx(1 / math.sqrt(count), rel=1e-3)
    assert (first.intruders(), second.intruders()) == (1, 0)
    assert second.similarities == pytest.approx(1)
    assert second.left[0] == pytest.approx(0, abs=1e-12)  # the fourth direction is not among the first three
    assert Weight(W).inside(along, 4).left[0] == pytest.approx(1)
    assert Weight(W).inside(along, 4).right[0] == pytest.approx(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_intrudes_is_taken_out_by_its_singular_triplets(shape):
    """W' + (λ − 1) Σ σ' u' v'ᵀ has the same singular vectors, and λ σ' where the intruders were."""
    W, update = weight(0, *shape), random_update(2, *shape, rank=2) * 5
    base = Weight(W)
    inside, part = base.inside(update, 6), base.intruding(update, 6)
    count = inside.intruders()
    assert 0 < count == part.rank < 6
    moved = W + update.delta()
    lowered = moved + (0.75 - 1) * part.delta()
    intruding = inside.similarities < 0.5
    expected = np.linalg.svd(moved.numpy())[1]
    expected[:6][intruding] *= 0.75
    np.testing.assert_allclose(np.linalg.svd(lowered.numpy())[1], np.sort(expected)[::-1], rtol=1e-9)
    assert base.intruding(update * 1e-3, 6).rank == 0


def test_nothing_hangs_on_the_gauge_or_the_unit_of_weight_and_update():
    W, update = weight(0, 20, 30), random_update(1, 20, 30)
    one, other = Weight(W).inside(update), Weight(W).inside(gauged(update, 7))
    np.testing.assert_allclose(one.similarities, other.similarities, atol=1e-9)
    for unit in (1e-20, 1e20, 1e180):
        scaled = Weight(W * unit).inside(LowRank(update.A, update.B * unit))
        np.testing.assert_allclose(scaled.similarities, one.similarities, atol=1e-9)
        np.testing.assert_allclose(scaled.values, one.values * unit, rtol=1e-9)
        assert scaled.left == pytest.approx(one.left)


def test_exchanging_sides_exchanges_the_shares():
    W, update = weight(0, 20, 30), random_update(1, 20, 30)
    one, other = Weight(W).inside(update), Weight(W.T).inside(LowRank(update.B.T, update.A.T))
    assert one.left == pytest.approx(other.right)
    assert one.right == pytest.approx(other.left)
    np.testing.assert_allclose(one.values, other.values)


def test_a_weight_of_low_rank_has_only_the_directions_that_it_has():
    low, update = random_update(0, 20, 30, rank=2), random_update(1, 20, 30, rank=1) * 100
    found = Weight(low.delta()).inside(update, 5)
    u, *_ = np.linalg.svd(update.delta().numpy())
    U, *_ = np.linalg.svd(low.delta().numpy())
    assert Weight(low.delta()).rank == 2
    assert len(found.values) == 3
    assert found.similarities[0] == pytest.approx(np.abs(U[:, :2].T @ u[:, 0]).max(), abs=0.02)
    assert found.left[1] == 2 / 20
    nothing = Weight(torch.zeros(20, 30)).inside(update, 5)
    assert nothing.similarities.tolist() == [0.0]
    assert (nothing.norm, nothing.left) == (0.0, (0.0, 0.0))


def test_without_an_update_nothing_intrudes_and_nothing_is_shared():
    none = Weight(weight(0, 20, 30)).inside(LowRank(torch.zeros(2, 30).double(), torch.zeros(20, 2).double()))
    np.testing.assert_allclose(none.similarities, 1, atol=1e-9)
    assert math.isnan(none.left[0])
    with pytest.raises(MismatchError, match="not finite"):
        Weight(torch.full((3, 4), math.nan))
