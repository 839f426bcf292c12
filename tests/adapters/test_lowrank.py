import math
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank, all_finite, combine, combine_factors, is_finite
from lora_lab.errors import MismatchError, OptionError


def random(rank: int, rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    B = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return LowRank(A.to(dtype), B.to(dtype))


def orthogonal(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def assert_equal(got: Tensor, wanted: Tensor, size: float = 1.0) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10 * max(size, 1e-300))


seeds = st.integers(0, 2**31)
sides = st.integers(1, 9)
ranks = st.integers(1, 6)


@st.composite
def updates(draw: st.DrawFn, count: int = 1) -> list[LowRank]:
    """Updates of one shape, often wider than they are tall, rank-deficient, zero, tiny or huge."""
    rows, columns, made = draw(sides), draw(sides), []
    for _ in range(count):
        update = random(draw(ranks), rows, columns, draw(seeds))
        match draw(st.sampled_from(["full", "full", "repeated", "zero"])):
            case "repeated":
                update = LowRank(update.A[:1].expand(update.rank, -1), update.B)
            case "zero":
                update = update * 0.0
        made.append(update * draw(st.sampled_from([1.0, 1e-6, 1e5])))
    return made


def size(*several: LowRank) -> float:
    """Upper bound of ‖ΔW‖, which rounding errors are relative to."""
    return max(float(update.A.norm() * update.B.norm()) for update in several)


# closed forms


def test_delta_is_b_times_a_in_the_given_shape():
    A, B = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0], [-1.0]])
    assert LowRank(A, B).delta().tolist() == [[1, 2, 3, 4], [-1, -2, -3, -4]]
    kernel = LowRank(A, B, (2, 2, 2))
    assert kernel.delta().tolist() == [[[1, 2], [3, 4]], [[-1, -2], [-3, -4]]]


def test_a_rank_one_update_has_the_norm_of_an_outer_product():
    update = LowRank(torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0], [12.0]]))
    assert update.norm() == pytest.approx(5 * 13)
    assert update.singular_values().tolist() == pytest.approx([65])
    assert update.effective_rank() == pytest.approx(1)


def test_truncating_a_diagonal_keeps_its_largest_entries():
    update = LowRank(torch.eye(3), torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    kept, error = update.truncate(2)
    torch.testing.assert_close(kept.delta(), torch.diag(torch.tensor([0.0, 3.0, 2.0])))
    assert error == pytest.approx(math.sqrt(1 / 14))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_equal_singular_values_have_their_number_as_effective_rank(rank):
    update = LowRank(torch.eye(rank, 7), torch.eye(8, rank) * 0.3)
    assert update.effective_rank() == pytest.approx(rank)


def test_inner_of_orthogonal_updates_is_zero():
    left = LowRank(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
    right = LowRank(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [0.0]]))
    assert left.inner(right) == 0
    assert left.inner(left * -2) == -2


def test_the_norm_survives_factors_that_cancel():
    A = torch.ones(2, 3, dtype=torch.float64)
    B = torch.tensor([[1e8, -1e8 + 1.0]], dtype=torch.float64)
    assert LowRank(A, B).norm() == pytest.approx(math.sqrt(3), rel=1e-6)


def test_a_zero_update_gives_zeros_and_never_nan():
    zero = random(3, 5, 4, seed=0) * 0.0
    kept, error = zero.truncate(2)
    assert (zero.norm(), zero.effective_rank(), error, zero.inner(zero)) == (0, 0, 0, 0)
    for same in (kept, zero.balanced(), zero.rotated_to(random(3, 5, 4, seed=1)), zero + zero, -zero):
        assert not same.delta().any()
        assert bool(torch.isfinite(same.A).all() and torch.isfinite(same.B).all())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("row", [[0.6, -1.0], [-0.6, 1.0], [0.9, -0.95, 1.0], [0.99, -0.3, -1.0]])
