"""The rank at which merges come back: a number, the largest or the sum of the adapters', in every module."""

import pytest
import torch
from making_adapters import lora, write

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import OptionError
from lora_lab.merging.budgets import RANKS
from lora_lab.merging.forecast import forecast
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources

METHODS = ["task-arithmetic", "ties", "tsv", "knots", "lego"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Ranks 2 and 3 in one module; 2 and 3, more than its 4 rows together, in another; one adapter alone in a third."""
    folder, made = tmp_path_factory.mktemp("budgets"), []
    for seed, rank in enumerate((2, 3)):
        tensors = lora("a.q", rank=rank, rows=30, columns=20, seed=seed)
        tensors |= lora("a.k", rank=rank, rows=4, columns=20, seed=10 + seed)
        if seed:
            tensors |= lora("b.q", rank=rank, rows=30, columns=20, seed=20)
        made.append(Adapter.load(write(folder / f"{seed}", tensors, r=rank, lora_alpha=rank)))
    return Sources(made)


EXPECTED = {"largest": {"a.q": 3, "a.k": 3, "b.q": 3}, "sum": {"a.q": 5, "a.k": 4, "b.q": 3}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", ["largest", "sum", 2, 9])
def test_every_method_comes_back_at_the_rank_or_below(sources, method, rank):
    most = EXPECTED.get(rank) or dict.fromkeys(sources.modules, rank)
    merged = merge(sources, method, rank=rank)
    for name, site in merged.adapter.sites.items():
        assert site.rank <= most[name]
    assert merged.adapter.record["merge"]["rank"] == rank
    whole = merge(sources, method, exact=True)
    for name, update in whole.adapter.updates.items():
        kept, error = update.truncate(most[name])
        assert merged.errors[name] == pytest.approx(error, abs=1e-5)
        assert torch.allclose(merged.adapter.updates[name].delta(), kept.delta(), atol=1e-4)
    expected = forecast(sources, method, rank=rank)
    assert expected.bytes >= sum(tensor.numel() * tensor.itemsize for tensor in merged.adapter.tensors.values())


def test_words_are_the_ranks_of_the_adapters(sources):
    for word in RANKS:
        merged = merge(sources, "ties", rank=word)
        assert {name: site.rank for name, site in merged.adapter.sites.items()} == EXPECTED[word]
    without = merge(sources, "ties")
    assert {name: site.rank for name, site in without.adapter.sites.items()} == EXPECTED["sum"]


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        (0, "rank is 0; it must be at least 1"),
        (21, "a rank of 21 was asked for; the modules of these adapters have ranks up to 20"),
        ("all", "unknown rank 'all'; there are: largest, sum"),
        ("larges", "did you mean 'largest'"),
        (2.5, "rank is 2.5; a whole number or a text is needed"),
    ],
)
def test_an_impossible_rank_is_named(sources, rank, told):
    with pytest.raises(OptionError, match=told):
        merge(sources, "ties", rank=rank)
