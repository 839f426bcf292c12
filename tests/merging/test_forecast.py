"""What a merge will take is what it then takes: bytes and ranks exactly, time and memory by their order."""

import pytest
import torch
from making_adapters import lora, write
from planted_tasks import Tiny

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files import reading
from lora_lab.forecast import Forecast
from lora_lab.merging.forecast import forecast
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources


def sources(folder, dtype=torch.float32):
    made = []
    for seed, rank in enumerate((2, 3)):
        tensors = lora("a.q", rank=rank, rows=30, columns=20, seed=seed, dtype=dtype)
        tensors |= lora("a.k", rank=rank, rows=4, columns=20, seed=seed, dtype=dtype)
        made.append(Adapter.load(write(folder / f"{seed}", tensors, r=rank, lora_alpha=rank)))
    return Sources(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"exact": True}, {"dtype": "fp16"}])
@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "della"])
def test_ranks_and_bytes_are_those_that_are_written(method, settings, dtype, tmp_path):
    given = sources(tmp_path, dtype)
    expected, made = forecast(given, method, **settings), merge(given, method, **settings).adapter
    assert expected.bytes == sum(tensor.numel() * tensor.itemsize for tensor in made.tensors.values())
    assert expected.rank == max(site.rank for site in made.sites.values())
    assert expected.modules == 2
    assert 0 < expected.seconds < 1
    assert not expected.is_long


def test_what_is_read_by_tensors_takes_no_memory(tmp_path, monkeypatch):
    whole = sources(tmp_path)
    monkeypatch.setattr(reading, "_AT_ONCE", 0)
    lazy = sources(tmp_path)
    given = sum(tensor.numel() * 4 for adapter in whole.adapters for tensor in adapter.tensors.values())
    assert forecast(whole, "cat").memory - forecast(lazy, "cat").memory == given


def test_what_works_on_entries_is_foretold_to_take_longer_and_more_memory(tmp_path):
    given = sources(tmp_path)
    plain, dense = forecast(given, "task-arithmetic"), forecast(given, "ties")
    assert dense.seconds > plain.seconds
    assert dense.memory > plain.memory
    assert forecast(given, "fisher").seconds is None
    inner, outer = (forecast(given, *method) for method in (("ties",), ("pico",)))
    assert outer.memory < inner.memory == forecast(given, "pico", options={"inner": "ties"}).memory


def test_a_method_that_looks_at_data_is_foretold_by_its_passes(tmp_path):
    given = sources(tmp_path)
    assert forecast(given, "nsc").passes == 0  # without tasks nobody knows
    given.tasks = [Tiny(), Tiny()]
    expected = forecast(given, "nsc", options={"steps": 7, "batch_size": 50})
    assert (expected.passes, expected.is_long) == (3 * 7 * 50 * 2, True)
    assert not forecast(given, "nsc", options={"steps": 1}).is_long
    assert forecast(given, "ties").passes == 0


@pytest.mark.parametrize(
    ("seconds", "size", "told"), [(11.0, 1, True), (1.0, 10**9, True), (None, 1, False), (9.0, 1, False)]
)
def test_what_is_long_or_large_is_worth_a_line(seconds, size, told):
    assert Forecast(1, 1, size, seconds, 1).is_long is told
