"""What every null keeps of an adapter, and that it keeps nothing else."""

import math

import numpy as np
import pytest
import torch
from making_adapters import lora, write
from making_updates import random_update
from tiny_models import adapter as in_memory

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import MismatchError, TunerError
from lora_lab.geometry.canonical import Canonical
from lora_lab.geometry.nulls import NULLS, haar, null_adapter, require_null
from lora_lab.geometry.pairs import module_pair

LAYERS = 5
RANDOM = [name for name, null in NULLS.items() if null.random]
TURNED = {"gaussian": (True, True), "spectrum": (True, True), "random-output": (True, False)}
TURNED |= {"random-input": (False, True), "permuted": (True, True)}
"""Null → whether it turns the left side, and the right one."""


def made(rank=4, rows=30, columns=20):
    """An adapter of two modules a layer, whose norms differ."""
    updates = {}
    for i in range(LAYERS):
        updates[f"layers.{i}.q"] = (1.0 + i) * random_update(i, rows, columns, rank, torch.float32)
        updates[f"layers.{i}.k"] = random_update(100 + i, rows, columns, rank, torch.float32)
    return in_memory(updates)


@pytest.fixture(scope="module")
def real():
    return made()


def size_of_a(update):
    return float(update.A.norm())


@pytest.mark.parametrize("name", NULLS)
def test_a_null_has_the_norm_the_rank_and_its_share_of_both_factors_in_every_module(real, name):
    null = null_adapter(real, name, 0)
    assert null.sites.keys() == real.sites.keys()
    for module, update in real.updates.items():
        other = null.updates[module]
        assert other.norm() == pytest.approx(update.norm(), rel=1e-5)
        assert size_of_a(other) == pytest.approx(size_of_a(update), rel=1e-5)
        assert (other.rank, other.shape) == (update.rank, update.shape)


@pytest.mark.parametrize("name", ["spectrum", "random-output", "random-input", "permuted", "negative"])
def test_these_keep_the_singular_values(real, name):
    null = null_adapter(real, name, 0)
    for module, update in real.updates.items():
        torch.testing.assert_close(null.updates[module].singular_values(), update.singular_values(), rtol=1e-5, atol=0)


def test_the_gaussian_null_keeps_the_norm_alone():
    flat = in_memory({"layers.0.q": LowRank(torch.eye(4, 20), torch.eye(30, 4))})
    values = null_adapter(flat, "gaussian", 0).updates["layers.0.q"].singular_values()
    assert float(values[0] / values[-1]) > 1.5


def overlap(one, other):
    """Shared dimensions of the left and of the right sides, over those of chance."""
    pair = module_pair(Canonical(one), Canonical(other))
    return [side.shared / side.chance for side in (pair.left, pair.right)]


@pytest.mark.parametrize("name", TURNED)
def test_turned_sides_overlap_as_chance_has_it_and_the_others_wholly(name):
    real = made(rank=3, rows=40, columns=60)
    update = real.updates["layers.0.q"]
    drawn = [null_adapter(real, name, 7, draw).updates["layers.0.q"] for draw in range(40)]
    found = np.array([overlap(update, each) for each in drawn])
    for side, (turned, dimensions) in enumerate(zip(TURNED[name], (40, 60), strict=True)):
        if turned:
            error = found[:, side].std(ddof=1) / math.sqrt(len(drawn))
            assert found[:, side].mean() == pytest.approx(1.0, abs=4 * error)
        else:
            assert found[:, side] == pytest.approx(dimensions / 3, rel=1e-5)  # the same subspace
    cosines = np.array([update.inner(each) / update.norm() / each.norm() for each in drawn])
    assert abs(cosines.mean()) < 4 * cosines.std(ddof=1) / math.sqrt(len(drawn))


