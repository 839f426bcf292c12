"""What a pruning will take: bytes and ranks are those that are written, dense work is foretold to be longer."""

import pytest
import torch
from making_adapters import lora, write

from lora_lab.adapters.adapter import Adapter
from lora_lab.cli.terminal import foretell
from lora_lab.forecast import Forecast
from lora_lab.pruning import prune_rank, prune_weights
from lora_lab.pruning.forecast import forecast


def adapter(folder, dtype=torch.float32, rank=4):
    tensors = lora("a.q", rank=rank, rows=30, columns=20, dtype=dtype)
    tensors |= lora("a.k", rank=rank, rows=7, columns=20, seed=1, dtype=dtype)
    tensors |= lora("b.q", rank=rank, rows=30, columns=20, seed=2, dtype=dtype)
    return Adapter.load(write(folder / "a", tensors, r=rank, lora_alpha=rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_and_bytes_are_those_that_are_written(tmp_path, dtype):
    given = adapter(tmp_path, dtype)
    made, expected = prune_rank(given, rank=3), forecast(given, rank=3)
    assert (expected.modules, expected.rank, expected.bytes) == (3, 3, made.bytes[1])
    assert forecast(given).bytes == made.bytes[0]
    assert 0 < expected.seconds < 1


def test_dense_work_is_foretold_to_take_longer_and_more_memory(tmp_path):
    given = adapter(tmp_path)
    plain, dense = forecast(given, criterion="magnitude"), forecast(given, criterion="delta-magnitude")
    made = prune_weights(given, sparsity=0.5, by="delta-magnitude")
    assert dense.bytes == made.bytes[1]
    assert dense.rank == max(site.rank for site in made.adapter.sites.values())
    assert dense.seconds > plain.seconds
    assert dense.memory > plain.memory
    assert forecast(given, criterion="delta-magnitude", jobs=9).memory > dense.memory


@pytest.mark.parametrize(
    "cut",
    [
        {"rank": 2},
        {"energy": 0.8},
        {"cumulative": 0.7},
        {"ratio": 2.0},
        {"rank": 2, "by": "units"},
        {"rank": 2, "by": "random"},
        {"sparsity": 0.4},
        {"sparsity": 0.4, "by": "delta-magnitude"},
    ],
)
def test_any_number_of_jobs_gives_the_same_bits(tmp_path, cut):
    given = adapter(tmp_path)
    prune = prune_weights if "sparsity" in cut else prune_rank
    one, more = (prune(given, **cut, jobs=jobs) for jobs in (1, 3))
    assert one.errors == more.errors
    assert one.adapter.identity == more.adapter.identity


def test_modules_are_cut_in_threads(tmp_path, monkeypatch):
    asked = []

    def in_order(calls, jobs):
        asked.append(jobs)
        return (call() for call in calls)

    monkeypatch.setattr("lora_lab.pruning.ranks.in_order", in_order)
    monkeypatch.setattr("lora_lab.pruning.cost.in_order", in_order)
    prune_rank(adapter(tmp_path), rank=2, jobs=3)
    prune_rank(adapter(tmp_path), rank=2, jobs=3, by="random")  # whose draws come in one order
    assert asked == [3, 3, 1, 3]


def test_a_long_pruning_is_told_before_it_begins(lora_lab, tmp_path, monkeypatch, capsys):
    adapter(tmp_path)
    wanted = []
    monkeypatch.setattr("lora_lab.forecast.Forecast.is_long", property(lambda self: not wanted.append(self)))
    code, _, err = lora_lab("prune", "a", "--rank", "3", "-o", "small")
    assert code == 0, err
    assert "to be pruned: 3 modules, rank 3, 1.52 kB, about 0 s of a core, up to" in err
    code, _, err = lora_lab("prune", "a", "--sparsity", "0.5", "--jobs", "2", "-o", "thin")
    assert "to be pruned: 3 modules, rank 4," in err
    assert len(wanted) == 2
    monkeypatch.undo()
    foretell("to be pruned", Forecast(1, 1, 1, 1.0, 1))
    assert capsys.readouterr() == ("", "")
