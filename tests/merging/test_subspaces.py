"""Merges in shared bases against their definitions on dense ΔW, written here once more with torch.linalg.svd."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import OptionError
from lora_lab.merging.kinds import keywords
from lora_lab.merging.methods import rule_of, rules
from lora_lab.merging.rules import subspaces

RULES = rules()


def inside(subspace):
    """A merge by an inner rule in the bases of a subspace."""

    def merge(updates, weights, inner="ties", **options):
        bases = {name: options.pop(name) for name in keywords(subspace) if name in options}
        shared = subspace(updates, **bases)
        return shared.back(rule_of(inner)(shared.cores, weights, **options))

    return merge


knots, core_space = inside(subspaces.knots), inside(subspaces.core_space)

F64 = torch.float64
FEW = settings(max_examples=20)
SEEDS = st.integers(0, 2**16)
RANKS = st.lists(st.integers(1, 4), min_size=1, max_size=4)
METHODS = {
    "knots": knots,
    "core-space": core_space,
    "tsv": subspaces.tsv,
    "iso-c": subspaces.iso_c,
    "iso-cts": subspaces.iso_cts,
    "lego": subspaces.lego,
}
GAUGE_FREE = [name for name in METHODS if name != "lego"]


def random(ranks: list[int], seed: int, rows: int = 9, columns: int = 7) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    return [LowRank(draw(rank, columns), draw(rows, rank)) for rank in ranks]


def weights_of(count: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed + 1)
    return (0.2 + torch.rand(count, generator=generator, dtype=F64)).tolist()


def regauged(update: LowRank, seed: int) -> LowRank:
    """The same ΔW as B R, R⁻¹ A with R of singular values between 1/2 and 2."""
    generator = torch.Generator().manual_seed(seed)
    P, Q = (torch.linalg.qr(torch.randn(update.rank, update.rank, generator=generator, dtype=F64)).Q for _ in "PQ")
    size = 2 ** (2 * torch.rand(update.rank, generator=generator, dtype=F64) - 1)
    return LowRank((Q / size) @ (P.T @ update.A), update.B @ (P * size) @ Q.T, update.shape)


def diagonal(*values: float, rows: Tensor | None = None, columns: Tensor | None = None) -> LowRank:
    """ΔW = P diag(values) Q of rank len(values), P and Q the first columns and rows of orthogonal matrices."""
    n = max(4, len(values))
    P = torch.eye(n, dtype=F64) if rows is None else rows
    Q = torch.eye(n, dtype=F64) if columns is None else columns
    S = torch.tensor(values, dtype=F64)
    return LowRank(S[:, None] * Q[: len(S)], P[:, : len(S)].clone())


def orthogonal(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64)).Q


def empty(rows: int = 9, columns: int = 7) -> LowRank:
    return LowRank(torch.zeros(0, columns, dtype=F64), torch.zeros(rows, 0, dtype=F64))


def assert_close(got: LowRank | Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    dense = got.delta() if isinstance(got, LowRank) else got
    torch.testing.assert_close(dense, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.norm())))


# the definitions


def triplets(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    real = 1e-9 * max(float(S.max()) if len(S) else 0.0, 1e-300) < S
    return U[:, real], S[real], Vh[real]


def signed_columns(X: Tensor) -> Tensor:
    """Left singular vectors, the largest entry of each positive."""
    U = triplets(X)[0]
    return torch.stack([u * u[u.abs().argmax()].sign() for u in U.T], dim=1)


def polar(X: Tensor) -> Tensor:
    U, _, Vh = triplets(X)
    return U @ Vh


def dense_knots(deltas, weights, inner, **options):
    U = signed_columns(torch.cat(deltas, dim=1))
    return U @ RULES[inner]([U.T @ delta for delta in deltas], weights, **options)


def dense_core_space_of_factors(updates, weights, inner):
    U, V = signed_columns(torch.cat([u.B for u in updates], dim=1)), signed_columns(torch.cat([u.A for u in updates]).T)
    return U @ RULES[inner]([U.T @ u.delta() @ V for u in updates], weights) @ V.T


def dense_core_space(deltas, weights, inner, **options):
    U, V = signed_columns(torch.cat(deltas, dim=1)), signed_columns(torch.cat(deltas).T)
    return U @ RULES[inner]([U.T @ delta @ V for delta in deltas], weights, **options) @ V.T


def dense_tsv(deltas, weights, share=None):
    parts = []
    for delta, weight in zip(deltas, weights, strict=True):
        U, S, Vh = triplets(delta)
        k = max(1, min(delta.shape) // len(deltas)) if share is None else math.ceil(share * len(S) - 1e-9)
        parts.append((U[:, :k], weight * S[:k], Vh[:k].T))
    U, S, V = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return polar(U) @ torch.diag(S) @ polar(V).T


def dense_iso_c(deltas, weights):
    U, S, Vh = triplets(sum(w * d for w, d in zip(weights, deltas, strict=True)))
    return S.mean() * U @ Vh


def dense_iso_cts(deltas, weights, common=0.8):
    U, S, Vh = triplets(sum(w * d for w, d in zip(weights, deltas, strict=True)))
    own = min(round((len(S) - int(common * len(S))) / len(deltas)), len(S) // len(deltas))
    kept = len(S) - own * len(deltas)
    P = torch.eye(len(U), dtype=F64) - U[:, :kept] @ U[:, :kept].T
    rest = [triplets(P @ (w * d)) for w, d in zip(weights, deltas, strict=True)]
    U = torch.cat([U[:, :kept], *(u[:, :own] for u, _, _ in rest)], dim=1)
    V = torch.cat([Vh[:kept].T, *(vh[:own].T for _, _, vh in rest)], dim=1)
    S = torch.cat([S[:kept], *(s[:own] for _, s, _ in rest)])
    return S.mean() * polar(U) @ polar(V).T


DENSE = {"tsv": dense_tsv, "iso-c": dense_iso_c, "iso-cts": dense_iso_cts}


@pytest.mark.parametrize("inner", RULES)
@FEW
@given(ranks=RANKS, seed=SEEDS)
def test_knots_merges_what_lies_behind_the_joint_left_singular_vectors(inner, ranks, seed):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    wanted = dense_knots([u.delta() for u in updates], weights, inner)
    assert_close(knots(updates, weights, inner=inner), wanted)


@pytest.mark.parametrize("inner", RULES)
@FEW
@given(ranks=RANKS, seed=SEEDS)
def test_core_space_merges_what_lies_between_the_joint_singular_vectors(inner, ranks, seed):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    wanted = dense_core_space([u.delta() for u in updates], weights, inner)
    assert_close(core_space(updates, weights, inner=inner), wanted)


@pytest.mark.parametrize("inner", RULES)
@FEW
@given(ranks=RANKS, seed=SEEDS)
def test_core_space_of_the_factors_own_bases_is_the_papers(inner, ranks, seed):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    wanted = dense_core_space_of_factors(updates, weights, inner)
    assert_close(core_space(updates, weights, inner=inner, bases="factors"), wanted)


@pytest.mark.parametrize("bases", ["delta", "factors"])
@pytest.mark.parametrize("method", ["knots", "core-space"])
def test_a_direction_of_a_five_thousandth_in_float32_is_kept(method, bases):
    """Of sizes 1 and 2e-4, which float32 tells apart by 1,600 roundings."""
    Q = orthogonal(8, 0).float()
    update = LowRank(Q[:2], Q[:, 4:6] * torch.tensor([1.0, 2e-4]))
    options = {"bases": bases} if method == "core-space" else {}
    merged = METHODS[method]([update, update], [1.0, 1.0], inner="task-arithmetic", **options).delta()
    small = float(update.B[:, 1].double() @ merged @ update.A[1].double()) / 2e-4
    assert small == pytest.approx(4e-4, rel=1e-3)


@pytest.mark.parametrize("name", DENSE)
@given(ranks=RANKS, seed=SEEDS)
def test_a_merge_of_singular_directions_is_its_dense_definition(name, ranks, seed):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    assert_close(METHODS[name](updates, weights), DENSE[name]([u.delta() for u in updates], weights))


@given(RANKS, SEEDS, st.floats(0.05, 1))
def test_tsv_keeps_any_share_of_the_triplets(ranks, seed, share):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    wanted = dense_tsv([u.delta() for u in updates], weights, share)
    assert_close(subspaces.tsv(updates, weights, share=share), wanted)


@given(RANKS, SEEDS, st.floats(0, 1))
def test_iso_cts_deals_out_any_share_of_directions(ranks, seed, common):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    wanted = dense_iso_cts([u.delta() for u in updates], weights, common)
    assert_close(subspaces.iso_cts(updates, weights, common=common), wanted)


@pytest.mark.parametrize("method", ["knots", "core-space"])
@pytest.mark.parametrize("inner", ["task-arithmetic", "average", "slerp"])
@FEW
@given(ranks=RANKS, seed=SEEDS)
def test_a_sum_in_a_shared_basis_is_the_sum_itself(method, inner, ranks, seed):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    wanted = RULES[inner]([u.delta() for u in updates], weights, scale=0.7)
    assert_close(METHODS[method](updates, weights, inner=inner, scale=0.7), wanted)


@given(RANKS, SEEDS)
def test_the_bases_of_knots_and_core_space_lose_nothing(ranks, seed):
    for update in random(ranks, seed):
        for method in ("knots", "core-space"):
            assert_close(METHODS[method]([update], [1.0], inner="ties", density=1.0), update.delta())


def test_trimming_in_the_core_is_not_trimming_of_delta():
    updates = random([2, 2], 0)
    plain = RULES["ties"]([u.delta() for u in updates], [1.0, 1.0])
    knots, core = (METHODS[m](updates, [1.0, 1.0]).delta() for m in ("knots", "core-space"))
    assert min(float((a - b).norm()) for a, b in ((plain, knots), (plain, core), (knots, core))) > 0.1


# by hand


def test_tsv_of_disjoint_diagonals_keeps_what_has_room_or_the_leading_share_of_each():
    a, b = diagonal(4, 3), diagonal(0, 0, 2, 1)
    wanted = torch.diag(torch.tensor([4, 0, 2, 0], dtype=F64))
    half = {"share": 0.5}
    assert_close(subspaces.tsv([a, b], [1.0, 1.0], **half), wanted)
    assert_close(
        subspaces.tsv([a, b], [2.0, -0.5], scale=3.0, **half), torch.diag(torch.tensor([24, 0, -3, 0.0]).double())
    )
    assert_close(subspaces.tsv([a, b], [1.0, 1.0]), torch.diag(torch.tensor([4, 3, 2, 1], dtype=F64)))
    full = diagonal(4, 3, 2, 1)  # with two of them, each has room for two
    assert_close(subspaces.tsv([full, full], [1.0, 1.0]), torch.diag(torch.tensor([4, 3, 0, 0], dtype=F64)))


def test_tsv_has_room_for_a_whole_number_of_triplets_of_each():
    """Of three diagonals of eight, each keeps two: 8 / 3 rounded down; of nine of four, each keeps its largest."""
    places = [range(3), range(3, 6), range(5, 8)]
    parts = [torch.zeros(8, dtype=F64) for _ in places]
    for part, place in zip(parts, places, strict=True):
        part[list(place)] = torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    merged = subspaces.tsv([diagonal(*part.tolist()) for part in parts], [1.0] * 3).delta()
    assert_close(merged[:5, :5], torch.diag(torch.tensor([3, 2, 0, 3, 2], dtype=F64)))
    several = subspaces.tsv([diagonal(2, 1, 0, 0)] + [diagonal(0, 0, 0, 0)] * 8, [1.0] * 9)
    assert_close(several, torch.diag(torch.tensor([2, 0, 0, 0], dtype=F64)))


def test_tsv_turns_directions_that_overlap_apart():
    s = 1 / math.sqrt(2)
    first = LowRank(torch.eye(1, 4, dtype=F64), torch.eye(4, 1, dtype=F64))  # e1 e1ᵀ
    second = LowRank(torch.tensor([[0.0, 0, 1, 0]], dtype=F64), torch.tensor([[s], [s], [0], [0]], dtype=F64))
    merged = subspaces.tsv([first, second], [1.0, 1.0], share=1.0).delta()
    # the two columns at 45° of each other turn by half of what lacks to 90°, each away from the other
    half = math.pi / 8
    wanted = torch.zeros(4, 4, dtype=F64)
    wanted[:2, 0] = torch.tensor([math.cos(half), -math.sin(half)], dtype=F64)
    wanted[:2, 2] = torch.tensor([math.sin(half), math.cos(half)], dtype=F64)
    assert_close(merged, wanted)


def test_iso_c_gives_all_singular_values_of_the_sum_their_mean():
    P, Q = orthogonal(4, 0), orthogonal(4, 1)
    a, b = diagonal(4, 0, 2, rows=P, columns=Q), diagonal(0, 3, rows=P, columns=Q)
    merged = subspaces.iso_c([a, b], [1.0, 1.0])
    assert merged.rank == 3
    assert_close(merged, P[:, :3] @ (3 * torch.eye(3, dtype=F64)) @ Q[:3])
    assert_close(subspaces.iso_c([a, b], [0.0, 2.0], scale=0.5), 3 * P[:, 1:2] @ Q[1:2])


@given(RANKS, SEEDS)
def test_iso_c_raises_nothing_beyond_the_rank_of_the_sum(ranks, seed):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    twins = [regauged(u, seed + 1) for u in updates]
    merged = subspaces.iso_c([*updates, *twins], [*weights, *weights])
    summed = sum(w * u.delta() for w, u in zip(weights, updates, strict=True))
    S = torch.linalg.svdvals(summed)
    k = min(sum(ranks), 7)
    got = torch.linalg.svdvals(merged.delta())
    torch.testing.assert_close(got[:k], torch.full((k,), 2 * float(S[:k].mean()), dtype=F64), rtol=1e-8, atol=0)
    assert float(got[k:].sum()) < 1e-8 * float(got[0])


def test_iso_cts_keeps_common_directions_and_gives_each_one_of_its_own():
    a, b = diagonal(4, 2, 0, 0), diagonal(3, 0, 0, 1)
    # the sum has 7, 2, 1; of three directions int(.4 · 3) = 1 is common, and one for each is its own: 2 and 1
    merged = subspaces.iso_cts([a, b], [1.0, 1.0], common=0.4)
    assert_close(merged, torch.diag(torch.tensor([10 / 3, 10 / 3, 0, 10 / 3], dtype=F64)))
    assert_close(subspaces.iso_cts([a, b], [1.0, 1.0], common=1.0), subspaces.iso_c([a, b], [1.0, 1.0]).delta())


def test_iso_cts_adds_no_direction_of_noise_where_an_adapter_has_nothing_of_its_own():
    P, Q = orthogonal(8, 0), orthogonal(8, 1)
    a, b = diagonal(4, 3, 2, rows=P, columns=Q), diagonal(5, rows=P, columns=Q)
    merged = subspaces.iso_cts([a, b], [1.0, 1.0], common=0.5).delta()
    inside = P[:, :3] @ P[:, :3].T @ merged
    assert_close(merged, inside)


# LoRA-LEGO


def test_lego_of_one_adapter_at_its_rank_is_that_adapter():
    (update,) = random([3], 0)
    assert_close(subspaces.lego([update], [1.0]), update.delta())


@pytest.mark.parametrize("count", [2, 3])
def test_lego_of_equal_adapters_is_that_adapter(count):
    (update,) = random([3], 0)
    assert_close(subspaces.lego([update] * count, [1.0] * count), update.delta())


@pytest.mark.parametrize("count", [2, 3])
def test_lego_of_equal_adapters_with_idle_or_equal_units_is_that_adapter(count):
    (update,) = random([4], 3)
    update.B[:, 1] = 0
    assert_close(subspaces.lego([update] * count, [1.0] * count), update.delta())
    update.A[2], update.B[:, 2] = update.A[0], update.B[:, 0]
    assert_close(subspaces.lego([update] * count, [1.0] * count), update.delta())


def test_a_centroid_of_lego_has_the_mean_norm_of_its_members_by_hand():
    """[a, b] of norms 1 and 3 at a right angle: their mean points to (1, 3), and its norm is 2."""
    one = LowRank(torch.tensor([[1.0, 0]], dtype=F64), torch.tensor([[0.5], [0]], dtype=F64))
    three = LowRank(torch.tensor([[0.0, 1]], dtype=F64), torch.tensor([[0], [4.5]], dtype=F64))
    merged = subspaces.lego([one, three], [1.0, 1.0], clusters=1)
    assert_close(merged, 0.2 * torch.tensor([[1, 3], [3, 9]], dtype=F64))


def test_lego_moves_all_units_into_one_by_hand():
    identity = LowRank(torch.eye(2, dtype=F64), torch.eye(2, dtype=F64))
    # units (e1, e1) and (e2, e2) of norm √2; their middle, at that norm, is (½√2 (1, 1), ½√2 (1, 1)); r/K = 2
    wanted = math.sqrt(2) * torch.full((2, 2), 0.5, dtype=F64)
    assert_close(subspaces.lego([identity], [1.0], clusters=1), wanted)
    assert_close(subspaces.lego([identity], [1.0], clusters=1, scale=3.0), 3 * wanted)


def test_lego_keeps_as_many_units_as_it_is_told_and_by_default_the_largest_rank():
    updates = random([2, 4, 3], 0)
    assert subspaces.lego(updates, [1.0] * 3).rank == 4
    assert [subspaces.lego(updates, [1.0] * 3, clusters=k).rank for k in (1, 6, 9, 50)] == [1, 6, 9, 9]


def test_lego_with_a_cluster_for_every_unit_is_the_sum_at_less_scale():
    updates = random([2, 3], 0)
    wanted = math.sqrt(3 / 5) * sum(u.delta() for u in updates)
    assert_close(subspaces.lego(updates, [1.0, 1.0], clusters=5), wanted)


def test_lego_knows_a_unit_whatever_its_sign_its_place_and_the_balance_of_its_halves():
    a, b = random([3, 3], 0)
    size = torch.tensor([2.0, -0.5, -3.0], dtype=F64)
    turned = LowRank((a.A / size[:, None])[[2, 0, 1]], (a.B * size)[:, [2, 0, 1]])
    wanted = subspaces.lego([a, b], [1.0, 1.0])
    assert_close(subspaces.lego([turned, b], [1.0, 1.0]), wanted.delta(), 1e-9)


def test_lego_depends_on_the_gauge_as_it_says():
    a, b = random([3, 3], 0)
    wanted = subspaces.lego([a, b], [1.0, 1.0]).delta()
    assert float((subspaces.lego([regauged(a, 5), b], [1.0, 1.0]).delta() - wanted).norm()) > 0.1


def test_equal_seeds_give_equal_units():
    updates = random([4, 4, 4], 0)
    found = [subspaces.lego(updates, [1.0] * 3, clusters=3, seed=7) for _ in range(2)]
    assert torch.equal(found[0].A, found[1].A)
    assert torch.equal(found[0].B, found[1].B)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_lego_with_more_clusters_than_different_units_is_finite():
    (update,) = random([2], 0)
    merged = subspaces.lego([update, update], [1.0, 1.0], clusters=3)
    assert bool(merged.delta().isfinite().all())


# what all have in common


@pytest.mark.parametrize("name", GAUGE_FREE)
@FEW
@given(ranks=RANKS, seed=SEEDS)
def test_nothing_hangs_on_the_gauge(name, ranks, seed):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    wanted = METHODS[name](updates, weights).delta()
    turned = [regauged(update, seed + i) for i, update in enumerate(updates)]
    assert_close(METHODS[name](turned, weights), wanted, 1e-8)


@pytest.mark.parametrize("name", GAUGE_FREE)
@FEW
@given(ranks=RANKS, seed=SEEDS)
def test_the_order_of_the_adapters_does_not_matter(name, ranks, seed):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    wanted = METHODS[name](updates, weights).delta()
    assert_close(METHODS[name](updates[::-1], weights[::-1]), wanted, 1e-8)


@pytest.mark.parametrize("name", ["core-space", "tsv", "iso-c"])
@FEW
@given(ranks=RANKS, seed=SEEDS)
def test_rows_and_columns_are_treated_alike_but_by_knots_and_iso_cts(name, ranks, seed):
    updates, weights = random(ranks, seed), weights_of(len(ranks), seed)
    turned = [LowRank(u.B.T, u.A.T) for u in updates]
    assert_close(METHODS[name](turned, weights), METHODS[name](updates, weights).delta().T, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", METHODS)
def test_a_kernel_keeps_its_shape_and_inputs_stay_as_they_were(name, dtype):
    updates = [LowRank(u.A.to(dtype), u.B.to(dtype), (9, 1, 7)) for u in random([2, 3], 0)]
    before = [(u.A.clone(), u.B.clone()) for u in updates]
    merged = METHODS[name](updates, [1.0, 0.5])
    assert merged.shape == (9, 1, 7)
    for update, (A, B) in zip(updates, before, strict=True):
        assert torch.equal(update.A, A)
        assert torch.equal(update.B, B)


def test_float32_factors_are_merged_in_float64():
    updates = random([2, 3], 0)
    narrow = [LowRank(u.A.float(), u.B.float()) for u in updates]
    wide = [LowRank(u.A.double(), u.B.double()) for u in narrow]
    for name, method in METHODS.items():
        assert_close(method(narrow, [1.0, 0.5]).delta().double(), method(wide, [1.0, 0.5]).delta(), 1e-6)
        assert method(narrow, [1.0, 0.5]).A.dtype == F64, name


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_without_directions_changes_nothing_but_the_count(name):
    updates = random([2, 3], 0)
    zero = LowRank(torch.zeros(2, 7, dtype=F64), torch.zeros(9, 2, dtype=F64))
    share = {"share": 0.5} if name == "tsv" else {"common": 1.0} if name == "iso-cts" else {}
    if name in ("knots", "core-space"):
        share = {"inner": "task-arithmetic"}
    wanted = METHODS[name](updates, [1.0, 0.5], **share).delta()
    for nothing in (empty(), zero):
        assert_close(METHODS[name]([*updates, nothing], [1.0, 0.5, 2.0], **share), wanted, 1e-9)
        assert_close(METHODS[name]([nothing, *updates], [2.0, 1.0, 0.5], **share), wanted, 1e-9)


@pytest.mark.parametrize("inner", RULES)
@pytest.mark.parametrize("name", METHODS)
def test_of_nothing_comes_nothing(name, inner):
    options = {"inner": inner} if name in ("knots", "core-space") else {}
    zero = LowRank(torch.zeros(2, 7, dtype=F64), torch.zeros(9, 2, dtype=F64))
    for updates in ([zero, zero], [empty(), empty()], [empty(), zero], [zero]):
        merged = METHODS[name](updates, [1.0] * len(updates), **options)
        assert merged.shape == (9, 7)
        assert torch.equal(merged.delta(), torch.zeros(9, 7, dtype=F64))


@pytest.mark.parametrize("name", GAUGE_FREE)
def test_the_same_adapter_twice_has_no_direction_twice(name):
    (update,) = random([3], 0)
    options = {"knots": {"density": 1.0}, "core-space": {"density": 1.0}, "tsv": {"share": 1.0}}.get(name, {})
    once = METHODS[name]([update], [1.0], **options).delta()
    factor = 2.0 if name.startswith("iso") else 1.0
    merged = METHODS[name]([update, regauged(update, 3)], [1.0, 1.0], **options)
    assert int((merged.singular_values() > 1e-9).sum()) == 3
    if name != "iso-cts":  # which gives each of the two a place of the same direction
        assert_close(merged, factor * once, 1e-9)


@given(SEEDS)
def test_a_tall_stack_of_more_directions_than_rows_is_merged_too(seed):
    updates = random([4, 4, 4], seed, rows=5, columns=6)
    deltas, weights = [u.delta() for u in updates], [1.0, 0.5, 2.0]
    assert_close(knots(updates, weights), dense_knots(deltas, weights, "ties"))
    assert_close(core_space(updates, weights), dense_core_space(deltas, weights, "ties"))
    for name in DENSE:
        assert_close(METHODS[name](updates, weights), DENSE[name](deltas, weights))


# what is refused


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda u: subspaces.tsv(u, [1, 1], share=0.0), "share is 0; a share of the triplets above 0 and up to 1"),
        (lambda u: subspaces.tsv(u, [1, 1], share=1.5), r"share is 1\.5"),
        (lambda u: subspaces.tsv(u, [1, 1], share=math.nan), "share is nan"),
        (lambda u: subspaces.iso_cts(u, [1, 1], common=-0.1), "common is -0.1; a share from 0 to 1"),
        (lambda u: subspaces.iso_cts(u, [1, 1], common=math.nan), "common is nan"),
        (lambda u: subspaces.lego(u, [1, 1], clusters=0), "clusters is 0; a whole number"),
        (lambda u: knots(u, [1, 1], inner="tise"), r"unknown inner rule 'tise' \(did you mean 'ties'\?\)"),
        (lambda u: core_space(u, [1, 1], inner="dar"), r"did you mean 'dare'\?"),
        (lambda u: knots(u, [1, 1], density=0.0), "density is 0"),
    ],
)
def test_options_that_cannot_be_are_refused(call, text):
    with pytest.raises(OptionError, match=text):
        call(random([2, 2], 0))


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_never_zipped_short(name):
    with pytest.raises((ValueError, RuntimeError)):
        METHODS[name](random([2, 2], 0), [1.0, 1.0, 1.0])


@pytest.mark.parametrize("name", ["tsv", "iso-c", "iso-cts", "lego"])
def test_all_options_are_named(name):
    kinds = [p.kind for p in inspect.signature(METHODS[name]).parameters.values()]
    assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert inspect.Parameter.POSITIONAL_OR_KEYWORD not in kinds[2:]


def test_noise_beside_an_equal_twin_is_no_direction_to_tsv_or_iso_cts():
    generator = torch.Generator().manual_seed(0)
    a = LowRank(torch.randn(3, 20, generator=generator), torch.randn(24, 3, generator=generator))
    R = torch.eye(3) + 0.3 * torch.randn(3, 3, generator=generator)
    twin = LowRank(torch.linalg.solve(R, a.A), a.B @ R)
    for method, options in ((subspaces.tsv, {}), (subspaces.iso_cts, {"common": 0.5}), (subspaces.iso_c, {})):
        same, turned = method([a, a], [1.0, 1.0], **options), method([a, twin], [1.0, 1.0], **options)
        assert float((turned - same).norm() / same.norm()) < 1e-4


@pytest.mark.parametrize(("ranks", "common"), [((1, 2), 0.3), ((1, 1, 1, 3), 0.0)])
def test_iso_cts_never_deals_out_more_directions_than_there_are(ranks, common):
    S = subspaces.iso_cts(random(ranks, 0), [1.0] * len(ranks), common=common).singular_values()
    real = S[S.max() * 1e-9 < S]
    assert torch.allclose(real, real[0].expand_as(real))
