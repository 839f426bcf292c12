"""Everything between two ΔW is what dense float64 matrices give."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from making_updates import gauged, random_update

from lora_lab.adapters.lowrank import LowRank
from lora_lab.geometry import Canonical, gaussian_agreement, module_pair, principal_angles, sign_agreement


def dense_angles(one, other, ranks):
    """By scipy, from the singular vectors of dense matrices."""
    bases = [np.linalg.svd(update.delta().double().numpy()) for update in (one, other)]
    left = [u[:, :k] for (u, _, _), k in zip(bases, ranks, strict=True)]
    right = [vh[:k].T for (_, _, vh), k in zip(bases, ranks, strict=True)]
    return [np.sort(scipy.linalg.subspace_angles(*side)) for side in (left, right)]


@pytest.mark.parametrize("ranks", [(4, 4), (2, 5), (5, 2), (1, 1), (12, 15)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inner_product_distance_and_angles_are_those_of_dense_matrices(ranks, dtype):
    one, other = (random_update(seed, rank=rank, dtype=dtype) for seed, rank in enumerate(ranks))
    pair = module_pair(Canonical(one), Canonical(other))
    deltas = [update.B.double().numpy() @ update.A.double().numpy() for update in (one, other)]
    assert pair.inner == pytest.approx((deltas[0] * deltas[1]).sum(), rel=1e-9)
    assert pair.distance == pytest.approx(np.linalg.norm(deltas[0] - deltas[1]), rel=1e-9)
    exact = [LowRank(update.A.double(), update.B.double()) for update in (one, other)]
    for side, angles, size in zip((pair.left, pair.right), dense_angles(*exact, ranks), (30, 20), strict=True):
        np.testing.assert_allclose(side.angles, angles, atol=1e-7)
        assert side.shared == pytest.approx((np.cos(angles) ** 2).sum())
        assert side.chance == pytest.approx(ranks[0] * ranks[1] / size)
        assert (np.diff(side.angles) >= 0).all()


def test_small_angles_keep_their_digits():
    """Two planes in five dimensions that share one direction and differ by a known angle in the other."""
    for angle in (1e-12, 1e-9, 1e-6, 1e-3, 0.05, 0.3):
        B = torch.eye(5, 2).double()
        turned = B.clone()
        turned[1, 1], turned[2, 1] = math.cos(angle), math.sin(angle)
        A = torch.eye(2, 7).double() * torch.tensor([[2.0], [1.0]])
        left, right = principal_angles(Canonical(LowRank(A, B)), Canonical(LowRank(A, turned)))
        np.testing.assert_allclose(left, [0, angle], rtol=1e-6, atol=1e-15)
        np.testing.assert_allclose(right, 0, atol=1e-15)


def test_gauge_twins_lie_on_each_other():
    update = random_update(0)
    pair = module_pair(Canonical(update), Canonical(gauged(update, 5)))
    assert pair.inner == pytest.approx(update.norm() ** 2)
    assert pair.distance < 1e-12 * update.norm()
    assert max(pair.left.angles[-1], pair.right.angles[-1]) < 1e-12
    apart = LowRank(update.A, update.B * (1 + 1e-7))
    assert module_pair(Canonical(update), Canonical(apart)).distance == pytest.approx(1e-7 * update.norm(), rel=1e-6)


def test_one_subspace_may_be_shared_and_the_other_not():
    one, other = random_update(0), random_update(1)
    mixed = LowRank(other.A, one.B @ torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    pair = module_pair(Canonical(one), Canonical(mixed))
    assert pair.left.angles.max() < 1e-10
    assert pair.left.shared == pytest.approx(4)
    assert pair.right.angles.min() > 0.1


def test_a_subspace_within_a_larger_one_has_no_angle_to_it():
    large = random_update(0, rank=6)
    small = LowRank(large.A[:2], large.B[:, :2])
    for pair in (
        principal_angles(Canonical(large), Canonical(small)),
        principal_angles(Canonical(small), Canonical(large)),
    ):
        for angles in pair:
            np.testing.assert_allclose(angles, [0, 0], atol=1e-12)


def test_nothing_has_no_angles():
    zero = Canonical(LowRank(torch.randn(4, 20).double(), torch.zeros(30, 4).double()))
    update = Canonical(random_update(0))
    pair = module_pair(zero, update)
    assert (pair.inner, pair.distance) == (0, pytest.approx(update.norm))
    assert (len(pair.left.angles), pair.left.shared, pair.left.chance) == (0, 0, 0)
    assert module_pair(zero, zero).distance == 0


@pytest.mark.parametrize("block", [1, 45, 2**22])
def test_signs_are_counted_as_in_dense_matrices_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr("lora_lab.geometry.pairs._BLOCK", block)
    one, other = random_update(0), random_update(1)
    one = LowRank(one.A, one.B * (torch.arange(30) % 7 > 0)[:, None])  # rows of zeros have no sign
    signs = (one.delta() * other.delta()).sign()
    assert sign_agreement(one, other) == (int((signs > 0).sum()), 20 * 25)
    assert module_pair(Canonical(one), Canonical(other)).signs is None


def test_normal_entries_agree_in_sign_as_often_as_sheppard_says():
    assert [gaussian_agreement(cosine) for cosine in (-1, 0, 0.5, 1 + 1e-12)] == pytest.approx([0, 1 / 2, 2 / 3, 1])
    one, other = random_update(0, 400, 300, rank=200), random_update(1, 400, 300, rank=200)
    mixed = one + other * 0.7
    same, counted = sign_agreement(one, mixed)
    cosine = one.inner(mixed) / one.norm() / mixed.norm()
    assert counted == 400 * 300
    assert same / counted == pytest.approx(gaussian_agreement(cosine), abs=0.01)


def test_random_subspaces_overlap_as_chance_says():
    """Mean of ‖Q₁ᵀQ₂‖² over 400 pairs: its standard deviation over pairs is √2 kl/d · √((d−k)(d−l)) / (d √kl) ≈ .17."""
    shared = [
        module_pair(Canonical(random_update(2 * i, rank=2)), Canonical(random_update(2 * i + 1, rank=3)))
        for i in range(400)
    ]
    for side, size in (("left", 30), ("right", 20)):
        values = np.array([getattr(pair, side).shared for pair in shared])
        chance = 2 * 3 / size
        assert {getattr(pair, side).chance for pair in shared} == {chance}
        assert abs(values.mean() - chance) < 3.5 * values.std() / 20
        assert values.std() / 20 < 0.05 * chance
