"""Shared prefixes give bitwise what the plain way gives, on every architecture, with fewer block evaluations."""

import dataclasses

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, albert, bert, by_block, judge, llama, tokens, worn
from peft import HiraConfig, LoHaConfig, LoraConfig, OFTConfig
from torch import nn

from lora_lab.errors import TunerError
from lora_lab.games.estimators import plan
from lora_lab.scoring.layout import Layout
from lora_lab.scoring.prefixes import Variants


def scored(attached, variants, batches, **options):
    engine = Variants(attached, **options)
    found = dict(engine.run(variants, batches, judge))
    assert sorted(found) == list(range(len(variants)))
    return engine, [found[i].logits for i in range(len(variants))]


def assert_shared_is_plain(attached, variants, batches, **options):
    shared, found = scored(attached, variants, batches, **options)
    plain, expected = scored(attached, variants, batches, share=False)
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    distinct = {a.tobytes() for a in expected}
    assert len(distinct) > len(set(variants)) / 2  # the variants do differ
    return shared, plain


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_prefixes_are_bitwise_the_plain_way(name, tmp_path):
    make, data, targets = ARCHITECTURES[name]
    attached, _ = worn(tmp_path, make, targets)
    engine = Variants(attached)
    count = by_block(engine, [])[1]
    masks = np.random.default_rng(0).random((24, count)) < 0.5
    masks[:2] = [[True] * count, [False] * count]
    variants, _ = by_block(engine, masks)
    shared, plain = assert_shared_is_plain(attached, variants, [data(3), data(2)])
    assert shared.layout.why_not is None
    assert plain.computed == 2 * 24 * plain.layout.blocks
    assert shared.computed < 0.8 * plain.computed
    assert shared.kept_bytes > 0


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_players_inside_a_block_share_what_comes_before(name, tmp_path):
    make, data, targets = ARCHITECTURES[name]
    attached, _ = worn(tmp_path, make, targets)
    engine = Variants(attached)
    last = max(i for i, own in enumerate(engine.names) if engine.names[-1].split(".")[:4] == own.split(".")[:4])
    variants = [tuple(float(i != off) for i in range(len(engine.names))) for off in range(last + 1)]
    shared, plain = assert_shared_is_plain(attached, variants, [data(4)])
    assert shared.computed < plain.computed


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, use_dora=True, target_modules=["query", "dense"]),
        LoHaConfig(r=2, alpha=4, target_modules=["query", "dense"]),
        HiraConfig(r=2, target_modules=["query", "dense"]),
        OFTConfig(r=0, oft_block_size=4, target_modules=["query", "value"]),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_tuner_can_be_switched(config, tmp_path):
    attached, _ = worn(tmp_path, bert, None, config)
    engine = Variants(attached)
    masks = np.random.default_rng(1).random((12, 4)) < 0.5
    variants, _ = by_block(engine, np.unique(masks, axis=0))
    assert_shared_is_plain(attached, variants, [tokens(3)])


def test_cost_is_what_is_then_computed(tmp_path):
    attached, _ = worn(tmp_path, bert, ["query"])
    masks = (np.arange(16)[:, None] >> np.arange(4) & 1).astype(bool)
    engine = Variants(attached)
    variants, _ = by_block(engine, masks)
    assert engine.layout.cost(variants) == 2 + 4 + 8 + 16  # the nodes of the trie
    list(engine.run(variants, [tokens(3), tokens(2)], judge))
    assert engine.computed == 2 * engine.layout.cost(variants)


def test_little_memory_takes_variants_through_each_batch_together(tmp_path):
    attached, _ = worn(tmp_path, bert, ["query", "dense"])
    masks = np.random.default_rng(0).random((40, 4)) < 0.5
    variants, _ = by_block(Variants(attached), np.unique(masks, axis=0))
    batches = [tokens(n) for n in (3, 2, 4)]
    much, _ = assert_shared_is_plain(attached, variants, batches)
    little, _ = assert_shared_is_plain(attached, variants, batches, memory=1)
    assert little.kept_bytes < much.kept_bytes
    assert little.computed == pytest.approx(much.computed, abs=4)


