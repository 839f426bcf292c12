"""A dense ΔW as factors: exact, cut to the best of a rank, and in the large by random subspaces with its true error."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_lab.adapters import cutting
from lora_lab.adapters.cutting import factored
from lora_lab.adapters.lowrank import Basis
from lora_lab.errors import OptionError

SIDES = st.integers(1, 12)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decaying(rows: int, columns: int, decay: float) -> Tensor:
    """A float32 matrix whose singular values fall by this factor, from 1 on."""
    k = min(rows, columns, 60)
    U, V = torch.linalg.qr(random(rows, k)).Q, torch.linalg.qr(random(columns, k, seed=1)).Q
    return (U * decay ** torch.arange(k) @ V.T).float()


@given(SIDES, SIDES, st.integers(0, 999))
def test_without_a_rank_it_is_the_matrix_times_an_identity_to_the_bit(rows, columns, seed):
    dense = random(rows, columns, seed=seed)
    update, error = factored(dense)
    assert error == 0
    assert update.rank == min(rows, columns)
    assert torch.equal(update.delta(), dense)
    again, error = factored(dense, min(rows, columns) + 3)
    assert error == 0
    assert torch.equal(again.delta(), dense)


@given(SIDES, SIDES, st.integers(1, 11), st.integers(0, 999))
def test_a_cut_is_the_best_approximation_of_its_rank_and_tells_its_error(rows, columns, rank, seed):
    dense = random(rows, columns, seed=seed)
    update, error = factored(dense, rank)
    S = torch.linalg.svdvals(dense)
    best = float(S[rank:].norm() / S.norm())
    assert update.rank == min(rank, rows, columns)
    assert error == pytest.approx(best, rel=1e-6, abs=1e-12)
    assert float((update.delta() - dense).norm() / dense.norm()) == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_a_cut_of_a_diagonal_keeps_its_largest_entries():
    dense = torch.diag(torch.tensor([1.0, -5.0, 3.0, 2.0], dtype=torch.float64))
    update, error = factored(dense, 2)
    torch.testing.assert_close(update.delta(), torch.diag(torch.tensor([0, -5, 3, 0], dtype=torch.float64)))
    assert error == pytest.approx(math.sqrt(5 / 39))


def test_factors_of_a_cut_share_the_singular_values_evenly():
    update, _ = factored(random(9, 7), 3)
    torch.testing.assert_close(update.A @ update.A.T, update.B.T @ update.B)


def test_the_error_of_a_float32_cut_is_that_of_the_factors_that_came_out():
    dense = random(40, 5, dtype=torch.float32) @ random(5, 30, seed=1, dtype=torch.float32)
    update, error = factored(dense, 5)
    assert update.A.dtype == torch.float32
    true = float((update.B.double() @ update.A.double() - dense.double()).norm() / dense.double().norm())
    assert 0 < true < 1e-6
    assert error == pytest.approx(true, rel=0.5)


@pytest.mark.parametrize("shape", [(6, 2, 3, 1), (2, 9), (9, 2), (1, 1)])
def test_a_kernel_keeps_its_shape(shape):
    dense = random(*shape)
    for rank in (None, 1):
        assert factored(dense, rank)[0].shape == shape
        assert factored(dense, rank)[0].delta().shape == shape


def test_of_zeros_nothing_is_lost():
    for rank in (None, 1, 3):
        update, error = factored(torch.zeros(5, 4), rank)
        assert error == 0
        assert torch.equal(update.delta(), torch.zeros(5, 4))


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(OptionError, match=f"a rank of {rank} was asked for; it is at least 1"):
        factored(random(4, 4), rank)


# the large path


@pytest.mark.parametrize(("rows", "columns"), [(1030, 1100), (1200, 1025)])
def test_a_large_matrix_is_cut_nearly_as_well_as_can_be_and_tells_its_true_error(rows, columns):
    dense = decaying(rows, columns, 0.8)
    before = torch.get_rng_state()
    update, error = factored(dense, 8)
    best = 0.8**8 * math.sqrt((1 - 0.64**52) / (1 - 0.64**60))
    true = float((dense.double() - update.B.double() @ update.A.double()).norm() / dense.double().norm())
    assert error == pytest.approx(true, rel=1e-4)
    assert best * (1 - 1e-5) < error < best * (1 + 1e-4)
    assert torch.equal(torch.get_rng_state(), before)
    again, _ = factored(dense, 8)
    assert torch.equal(again.A, update.A)


def test_a_large_matrix_of_low_rank_is_found_whole():
    dense = random(1030, 4, dtype=torch.float32) @ random(4, 1030, seed=1, dtype=torch.float32)
    update, error = factored(dense, 6)
    assert error < 4e-6
    assert bool(update.delta().isfinite().all())


def test_the_large_path_agrees_with_the_small_one(monkeypatch):
    dense = decaying(80, 70, 0.7)
    small, error = factored(dense, 5)
    monkeypatch.setattr(cutting, "_SMALL", 10)
    large, other = factored(dense, 5)
    torch.testing.assert_close(large.delta(), small.delta(), rtol=0, atol=1e-5)
    assert other == pytest.approx(error, rel=1e-4)


def test_a_flat_spectrum_is_cut_to_an_error_that_is_told_truly(monkeypatch):
    monkeypatch.setattr(cutting, "_SMALL", 10)
    dense = random(60, 50, dtype=torch.float32)  # the worst there is for a random subspace
    update, error = factored(dense, 4)
    S = torch.linalg.svdvals(dense.double())
    assert error == pytest.approx(float((dense - update.delta()).norm() / dense.norm()), rel=1e-4)
    assert float(S[4:].norm() / S.norm()) <= error + 1e-6
    assert error < 1.01 * float(S[4:].norm() / S.norm())


def test_a_basis_is_orthonormal_whatever_the_condition_of_its_columns():
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(16, dtype=torch.float64)
    for size in (0.5, 1.0, 2.0, 4.0):
        for _ in range(20):
            mixing = torch.randn(16, 16, dtype=torch.float64, generator=generator).triu() * size + eye
            X = torch.randn(64, 16, dtype=torch.float64, generator=generator) @ mixing
            basis = Basis(X)
            Q = basis.times(eye)
            assert float((Q.T @ Q - eye).norm()) < 1e-9
            assert torch.allclose(Q @ basis.R, X, atol=1e-9 * float(X.norm()))
    tiny = Basis(torch.randn(64, 16, dtype=torch.float64, generator=generator) * 1e-160)
    Q = tiny.times(eye)
    assert float((Q.T @ Q - eye).norm()) < 1e-9


@pytest.mark.parametrize("rank", [8, 40])
@pytest.mark.parametrize("power", [0.05, 0.1, 0.25, 0.5, 1.0, 1.5])
def test_a_large_cut_of_slowly_falling_singular_values_is_nearly_the_best(monkeypatch, power, rank):
    monkeypatch.setattr(cutting, "_SMALL", 32)
    U, V = torch.linalg.qr(random(500, 400)).Q, torch.linalg.qr(random(400, 400, seed=1)).Q
    S = (1 + torch.arange(400, dtype=torch.float64)) ** -power
    dense = (U * S @ V.T).float()
    update, error = factored(dense, rank)
    best = float(S[rank:].norm() / S.norm())
    assert error == pytest.approx(float((update.delta() - dense).norm() / dense.norm()), rel=1e-4)
    assert -1e-5 <= error / best - 1 < 0.005  # a round less misses it


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_a_cut_to_the_full_rank_is_the_matrix_to_the_bit(shape):
    dense = random(*shape)
    update, error = factored(dense, min(shape))
    assert error == 0
    assert torch.equal(update.delta(), dense)


def test_a_large_matrix_of_a_rank_that_the_blocks_exceed_is_cut_to_the_best():
    """Beyond its rank, a block of the basis is rounding, which is orthogonal to the others only if it is made so."""
    U, V = torch.linalg.qr(random(1100, 300)).Q, torch.linalg.qr(random(1040, 300, seed=1)).Q
    S = 1 / (1 + torch.arange(300, dtype=torch.float64) / 60)
    dense = (U * S @ V.T).float()
    update, error = factored(dense, 256)
    best = float(S[256:].norm() / S.norm())
    assert error == pytest.approx(best, rel=1e-4)
    assert float((update.delta() - dense).norm() / dense.norm()) == pytest.approx(best, rel=1e-4)
    assert float((update.singular_values() - S[:256]).abs().max()) < 1e-5
