"""Merges of factors against their definitions, and what makes them hang on the gauge or not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making_adapters import lora, write
from making_updates import gauged, random_update

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import MismatchError, OptionError
from lora_lab.geometry import procrustes_mean as mean_of
from lora_lab.merging.merged import merge
from lora_lab.merging.rules.factors import procrustes_mean, robustmerge
from lora_lab.merging.sources import Sources

F64 = torch.float64
FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 2**16)


def several(seed, ranks=(3, 3, 3)):
    return [random_update(100 * seed + i, rows=9, columns=7, rank=rank) for i, rank in enumerate(ranks)]


def close(found, wanted, tolerance=1e-8):
    found, wanted = (x.delta() if isinstance(x, LowRank) else x for x in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.norm()))


def robustmerge_by_hand(updates, weights, density, quantile):
    """Entry by entry, as the definition says it."""

    def trimmed(X):
        sizes = sorted((abs(float(x)) for x in X.flatten()), reverse=True)
        least = sizes[max(1, round(density * len(sizes))) - 1]
        return torch.where(X.abs() >= least, X, 0.0)

    A = 2 * sum(trimmed(u.A) for u in updates)
    rank = updates[0].rank
    B, total = torch.zeros_like(updates[0].B), torch.zeros(rank, dtype=F64)
    for update, weight in zip(updates, weights, strict=True):
        A_kept, B_kept = trimmed(update.A), trimmed(update.B)
        c = torch.stack([update.A[k].abs().sum() / A_kept[k].abs().sum() for k in range(rank)])
        c = torch.maximum(c, torch.quantile(c, quantile))
        for k in range(rank):
            B[:, k] += 2 * c[k] * weight * B_kept[:, k]
        total += c
    return (B / total) @ A


@FEW
@given(SEEDS, st.sampled_from([0.7, 0.85, 1.0]), st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_robustmerge_is_its_definition(seed, density, quantile):
    updates, weights = several(seed), [1.0, -0.5, 2.0]
    found = robustmerge(updates, weights, density=density, quantile=quantile, scale=1.5)
    close(found, 1.5 * robustmerge_by_hand(updates, weights, density, quantile))
    assert found.rank == 3


def test_robustmerge_whole_is_four_times_one_adapter_and_the_product_of_the_means_of_several():
    one, two, _ = several(1)
    close(robustmerge([one], [1.0], density=1.0), 4 * one.delta())
    # c = 1 everywhere: 2 (A₁ + A₂) and 2 (B₁ + B₂) / 2
    close(robustmerge([one, two], [1.0, 1.0], density=1.0), (one.B + two.B) @ (2 * (one.A + two.A)))


def test_a_row_of_which_nothing_is_left_has_the_quantile_of_the_others():
    A = torch.tensor([[4.0, 3.0], [0.1, 0.2]], dtype=F64)
    update = LowRank(A, torch.eye(2, dtype=F64))
    # the two largest of four entries of A stay, both of row 0, and c = (1, –) → (1, 1)
    found = robustmerge([update], [1.0], density=0.5)
    close(found, 4 * torch.tensor([[4.0, 3.0], [0.0, 0.0]], dtype=F64))


@FEW
@given(SEEDS)
def test_aligned_robustmerge_knows_no_gauge_and_takes_several_ranks(seed):
    updates, weights = several(seed, (3, 2, 3)), [1.0, 1.0, 0.5]
    found = robustmerge(updates, weights, factors="aligned")
    close(robustmerge([gauged(u, i) for i, u in enumerate(updates)], weights, factors="aligned"), found, 1e-5)
    with pytest.raises(MismatchError, match=r"factors of ranks .* cannot be averaged; aligned ones can"):
        robustmerge(updates, weights)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"density": 0.0}, "density is 0"),
        ({"quantile": 1.5}, "quantile is 1.5; a share from 0 to 1 is needed"),
        ({"factors": "alined"}, "did you mean 'aligned'"),
    ],
)
def test_robustmerge_says_what_cannot_be(options, text):
    with pytest.raises(OptionError, match=text):
        robustmerge(several(0), [1.0, 1.0, 1.0], **options)


@FEW
@given(SEEDS)
def test_procrustes_mean_is_the_mean_of_turned_factors_at_the_rank_of_the_sources(seed):
    updates, weights = several(seed, (3, 2, 3)), [1.0, 2.0, 0.5]
    found = procrustes_mean(updates, weights, scale=-2.0)
    assert found.rank == 3
    close(found, -2 * mean_of(updates, weights).mean.delta())
    matched = procrustes_mean(updates, weights, match_norm=True)
    norms = [w / 3.5 * u.norm() for u, w in zip(updates, weights, strict=True)]
    assert matched.norm() == pytest.approx(sum(norms))
    close(matched.delta() / matched.norm(), found.delta() / -found.norm())


def test_the_procrustes_mean_of_one_delta_in_many_gauges_is_that_delta_and_of_unrelated_ones_far_less():
    one = random_update(3)
    close(procrustes_mean([one, gauged(one, 1), gauged(one, 2)], [1.0, 3.0, 1.0]), one)
    others = [random_update(i, rows=200, columns=200) for i in range(3)]
    share = procrustes_mean(others, [1.0, 1.0, 1.0]).norm() / others[0].norm()
    assert 0.35 < share < 0.6
    with pytest.raises(OptionError, match="a mean needs weights of 0 or more"):
        procrustes_mean(others, [1.0, -1.0, 1.0])


def test_robustmerge_means_the_same_by_a_where_weights_are_stored_as_inputs_by_outputs(tmp_path):
    found = []
    for turned in (False, True):
        adapters = []
        for seed in (0, 1):
            tensors = lora("net.q_proj", rank=3, rows=6, columns=5, seed=seed)
            path = write(tmp_path / f"{seed}-{turned}", tensors, r=3, lora_alpha=6, fan_in_fan_out=turned)
            adapters.append(Adapter.load(path))
        merged = merge(Sources(adapters), "robustmerge", options={"density": 0.5}).adapter
        found.append(merged.updates["net.q_proj"].delta())
    torch.testing.assert_close(found[1], found[0].T)
