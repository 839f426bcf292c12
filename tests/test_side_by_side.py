"""Modules merged in several threads: the same numbers, the same order, the first error."""

import threading
import time

import pytest
import torch
from making_adapters import lora, write

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import MismatchError
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES
from lora_lab.merging.sources import Sources
from lora_lab.side_by_side import in_order, one_core_each

MODULES = [f"layers.{i}.q" for i in range(7)]


def sources(folder, ties=False):
    made = []
    for seed in range(3):
        tensors = {}
        for i, name in enumerate(MODULES):
            tensors |= lora(name, rank=3, rows=90 + i, columns=70, seed=10 * seed + i)
        if ties:
            tensors = {key: tensor.sign() for key, tensor in tensors.items()}
        made.append(Adapter.load(write(folder / f"{seed}-{ties}", tensors, r=3, lora_alpha=6)))
    return Sources(made)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("method", [name for name, entry in MERGES.items() if not entry.reads_data])
def test_any_number_of_jobs_gives_the_same_bits(method, ties, tmp_path):
    given = sources(tmp_path, ties)
    settings = {} if method in ("factor-average", "lego") else {"rank": 2}
    one, more = (merge(given, method, jobs=jobs, **settings) for jobs in (1, 3))
    assert one.errors == more.errors
    assert one.adapter.record == more.adapter.record
    assert list(one.adapter.tensors) == list(more.adapter.tensors)
    for key, tensor in one.adapter.tensors.items():
        assert torch.equal(tensor, more.adapter.tensors[key])


def test_results_come_in_the_order_of_the_calls_and_few_of_them_wait():
    begun, most = [], 0

    def call(i):
        begun.append(i)
        time.sleep(0.02 * (i % 3 == 0))
        return i, threading.get_ident()

    found = []
    for i, thread in in_order([lambda i=i: call(i) for i in range(20)], 3):
        found.append(i)
        most = max(most, len(begun) - len(found))
        assert thread != threading.get_ident()
    assert found == list(range(20))
    assert most <= 4


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_first_error_is_raised_and_the_rest_not_begun(jobs):
    begun = []

    def call(i):
        begun.append(i)
        if i == 2:
            raise MismatchError("two")
        return i

    with pytest.raises(MismatchError, match="two"):
        list(in_order((lambda i=i: call(i) for i in range(50)), jobs))
    assert len(begun) < 12


def test_torch_uses_as_many_threads_afterwards_as_before():
    before = torch.get_num_threads()
    with one_core_each():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