def test_the_largest_entry_of_each_balanced_row_is_positive_not_an_earlier_one(row, sign):
    A = sign * torch.tensor([row], dtype=torch.float64)
    balanced = LowRank(A, torch.tensor([[1.0], [2.0]], dtype=torch.float64)).balanced()
    assert float(balanced.A.flatten()[A.abs().argmax()]) > 0
    torch.testing.assert_close(balanced.A.abs() / balanced.A.abs().max(), A.abs())


def test_twins_balance_to_one_sign_even_where_two_entries_tie():
    B = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    left, right = (torch.tensor([[1.0 + nudge, -1.0]], dtype=torch.float64) for nudge in (1e-9, -1e-9))
    torch.testing.assert_close(LowRank(left, B).balanced().A, LowRank(right, B).balanced().A)


# properties, against dense float64


@given(updates(2))
def test_the_distance_of_two_updates_is_told_with_the_norm_of_the_first(made):
    one, other = made
    distance, norm = one.distance(other)
    dense = [update.delta() for update in made]
    close = {"rel": 1e-9, "abs": 1e-10 * size(*made) + 1e-300}
    assert norm == pytest.approx(float(dense[0].norm()), **close)
    assert distance == pytest.approx(float((dense[0] - dense[1]).norm()), **close)
    assert one.norm() == norm  # which was not computed again


@pytest.mark.parametrize("factor", [1.0, 1e-22, 1e-30, 1e17])
def test_a_rough_norm_has_three_digits_of_the_norm_also_where_squares_leave_float32(factor):
    update = random(6, 40, 30, seed=3, dtype=torch.float32)
    update = LowRank(update.A * factor, update.B / factor**0.5)
    assert update.rough_norm() == pytest.approx(update.norm(), rel=1e-3)


def test_a_rough_norm_of_what_cancels_is_the_norm():
    one = random(3, 20, 30, seed=4, dtype=torch.float32)
    nothing = one - one * (1 - 1e-4)
    assert nothing.rough_norm() == nothing.norm() == pytest.approx(1e-4 * one.norm(), rel=1e-2)
    assert (one * 0.0).rough_norm() == 0


@given(updates())
def test_norm_spectrum_and_effective_rank_are_those_of_the_dense_matrix(made):
    (update,) = made
    dense = update.delta()
    S = torch.linalg.svdvals(dense)
    assert update.norm() == pytest.approx(float(dense.norm()), rel=1e-9, abs=1e-12 * size(update))
    assert_equal(update.singular_values(), S[: update.rank], size(update))
    if float(S[0]) > 1e-9 * size(update):
        share = S / S.sum()
        wanted = math.exp(-sum(float(p) * math.log(float(p)) for p in share if p > 0))
        assert update.effective_rank() == pytest.approx(wanted, rel=1e-6)
        assert 1 - 1e-9 <= update.effective_rank() <= min(update.rank, *dense.shape) + 1e-9


@given(updates(count=2))
def test_inner_is_the_sum_of_the_products_and_symmetric(made):
    left, right = made
    bound = size(left) * size(right)
    assert left.inner(right) == pytest.approx(float((left.delta() * right.delta()).sum()), rel=1e-9, abs=1e-12 * bound)
    assert left.inner(right) == pytest.approx(right.inner(left), rel=1e-12, abs=1e-12 * bound)
    assert left.inner(left) == pytest.approx(left.norm() ** 2, rel=1e-9, abs=1e-12 * size(left) ** 2)


@given(updates())
def test_the_svd_has_orthonormal_columns_and_rebuilds_delta(made):
    (update,) = made
    U, S, Vh = update.svd()
    k = min(update.rank, *update.delta().shape)
    assert (U.shape, S.shape, Vh.shape) == (
        (update.B.shape[0], k),
        (k,),
        (k, update.A.shape[1]),
    )
    assert_equal(U @ torch.diag(S) @ Vh, update.delta(), size(update))
    assert_equal(U.T @ U, torch.eye(k, dtype=torch.float64))
    assert_equal(Vh @ Vh.T, torch.eye(k, dtype=torch.float64))
    assert (S[:-1] >= S[1:]).all()