def test_everything_is_on_and_unpatched_afterwards(tmp_path):
    attached, _ = worn(tmp_path, llama, ["q_proj"])
    engine = Variants(attached)
    before = attached.model(**tokens(3)).logits
    variants, _ = by_block(engine, np.eye(4, dtype=bool))
    iterator = engine.run(variants, [tokens(3)], judge)
    next(iterator)
    assert attached.model.config.use_cache is False
    iterator.close()  # as an interruption would
    assert attached.model.config.use_cache is True
    assert not any("forward" in vars(module) for module in attached.model.modules())
    assert torch.equal(attached.model(**tokens(3)).logits, before)


def test_a_model_that_writes_into_its_blocks_outputs_falls_back_and_says_so(tmp_path):
    class Spoiler(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu_().mul_(1.5)
            return dataclasses.make_dataclass("Output", ["logits"])(x)

    def data(n):
        return {"x": torch.randn(n, 4, generator=torch.Generator().manual_seed(n))}

    attached, _ = worn(tmp_path, Spoiler, r"layers\.\d\.0")
    variants, _ = by_block(Variants(attached), (np.arange(8)[:, None] >> np.arange(3) & 1).astype(bool))
    shared, _ = assert_shared_is_plain(attached, variants, [data(5)])
    assert "in place" in shared.layout.why_not


def test_one_shared_block_called_three_times_is_no_list_and_that_is_said(tmp_path):
    attached, _ = worn(tmp_path, albert, ["query"])
    engine = Variants(attached)
    assert "no repeated list" in engine.layout.why_not
    on, off = engine.all_on(), (0.0,) * len(engine.names)
    assert_shared_is_plain(attached, [on, off], [tokens(3)])


def test_lists_of_lists_are_no_blocks_and_that_is_said(tmp_path):
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            pairs = [torch.nn.ModuleList([torch.nn.Linear(4, 4)]) for _ in range(3)]
            self.layers = torch.nn.ModuleList(pairs)

        def forward(self, x):
            for (layer,) in self.layers:
                x = layer(x)
            return dataclasses.make_dataclass("Output", ["logits"])(x)

    attached, _ = worn(tmp_path, Nested, r"layers\.\d\.0")
    assert "no repeated list" in Variants(attached).layout.why_not


def test_ranks_are_masked_one_by_one(tmp_path):
    attached, adapter = worn(tmp_path, bert, ["query"])
    engine = Variants(attached)
    name = engine.names[1]
    kept = (True, False, True)
    variant = tuple(kept if each == name else 1.0 for each in engine.names)
    ((_, found),) = engine.run([variant], [tokens(3)], judge)
    tensors = dict(adapter.tensors)
    A = tensors[adapter.sites[name].keys["lora_A"]].clone()
    A[1] = 0
    attached.set(dataclasses.replace(adapter, tensors={**tensors, adapter.sites[name].keys["lora_A"]: A}))
    with torch.no_grad():
        assert torch.equal(torch.tensor(found.logits), attached.model(**tokens(3)).logits)


def test_a_factor_scales_the_update(tmp_path):
    attached, adapter = worn(tmp_path, bert, ["value", "dense"])
    engine = Variants(attached)
    variants = [(2.0,) * len(engine.names), engine.all_on()]
    found, plain = (scores for _, scores in sorted(engine.run(variants, [tokens(3)], judge)))
    assert np.abs(found.logits - plain.logits).max() > 1e-3
    doubled = {name: update * 2.0 for name, update in adapter.updates.items()}
    attached.set(adapter.with_updates(doubled, source="doubled"))
    with torch.no_grad():
        assert torch.allclose(torch.tensor(found.logits), attached.model(**tokens(3)).logits, atol=1e-5)


def test_ranks_of_a_tuner_that_has_none_are_refused(tmp_path):
    attached, _ = worn(tmp_path, bert, None, LoHaConfig(r=2, target_modules=["query"]))
    engine = Variants(attached)
    with pytest.raises(TunerError, match="no ranks"):
        engine.set(((True, False), *[1.0] * (len(engine.names) - 1)))


def test_antithetic_orders_over_eighty_blocks_share_half_of_them():
    layout = Layout(tuple(f"layers.{i}.q_proj" for i in range(80)), tuple((i,) for i in range(80)))
    coalitions = {
        row.tobytes(): row for draw in plan(80, estimator="antithetic", samples=10) for row in draw.coalitions
    }
    variants = [tuple(row.astype(float)) for row in coalitions.values()]
    assert len(variants) == 792
    assert layout.cost(variants) / (80 * len(variants)) == pytest.approx(1 - 0.501, abs=5e-4)
    assert dataclasses.replace(layout, why_not="it was not asked for").cost(variants) == 80 * len(variants)
