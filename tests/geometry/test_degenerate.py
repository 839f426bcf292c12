"""Numbers of odd updates are those of dense matrices: of low rank, of no or any size, of equal σ, of two ranks."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from making_updates import gauged, random_update

from lora_lab.adapters.lowrank import LowRank
from lora_lab.geometry import Canonical, module_pair

ROWS, COLUMNS = 30, 20


def scaled(update, sizes):
    return LowRank(torch.tensor(sizes, dtype=update.A.dtype)[:, None] * update.A, update.B)


def odd_updates(dtype):
    plain = random_update(0, dtype=dtype)
    return {
        "plain": plain,
        "of rank 2": random_update(1, rank=2, dtype=dtype),
        "of full rank": random_update(2, rank=25, dtype=dtype),
        "with repeated ranks": LowRank(torch.cat([plain.A, plain.A[:2]]), torch.cat([plain.B, plain.B[:, :2]], 1)),
        "zero": LowRank(plain.A, 0 * plain.B),
        "tiny": LowRank(plain.A * 1e-20, plain.B * 1e-20),
        "huge": LowRank(plain.A * 1e15, plain.B * 1e15),
        "of equal σ": LowRank(torch.eye(4, COLUMNS, dtype=dtype), torch.eye(ROWS, 4, dtype=dtype)),
        "nearly the first": LowRank(plain.A, plain.B * (1 + 1e-5)),
        "minus the first": LowRank(-plain.A, plain.B),
        "of terms that cancel": LowRank(torch.cat([plain.A, plain.A * 1.001]), torch.cat([plain.B, -plain.B], 1)),
        "of steep σ": scaled(plain, [1, 1e-2, 1e-4, 1e-5]),
        "of unbalanced factors": LowRank(scaled(plain, [1e9, 1, 1e-9, 1]).A, scaled(plain, [1] * 4).B * 1e-3),
    }


def dense(update):
    return update.B.double().numpy() @ update.A.double().numpy()


def dense_angles(one, other):
    """Of the left and of the right singular vectors, by scipy, with as many as are no rounding of float32."""
    (U, S, Vh), (P, T, Qh) = np.linalg.svd(one), np.linalg.svd(other)
    k, m = (int((values > 1e-6 * values[0]).sum()) for values in (S, T))
    if not min(k, m):
        return np.zeros(0), np.zeros(0)
    sides = (scipy.linalg.subspace_angles(U[:, :k], P[:, :m]), scipy.linalg.subspace_angles(Vh[:k].T, Qh[:m].T))
    return [np.sort(angles) for angles in sides]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", odd_updates(torch.float64))
def test_a_pair_with_an_odd_update_is_measured_as_dense_matrices_are(name, dtype):
    updates = odd_updates(dtype)
    one, X = updates[name], dense(updates[name])
    for other_name, other in updates.items():
        Y, pair = dense(other), module_pair(Canonical(one), Canonical(other), signs=True)
        sizes = np.linalg.norm(X), np.linalg.norm(Y)
        assert pair.inner == pytest.approx((X * Y).sum(), rel=1e-6, abs=1e-10 * sizes[0] * sizes[1]), other_name
        assert pair.distance == pytest.approx(np.linalg.norm(X - Y), rel=1e-5, abs=1e-9 * max(sizes)), other_name
        for side, angles in zip((pair.left, pair.right), dense_angles(X, Y), strict=True):
            np.testing.assert_allclose(side.angles, angles, rtol=1e-4, atol=2e-5, err_msg=other_name)
        same, counted = (X * np.sign(Y) > 0).sum(), (X * np.sign(Y) != 0).sum()
        assert pair.signs == pytest.approx((same, counted), abs=3), other_name  # entries that nearly cancel
        both = [U * np.sqrt(S) for U, S, _ in (np.linalg.svd(each, full_matrices=False) for each in (X, Y))]
        squares = np.linalg.svd(np.concatenate(both, 1))[1] ** 2
        if squares.sum():
            assert pair.top_share == pytest.approx(squares[0] / squares.sum(), rel=1e-4), other_name


@pytest.mark.parametrize("name", odd_updates(torch.float64))
def test_one_odd_update_has_the_ranks_of_its_dense_singular_values(name):
    update = odd_updates(torch.float64)[name]
    S = np.linalg.svd(dense(update))[1]
    form = Canonical(update)
    np.testing.assert_allclose(form.singular_values, S[: len(form.singular_values)], rtol=1e-6, atol=1e-9 * S[0])
    if S[0]:
        shares = S[S > 0] / S.sum()
        assert form.effective_rank() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
        assert form.stable_rank() == pytest.approx((S / S[0] @ S / S[0]).sum(), rel=1e-6)
    other = module_pair(form, Canonical(gauged(update, 3)))
    assert other.distance <= 1e-6 * (form.norm or 1.0)


def test_exchanging_the_factors_exchanges_the_sides():
    for one, other in itertools.combinations(odd_updates(torch.float64).values(), 2):
        pair = module_pair(Canonical(one), Canonical(other))
        turned = module_pair(*(Canonical(LowRank(u.B.T.contiguous(), u.A.T.contiguous())) for u in (one, other)))
        np.testing.assert_allclose(turned.left.angles, pair.right.angles, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(turned.right.angles, pair.left.angles, rtol=1e-6, atol=1e-6)
        assert (turned.left.chance, turned.right.chance) == (pair.right.chance, pair.left.chance)
        assert turned.inner == pytest.approx(pair.inner, abs=1e-12 * Canonical(one).norm * Canonical(other).norm)


@pytest.mark.parametrize("unit", [1e-100, 1e-20, 1e20, 1e50])
def test_a_unit_changes_sizes_and_nothing_else(unit):
    """Squares of 1e-200 are 0 in float64; energies, ranks and angles do not hang on it."""
    one, other = random_update(0), random_update(1)
    forms = [Canonical(LowRank(u.A * unit, u.B * unit), 0.9) for u in (one, other)]
    assert [form.rank for form in forms] == [Canonical(u, 0.9).rank for u in (one, other)]
    assert forms[0].norm / unit / unit == pytest.approx(Canonical(one).norm)
    assert forms[0].stable_rank() == pytest.approx(Canonical(one).stable_rank())
    angles = module_pair(*forms).left.angles
    np.testing.assert_allclose(angles, module_pair(Canonical(one, 0.9), Canonical(other, 0.9)).left.angles, atol=1e-9)