@given(updates(), ranks, seeds)
def test_truncation_is_the_best_of_its_rank_and_states_its_error(made, rank, seed):
    (update,) = made
    dense = update.delta()
    kept, error = update.truncate(rank)
    assert kept.rank == min(rank, update.rank, *dense.shape)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    best = U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]
    gap = float((kept.delta() - dense).norm())
    assert gap == pytest.approx(float((best - dense).norm()), rel=1e-6, abs=1e-10 * size(update))
    assert error * update.norm() == pytest.approx(gap, rel=1e-6, abs=1e-10 * size(update))
    assert 0 <= error <= 1
    other = random(rank, *dense.shape, seed=seed)
    fitted = other * (float((other.delta() * dense).sum()) / float(other.delta().square().sum()))
    assert gap <= float((fitted.delta() - dense).norm()) + 1e-10 * size(update)


@given(updates())
def test_balanced_factors_have_equal_gram_matrices_and_the_same_delta_and_rank(made):
    (update,) = made
    balanced = update.balanced()
    assert balanced.rank == update.rank
    assert_equal(balanced.delta(), update.delta(), size(update))
    assert_equal(balanced.B.T @ balanced.B, balanced.A @ balanced.A.T, size(update))
    gram = balanced.A @ balanced.A.T
    assert_equal(gram - torch.diag(gram.diag()), torch.zeros_like(gram), size(update))