def test_haar_directions_are_uniform_whatever_the_qr_routine_prefers():
    """Without its signs mended, every first entry of Q would be negative (LAPACK) and its mean far from 0."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([haar(3, 2, generator) for _ in range(2000)])
    eye = torch.eye(2, dtype=torch.float64).expand(2000, 2, 2)
    torch.testing.assert_close(drawn.transpose(1, 2) @ drawn, eye, rtol=0, atol=1e-12)
    assert float(drawn.mean(0).abs().max()) < 4 * math.sqrt(1 / 3 / 2000)
    # Archimedes: a coordinate of a uniform direction in three dimensions is uniform on [−1, 1]
    assert float((drawn[:, 0, 0] ** 2).mean()) == pytest.approx(1 / 3, abs=0.03)
    assert float((drawn[:, 0, 0] ** 4).mean()) == pytest.approx(1 / 5, abs=0.03)


def test_a_permutation_keeps_all_entries(real):
    null = null_adapter(real, "permuted", 0)
    for module, update in real.updates.items():
        ours, theirs = (each.delta().flatten().sort().values for each in (null.updates[module], update))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert not torch.allclose(null.updates[module].delta(), update.delta())


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_layers_are_a_derangement_within_their_type(real, seed):
    null = null_adapter(real, "shuffled-layers", seed)
    donors = {}
    for module, update in null.updates.items():
        cosines = {name: update.inner(other) / update.norm() / other.norm() for name, other in real.updates.items()}
        donors[module] = max(cosines, key=cosines.get)
        assert cosines[donors[module]] == pytest.approx(1.0, abs=1e-5)
    assert all(donor != module for module, donor in donors.items())
    assert all(donor.rpartition(".")[2] == module.rpartition(".")[2] for module, donor in donors.items())
    assert sorted(donors.values()) == sorted(donors)


def test_modules_of_a_type_of_their_own_change_places_with_those_of_their_shape():
    updates = {f"layers.{i}.q": random_update(i, 6, 4, 2, torch.float32) for i in range(2)}
    one = in_memory({**updates, "pooler": random_update(5, 8, 8, 2, torch.float32)})
    with pytest.raises(MismatchError, match=r"pooler: no other module has a ΔW of shape \[8, 8\]"):
        require_null(one, "shuffled-layers")
    with pytest.raises(MismatchError, match="pooler"):
        null_adapter(one, "shuffled-layers", 0)
    two = in_memory({**one.updates, "head": random_update(6, 8, 8, 2, torch.float32)})
    require_null(two, "shuffled-layers")
    null = null_adapter(two, "shuffled-layers", 0)
    pooler, head = null.updates["pooler"], two.updates["head"]
    assert pooler.inner(head) == pytest.approx(pooler.norm() * head.norm(), rel=1e-5)


def test_a_module_without_an_update_stays_so_and_lends_nothing():
    updates = {f"layers.{i}.q": random_update(i, 6, 4, 2, torch.float32) for i in range(3)}
    updates["layers.1.q"] = 0.0 * updates["layers.1.q"]
    one = in_memory(updates)
    for name in NULLS:
        null = null_adapter(one, name, 0)
        assert null.updates["layers.1.q"].norm() == 0
        assert null.updates["layers.0.q"].norm() == pytest.approx(updates["layers.0.q"].norm(), rel=1e-5)


def test_the_negative_is_the_adapter_with_its_sign_changed(real):
    for module, update in null_adapter(real, "negative").updates.items():
        assert torch.equal(update.delta(), -real.updates[module].delta())


@pytest.mark.parametrize("name", RANDOM)
def test_equal_seeds_give_equal_nulls_and_others_give_others(real, name):
    one, same, other = (null_adapter(real, name, *seed) for seed in ((0, 1), (0, 1), (0, 2)))
    modules = list(real.updates)
    assert all(torch.equal(one.updates[m].delta(), same.updates[m].delta()) for m in modules)
    assert not all(torch.equal(one.updates[m].delta(), other.updates[m].delta()) for m in modules)
    if name != "shuffled-layers":  # every module has numbers of its own, whichever others there are
        few = in_memory({m: real.updates[m] for m in modules[:2]})
        assert torch.equal(null_adapter(few, name, 0, 1).updates[modules[1]].delta(), one.updates[modules[1]].delta())


def test_a_null_is_a_plain_adapter_with_the_heads_of_the_real_one(tmp_path):
    tensors = lora("net.q_proj", rank=2, rows=6, columns=4)
    tensors["base_model.model.classifier.weight"] = torch.ones(3, 6)
    real = Adapter.load(write(tmp_path / "a", tensors, r=2, lora_alpha=8, modules_to_save=["classifier"]))
    null = null_adapter(real, "spectrum", 0)
    assert null.others == real.others
    assert null.updates["net.q_proj"].norm() == pytest.approx(real.updates["net.q_proj"].norm(), rel=1e-5)
    assert null.source == f"spectrum null of {real.source}"


def test_an_adapter_whose_update_needs_the_base_has_no_nulls(tmp_path):
    tensors = lora("net.q_proj", rank=2, rows=6, columns=4)
    tensors["base_model.model.net.q_proj.lora_magnitude_vector.weight"] = torch.ones(6)
    dora = Adapter.load(write(tmp_path / "a", tensors, r=2, use_dora=True))
    with pytest.raises(TunerError, match="no ΔW from the factors alone"):
        require_null(dora, "gaussian")
