"""Merges and prunings on another device than the CPU: nothing is forgotten there, and the numbers are the same."""

import pytest
import torch
from making_adapters import lora, write
from pretended_device import DEVICE, pretended_device

from lora_lab.adapters.adapter import Adapter
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES
from lora_lab.merging.sources import Sources
from lora_lab.pruning.entries import prune_weights
from lora_lab.pruning.ranks import RANK_ORDERS, prune_rank

SHAPES = {"layers.0.q": (40, 30), "layers.1.q": (24, 50)}
METHODS = [name for name, entry in MERGES.items() if not entry.reads_data]
WITHIN = ["average", "slerp", "ties", "dare", "della", "breadcrumbs"]
CASES = [(name, {}, rank) for name in METHODS for rank in (None, 2)]
CASES += [("core-space", {"inner": name}, 3) for name in WITHIN]
CASES += [("ties", {"scope": "module"}, 2), ("tsv", {"share": 0.5}, None)]


def adapters(folder):
    made = []
    for seed in range(3):
        tensors = {}
        for i, (name, (rows, columns)) in enumerate(SHAPES.items()):
            if seed != 2 or i == 0:  # one leaves a module alone
                tensors |= lora(name, rank=3, rows=rows, columns=columns, seed=10 * seed + i)
        made.append(Adapter.load(write(folder / str(seed), tensors, r=3, lora_alpha=6)))
    return made


def same(one, other):
    assert list(one.tensors) == list(other.tensors)
    for key, tensor in one.tensors.items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, other.tensors[key]), key


@pytest.mark.parametrize(("method", "options", "rank"), CASES)
def test_a_merge_on_a_device_is_that_on_the_cpu(tmp_path, method, options, rank):
    given = adapters(tmp_path)
    weights = [1.0, 0.5, 2.0]
    expected = merge(Sources(given, weights), method, options=options, rank=rank, jobs=1)
    with pretended_device() as device:
        found = merge(Sources(given, weights, place=DEVICE), method, options=options, rank=rank, jobs=1)
    assert device.operations > 10
    assert found.errors == expected.errors
    same(found.adapter, expected.adapter)


@pytest.mark.parametrize("by", RANK_ORDERS)
@pytest.mark.parametrize("cut", [{"rank": 2}, {"energy": 0.8}, {"cumulative": 0.7}, {"ratio": 1.3}])
def test_ranks_cut_on_a_device_are_those_cut_on_the_cpu(tmp_path, by, cut):
    if by == "random" and "ratio" in cut:
        return
    given = adapters(tmp_path)[0]
    expected = prune_rank(given, by=by, jobs=1, **cut)
    with pretended_device() as device:
        found = prune_rank(given, by=by, jobs=1, place=DEVICE, **cut)
    assert device.operations > 10
    assert (found.error, found.errors, found.ranks) == (expected.error, expected.errors, expected.ranks)
    same(found.adapter, expected.adapter)


def test_entries_of_delta_pruned_on_a_device_are_those_pruned_on_the_cpu(tmp_path):
    given = adapters(tmp_path)[0]
    cut = {"sparsity": 0.5, "by": "delta-magnitude", "rank": 2, "jobs": 1}
    expected = prune_weights(given, **cut)
    with pretended_device() as device:
        found = prune_weights(given, **cut, place=DEVICE)
    assert device.operations > 10
    assert (found.error, found.sparsity) == (expected.error, expected.sparsity)
    same(found.adapter, expected.adapter)


def test_the_pretended_device_finds_what_was_not_moved():
    with pretended_device():
        there, here = torch.ones(3).to(DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="on lazy and on the CPU"):
            there + here
        with pytest.raises(RuntimeError, match="on lazy and on the CPU"):
            there @ here
        assert torch.equal((there + 1).cpu(), here + 1)