@given(ranks, seeds, seeds)
def test_a_regauged_twin_balances_to_the_same_factors(rank, seed, other_seed):
    update = random(rank, 8, 7, seed)
    gauge = orthogonal(rank, other_seed) * 3.0
    twin = LowRank(torch.linalg.inv(gauge) @ update.A, update.B @ gauge)
    S = update.singular_values()
    assume(float((S[:-1] - S[1:]).min() if rank > 1 else S[0]) > 1e-3)  # else no frame is canonical
    torch.testing.assert_close(twin.balanced().A, update.balanced().A, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(twin.balanced().B, update.balanced().B, rtol=1e-6, atol=1e-8)


@given(ranks, seeds, seeds, seeds)
def test_rotation_keeps_delta_and_brings_factors_nearer_than_any_other(rank, seed, other_seed, any_seed):
    update, target = random(rank, 5, 6, seed), random(rank, 5, 6, other_seed)
    turned = update.rotated_to(target)
    assert_equal(turned.delta(), update.delta(), size(update))
    assert_equal(turned.A.norm(), update.A.norm())

    def distance(factors: LowRank) -> float:
        return float((factors.A - target.A).square().sum() + (factors.B - target.B).square().sum())

    R = orthogonal(rank, any_seed)
    assert distance(turned) <= distance(update) + 1e-9
    assert distance(turned) <= distance(LowRank(R.T @ update.A, update.B @ R)) + 1e-9


@given(ranks, seeds, seeds)
def test_rotation_undoes_an_orthogonal_gauge(rank, seed, gauge_seed):
    update, R = random(rank, 6, 7, seed), orthogonal(rank, gauge_seed)
    back = LowRank(R.T @ update.A, update.B @ R).rotated_to(update)
    torch.testing.assert_close(back.A, update.A, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back.B, update.B, rtol=1e-8, atol=1e-8)


@given(updates(count=3), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_combine_is_the_weighted_sum_and_its_ranks_add(made, weights):
    combined = combine(made, weights)
    wanted = sum(w * u.delta() for w, u in zip(weights, made, strict=True))
    assert_equal(combined.delta(), wanted, 3 * size(*made))
    assert combined.rank == sum(update.rank for update in made)


@given(updates(count=2), st.floats(-3, 3))
def test_the_operators_are_those_of_the_dense_matrices(made, factor):
    left, right = made
    bound = 3 * size(left, right)
    assert_equal((left + right).delta(), left.delta() + right.delta(), bound)
    assert_equal((left - right).delta(), left.delta() - right.delta(), bound)
    assert_equal((factor * left).delta(), factor * left.delta(), bound)
    assert_equal((left * factor).delta(), factor * left.delta(), bound)
    assert_equal((-left).delta(), -left.delta(), bound)


@given(ranks, sides, sides, seeds, seeds, st.floats(-1, 2))
def test_averaged_factors_miss_the_average_by_the_cross_term(rank, rows, columns, seed, other_seed, t):
    a, b = random(rank, rows, columns, seed), random(rank, rows, columns, other_seed)
    gap = combine_factors([a, b], [1 - t, t]).delta() - combine([a, b], [1 - t, t]).delta()
    assert_equal(gap, -t * (1 - t) * (b.B - a.B) @ (b.A - a.A), 10 * size(a, b))


# dtypes and shapes


def test_results_keep_float32_and_are_computed_wider():
    update = random(4, 30, 20, seed=0, dtype=torch.float32)
    exact = LowRank(update.A.double(), update.B.double())
    for same in (
        update * 2,
        update + update,
        update.truncate(2)[0],
        update.balanced(),
        update.rotated_to(update),
    ):
        assert same.A.dtype == same.B.dtype == torch.float32
    assert update.norm() == pytest.approx(exact.norm(), rel=1e-14)
    assert update.inner(update) == pytest.approx(exact.inner(exact), rel=1e-14)
    assert update.singular_values().dtype == torch.float64


def test_updates_of_two_precisions_meet_in_the_wider_one():
    narrow, wide = random(2, 5, 4, seed=0, dtype=torch.float32), random(2, 5, 4, seed=1)
    assert combine([narrow, wide], [1, 1]).A.dtype == torch.float64
    assert combine_factors([narrow, wide], [1, 1]).A.dtype == torch.float64
    assert narrow.inner(wide) == pytest.approx(float((narrow.delta() * wide.delta()).sum()), rel=1e-6)
    assert narrow.rotated_to(wide).A.dtype == torch.float32


def test_a_kernel_keeps_its_shape_through_every_transform():
    flat = random(3, 4, 18, seed=0)
    kernel = LowRank(flat.A, flat.B, (4, 2, 3, 3))
    for made in (kernel * 2, -kernel, kernel + kernel, kernel.truncate(2)[0], kernel.balanced()):
        assert made.shape == (4, 2, 3, 3)
        assert made.delta().shape == (4, 2, 3, 3)
    assert kernel.norm() == pytest.approx(flat.norm())
    torch.testing.assert_close(kernel.rotated_to(-kernel).delta(), kernel.delta())


def test_transforms_leave_their_inputs_as_they_were():
    a, b = random(3, 5, 4, seed=0), random(3, 5, 4, seed=1)
    copies = [t.clone() for t in (a.A, a.B, b.A, b.B)]
    _ = (a * 2, a + b, a.truncate(1), a.balanced(), a.rotated_to(b), combine_factors([a, b], [0.5, 0.5]))
    assert all(torch.equal(t, copy) for t, copy in zip((a.A, a.B, b.A, b.B), copies, strict=True))


# errors


@pytest.mark.parametrize(
    ("A", "B", "shape", "text"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), (), r"A \[2, 3\] and B \[4, 5\] are not \[rank, columns\]"),
        (torch.ones(3), torch.ones(4, 1), (), r"A \[3\] and B"),
        (torch.ones(2, 3).half(), torch.ones(4, 2).half(), (), "must share float32 or wider"),
        (torch.ones(2, 3).double(), torch.ones(4, 2), (), "must share float32 or wider"),
        (torch.ones(2, 3).int(), torch.ones(4, 2).int(), (), "must share float32 or wider"),
        (torch.ones(2, 3), torch.ones(4, 2), (4, 2, 2), r"shape \(4, 2, 2\) does not fit"),
        (torch.ones(2, 3), torch.ones(4, 2), (3, 4), r"shape \(3, 4\) does not fit"),
    ],
)
def test_factors_that_are_no_pair_are_refused(A, B, shape, text):
    with pytest.raises(MismatchError, match=text):
        LowRank(A, B, shape)


def test_updates_of_different_shapes_do_not_mix_and_the_error_lists_them():
    a, b = random(2, 5, 4, seed=0), random(2, 5, 3, seed=1)
    for mix in (
        lambda: combine([a, b], [1, 1]),
        lambda: combine_factors([a, b], [1, 1]),
        lambda: a.inner(b),
        lambda: a + b,
        lambda: a.rotated_to(b),
    ):
        with pytest.raises(MismatchError, match=r"different shapes: \(5, 4\), \(5, 3\)"):
            mix()


