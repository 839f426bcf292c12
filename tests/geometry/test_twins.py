"""Copies are named, and independent adapters are not: re-gauged, rounded, padded, cut, scaled ones."""

import dataclasses
import math

import pytest
import torch
from making_adapters import lora, write
from making_updates import gauged

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank
from lora_lab.analysis.comparing import Compare
from lora_lab.geometry.comparing import SIMILAR

NAMES = [f"layers.{i}.q_proj" for i in range(4)]


def adapter(folder, seed, rank=8):
    tensors = {}
    for i, name in enumerate(NAMES):
        tensors |= lora(name, rank=rank, rows=96, columns=64, seed=100 * seed + i)
    return Adapter.load(write(folder / f"s{seed}", tensors, r=rank, lora_alpha=rank))


@pytest.fixture
def one(tmp_path):
    return adapter(tmp_path, 0)


def rounded(one, dtype):
    tensors = {key: tensor.to(dtype).to(torch.float32) for key, tensor in one.tensors.items()}
    return dataclasses.replace(one, tensors=tensors, source=f"rounded {dtype}")


def changed(one, change):
    return one.with_updates({name: change(update) for name, update in one.updates.items()}, source="changed")


def twins(*adapters, **options):
    return Compare(levels=(), **options).run(adapters).summary["twins"]


def wide(update):
    return LowRank(update.A.double(), update.B.double())


def in_float32(update):
    return LowRank(update.A.float(), update.B.float())


@pytest.mark.parametrize(
    "change",
    [
        lambda u: in_float32(gauged(wide(u), 5)),
        lambda u: LowRank(u.A.flip(0) * 2**20, u.B.flip(1) / 2**20),
        lambda u: LowRank(torch.cat([u.A, torch.zeros(3, 64)]), torch.cat([u.B, torch.ones(96, 3)], 1)),
        lambda u: u.balanced(),
        lambda u: in_float32(wide(u).truncate(8)[0]),
    ],
)
def test_copies_in_another_gauge_or_of_a_larger_rank_are_the_same(one, change):
    (row,) = twins(one, changed(one, change))
    assert row["equal"]
    assert row["difference"] < 1e-6
    assert row["norm_ratio"] == pytest.approx(1)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float8_e4m3fn, 4)])
def test_copies_that_were_rounded_are_near_duplicates_by_what_rounding_does(one, dtype, bits):
    """Uniform errors of up to 2⁻ᵇ, by mantissas m from 1 to 2: δ = 2⁻ᵇ / √3 · √∫m⁻² dm ≈ 2⁻ᵇ / 2.4."""
    (row,) = twins(one, rounded(one, dtype))
    delta = 2.0**-bits / math.sqrt(3) * math.sqrt(0.5)
    assert not row["equal"]
    assert row["difference"] == pytest.approx(math.sqrt(2) * delta, rel=0.25)
    assert row["cosine"] == pytest.approx(1 - delta**2, abs=0.5 * delta**2)


@pytest.mark.parametrize(("share", "named"), [(0.9985, True), (0.9975, False)])
def test_copies_that_were_cut_are_near_duplicates_down_to_the_energy_that_the_threshold_means(one, share, named):
    def cut(update):
        U, S, Vh = update.svd()
        S[:-1] *= math.sqrt(share / float(S[:-1].square().sum()))
        S[-1] = math.sqrt(1 - share)
        return LowRank(S[:, None] * Vh, U)

    whole = changed(one, lambda u: in_float32(cut(u)))
    less = changed(whole, lambda u: u.truncate(7)[0])
    found = twins(whole, less)
    assert bool(found) is named is (math.sqrt(share) > SIMILAR)
    if named:
        assert found[0]["cosine"] == pytest.approx(math.sqrt(share), abs=1e-6)


def test_scaled_copies_are_named_with_their_ratio(one):
    (row,) = twins(one, changed(one, lambda u: u * 0.8))
    assert not row["equal"]
    assert (row["cosine"], row["norm_ratio"], row["difference"]) == pytest.approx((1, 1.25, 0.2))
    assert not twins(one, changed(one, lambda u: -u))


def test_independent_adapters_are_far_from_the_threshold(tmp_path):
    """Cosines of 190 pairs; of entries that are sums over 8 ranks, 4 · 8 · (96 + 64) degrees of freedom."""
    made = [adapter(tmp_path, seed) for seed in range(20)]
    result = Compare(levels=()).run(made)
    assert not result.summary["twins"]
    assert max(abs(row["cosine"]) for row in result.rows()) < 10 / math.sqrt(4 * 8 * (96 + 64))


def test_few_digits_of_a_hash_make_no_twins(one):
    """At one digit, hashes of different ΔW may be the same; whether they are equal is measured."""
    nearly = changed(one, lambda u: u * (1 + 1e-5))
    (row,) = twins(one, nearly, digits=1)
    assert not row["equal"]
    assert row["difference"] == pytest.approx(1e-5, rel=0.02)