def test_factors_of_different_ranks_are_not_averaged():
    a, b = random(2, 5, 4, seed=0), random(3, 5, 4, seed=1)
    with pytest.raises(MismatchError, match="ranks 2, 3 cannot be averaged"):
        combine_factors([a, b], [0.5, 0.5])
    with pytest.raises(MismatchError, match="rank 2 and 3 cannot be aligned"):
        a.rotated_to(b)


@pytest.mark.parametrize("mix", [combine, combine_factors])
def test_weights_are_never_zipped_short(mix):
    a = random(2, 5, 4, seed=0)
    with pytest.raises(MismatchError, match="1 updates and 2 weights"):
        mix([a], [1.0, 1.0])
    with pytest.raises(MismatchError, match="no updates"):
        mix([], [])


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(OptionError, match=f"a rank of {rank}"):
        random(2, 3, 4, seed=0).truncate(rank)


def test_finite_is_what_no_order_of_adding_takes_out_of_float32():
    cancels = LowRank(torch.tensor([[1e30], [1e30]]), torch.tensor([[1e30, -1e30]]))
    assert not is_finite(cancels)  # 0 in exact numbers, NaN or infinite where the products are added one by one
    assert is_finite(LowRank(torch.tensor([[1e30], [1e-30]]), torch.tensor([[1e-30, 1e30]])))
    assert not is_finite(LowRank(torch.tensor([[torch.nan]]), torch.ones(1, 1)))
    for entry, finite in ((3e38, True), (-torch.inf, False), (torch.nan, False)):
        assert is_finite(torch.tensor([[0.0, entry]])) is finite


@pytest.mark.parametrize("gone", [0.0, 1e-13, 1e-5, 1.0])
def test_what_vanishes_is_told_by_its_share_of_the_bound_wherever_its_rows_are(gone):
    one = random(3, 40, 30, 0)
    rest = LowRank(one.A[:1], torch.cat([torch.zeros(20, 1), one.B[20:, :1]]).double() * gone)  # first rows are 0
    update = combine([one, one, rest], [1.0, -1.0, 1.0])
    assert update.vanishes(1e-12) == (gone < 1e-6)
    assert update.norm() == pytest.approx(rest.norm(), abs=1e-12 * update.bound())


ONE = LowRank(torch.ones(2, 4), torch.ones(6, 2))
WRONG = {
    "A is 1; a Tensor is needed": lambda: LowRank(1, ONE.B),
    "B is None; a Tensor is needed": lambda: LowRank(ONE.A, None),
    "A is array(": lambda: LowRank(ONE.A.numpy(), ONE.B.numpy()),
    "shape is 'x'; a list (a whole number each) is needed": lambda: LowRank(ONE.A, ONE.B, "x"),
    "the factor is 'x'; a number or a Tensor is needed": lambda: ONE * "x",
    "an update is 3; a LowRank is needed": lambda: ONE + 3,
    "an update is None; a LowRank is needed": lambda: ONE.inner(None),
    "`rank` is 1.5; a whole number is needed": lambda: ONE.truncate(1.5),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_of_another_type_is_told_in_one_line(words):
    with pytest.raises(OptionError, match=f"^{re.escape(words)}"):
        WRONG[words]()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_one_odd_entry_is_found_wherever_it_is(dtype, odd):
    for place in (0, 3, 11):
        tensor = torch.arange(12).reshape(3, 4).to(dtype)
        assert all_finite(tensor)
        tensor.view(-1)[place] = odd
        assert not all_finite(tensor)
    assert all_finite(torch.empty(0, 3, dtype=dtype))


def test_a_shape_may_be_a_list():
    assert LowRank(ONE.A, ONE.B, [6, 2, 2]).shape == (6, 2, 2)
    assert LowRank(ONE.A, ONE.B, ONE.B[:, :1].expand(6, 4).shape).shape == (6, 4)
