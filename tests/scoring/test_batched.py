"""Passes over several coalitions give what passes over each give: bit for bit, or up to rounding."""

import contextlib
import dataclasses
import logging

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, bert, by_block, images, judge, llama, tokens, vit, worn
from peft import HiraConfig, LoHaConfig, LoraConfig
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification

from lora_lab.errors import LoraLabWarning, OptionError
from lora_lab.scoring.execution import Batching, Execution
from lora_lab.scoring.prefixes import Variants
from lora_lab.scoring.together.batched import Size
from lora_lab.scoring.together.rows import ApartError

FIVE = Batching(5)


def scored(attached, variants, batches, *batching, judge=judge, **options):
    engine = Variants(attached, **options)
    found = dict(engine.run(variants, batches, judge, *batching))
    assert sorted(found) == list(range(len(variants)))
    return engine, [found[i].logits for i in range(len(variants))]


def assert_together_is_alone(attached, variants, batches, batching=FIVE, *, bits=False, **options):
    """Up to 1e-6 of the largest logit, or bit for bit; the engine that scored them together."""
    _, expected = scored(attached, variants, batches, share=False)
    together, found = scored(attached, variants, batches, batching, **options)
    assert len({a.tobytes() for a in expected}) > len(set(variants)) / 2  # the variants do differ
    for a, b in zip(found, expected, strict=True):
        assert (a == b).all() if bits else np.abs(a - b).max() <= 1e-6 * np.abs(b).max()
    assert not any("forward" in vars(module) for module in attached.model.modules())
    assert not any(module._forward_hooks for module in attached.model.modules())
    return together


def masked(attached, count=24):
    """Coalitions of blocks, all and none among them."""
    engine = Variants(attached)
    blocks = by_block(engine, [])[1]
    masks = np.random.default_rng(0).random((count, blocks)) < 0.5
    masks[:2] = [[True] * blocks, [False] * blocks]
    return by_block(engine, np.unique(masks, axis=0))[0]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama", "t5", "clip vision"])
def test_together_is_alone(name, share, tmp_path):
    make, data, targets = ARCHITECTURES[name]
    attached, _ = worn(tmp_path, make, targets)
    variants = masked(attached)
    bits = name in ("vit", "gpt2")  # as the CPU's kernels have it
    together = assert_together_is_alone(attached, variants, [data(3), data(2)], share=share, bits=bits)
    assert together.apart is None
    if not share:
        trial = 3 * together.layout.blocks
        assert together.computed == trial + 2 * len(variants) * together.layout.blocks


def test_blocks_run_once_for_all_that_agree_so_far(tmp_path):
    """What is computed is what the layout foretells, once a model is known."""
    attached, _ = worn(tmp_path, bert, ["query"])
    engine = Variants(attached)
    variants, _ = by_block(engine, (np.arange(16)[:, None] >> np.arange(4) & 1).astype(bool))
    list(engine.run(variants, [tokens(3), tokens(2)], judge, FIVE))
    learnt = engine.computed
    list(engine.run(variants, [tokens(3), tokens(2)], judge, FIVE))
    assert engine.apart is None
    assert engine.computed - learnt == 2 * engine.layout.cost(variants, 5) < 2 * 64
    assert engine.layout.cost(variants, 16) == engine.layout.cost(variants) == 2 + 4 + 8 + 16  # nodes of the trie


def test_first_batches_without_padding_teach_nothing_wrong_of_later_ones(tmp_path):
    attached, _ = worn(tmp_path, bert, ["query", "dense"])
    whole = {name: tensor[1:] for name, tensor in tokens(5).items()}
    batches = [whole, tokens(3), tokens(4), {name: tensor[:1] for name, tensor in tokens(3).items()}]
    assert assert_together_is_alone(attached, masked(attached), batches).apart is None


def test_ranks_and_factors_have_gates(tmp_path):
    attached, _ = worn(tmp_path, bert, ["query", "dense"])
    draw = np.random.default_rng(0)
    names = Variants(attached).names
    states = [1.0, 0.0, 0.3, 2.0, (1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.5, 1.0, 0.0)]
    variants = [tuple(states[i] for i in draw.integers(len(states), size=len(names))) for _ in range(12)]
    assert assert_together_is_alone(attached, variants, [tokens(3)]).apart is None


def convnext():
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[2, 2], image_size=16, num_labels=3)
    return ConvNextForImageClassification(config)


def test_convolutions_have_gates(tmp_path):
    config = LoraConfig(r=3, target_modules=["pwconv1", "downsampling_layer.1", "patch_embeddings"])
    attached, _ = worn(tmp_path, convnext, None, config)
    data = {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    names = Variants(attached).names
    assert any(name.endswith("downsampling_layer.1") for name in names)
    draw = np.random.default_rng(0)
    for states in ([0.0, 1.0], [1.0, (1.0, 0.0, 1.0)]):
        variants = list({tuple(states[i] for i in draw.integers(2, size=len(names))) for _ in range(12)})
        assert assert_together_is_alone(attached, variants, [data]).apart is None


def test_a_trained_head_and_dropout_change_nothing(tmp_path):
    config = LoraConfig(r=3, target_modules=["query"], lora_dropout=0.5, modules_to_save=["classifier"])
    attached, _ = worn(tmp_path, bert, None, config)
    assert assert_together_is_alone(attached, masked(attached), [tokens(3)]).apart is None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(r=2, use_dora=True, target_modules=["query"]), "DoraLinearVariant"),
        (LoraConfig(r=2, lora_bias=True, target_modules=["query"]), "its B has a bias"),
        (LoraConfig(r=2, target_modules=["query", "word_embeddings"]), "peft.tuners.lora.layer.Embedding"),
        (LoHaConfig(r=2, alpha=4, target_modules=["query"]), "peft.tuners.loha"),
        (HiraConfig(r=2, target_modules=["query"]), "peft.tuners.hira"),
    ],
    ids=["dora", "bias", "embedding", "loha", "hira"],
)
def test_what_has_no_gates_is_scored_one_by_one_and_named(config, why, tmp_path, caplog):
    attached, _ = worn(tmp_path, bert, None, config)
    names = Variants(attached).names
    variants = [(float(i % 2), *[float(i // 2 == k) for k in range(len(names) - 1)]) for i in range(8)]
    with caplog.at_level(logging.DEBUG, "lora_lab"):
        together = assert_together_is_alone(attached, variants, [tokens(3)], bits=True)
    assert why in together.apart
    assert [record.getMessage() for record in caplog.records] == [
        f"coalitions are scored one after another: {together.apart}"
    ]


def test_a_module_whose_rows_are_no_examples_is_scored_one_by_one(tmp_path):
    make, data, targets = ARCHITECTURES["clip text"]
    attached, _ = worn(tmp_path, make, targets)
    together = assert_together_is_alone(attached, masked(attached), [data(3)], Batching(3), bits=True)
    assert "clip.text_model.encoder.layers.0.self_attn.q_proj: its rows are not those of the examples" in together.apart


class Layers(nn.Module):
    """Three layers, between which something happens to all rows."""

    def __init__(self, between, last=lambda x: x):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
        self.between, self.last = between, last

    def forward(self, x):
        for layer in self.layers:
            x = self.between(layer(x))
        return dataclasses.make_dataclass("Output", ["logits"])(self.last(x))


def rows(n):
    return {"x": torch.randn(n, 4, generator=torch.Generator().manual_seed(n))}


@pytest.mark.parametrize(
    ("between", "last", "why"),
    [
        (lambda x: x - x.mean(0), lambda x: x, "rows touch each other"),
        (lambda x: x, lambda x: x @ x.T, "rows touch each other|failed"),
        (lambda x: x, lambda x: x[:3], "have 3 scores"),
    ],
    ids=["centred", "contrastive", "cut"],
)
def test_a_model_in_which_rows_touch_is_scored_one_by_one(between, last, why, tmp_path):
    attached, _ = worn(tmp_path, lambda: Layers(between, last), r"layers\.\d\.0")

    def means(model, batch):
        scores = judge(model, batch)
        columns = {**scores.columns, "loss": scores.logits.mean(1).astype(float)}
        return dataclasses.replace(scores, columns=columns)

    engine = Variants(attached)
    variants = masked(attached, 8)
    _, expected = scored(attached, variants, [rows(3)], judge=means)
    found = dict(engine.run(variants, [rows(3)], means, FIVE))
    assert engine.apart
    assert any(part in engine.apart for part in why.split("|"))
    assert all((found[i].logits == expected[i]).all() for i in range(len(variants)))


def test_batch_norm_does_not_let_rows_touch(tmp_path):
    attached, _ = worn(tmp_path, lambda: Layers(nn.BatchNorm1d(4)), r"layers\.\d\.0")
    assert assert_together_is_alone(attached, masked(attached), [rows(3)]).apart is None


def test_a_model_that_writes_into_outputs_of_its_blocks_is_right(tmp_path):
    attached, _ = worn(tmp_path, lambda: Layers(lambda x: x.relu_().mul_(1.5)), r"layers\.\d\.0")
    assert assert_together_is_alone(attached, masked(attached), [rows(5)]).apart is None


def test_an_update_that_is_no_number_does_not_reach_where_it_is_off(tmp_path):
    attached, adapter = worn(tmp_path, bert, ["query"])
    key = adapter.sites[Variants(attached).names[0]].keys["lora_A"]
    tensors = {**adapter.tensors, key: torch.full_like(adapter.tensors[key], torch.inf)}
    attached.set(dataclasses.replace(adapter, tensors=tensors))
    names = Variants(attached).names
    variants = [(0.0, *[float(i >> k & 1) for k in range(len(names) - 1)]) for i in range(6)]

    def losses(model, batch):
        scores = judge(model, batch)
        return dataclasses.replace(scores, columns={"loss": scores.logits.sum(1).astype(float)})

    expected = dict(Variants(attached).run(variants, [tokens(3)], losses))
    engine = Variants(attached)
    found = dict(engine.run(variants, [tokens(3)], losses, FIVE))
    assert all(np.isfinite(expected[i].logits).all() for i in expected)
    assert all((found[i].logits == expected[i].logits).all() for i in expected)


def test_where_memory_ends_half_as_many_go_together(tmp_path):
    attached, _ = worn(tmp_path, vit, ["q_proj"])
    sizes = []

    def tight(model, batch):
        sizes.append(len(batch["pixel_values"]))
        if sizes[-1] > 8 and len(sizes) > 4:  # the first passes, which are tried, had room
            raise torch.OutOfMemoryError("out of memory")
        return judge(model, batch)

    variants = masked(attached)
    _, expected = scored(attached, variants, [images(3)])
    engine, found = scored(attached, variants, [images(3)], FIVE, judge=tight)
    assert engine.apart is None
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    assert sizes[-1] <= 6
    assert 15 in sizes


def test_one_that_is_interrupted_leaves_the_model_as_it_was(tmp_path):
    attached, _ = worn(tmp_path, llama, ["q_proj"])
    before = attached.model(**tokens(3)).logits
    with contextlib.closing(Variants(attached).run(masked(attached), [tokens(3)], judge, FIVE)) as running:
        next(running)
    assert attached.model.config.use_cache is True
    assert not any("forward" in vars(module) or module._forward_hooks for module in attached.model.modules())
    assert torch.equal(attached.model(**tokens(3)).logits, before)


def test_a_compiled_pass_is_compiled_once_for_all_coalitions(tmp_path):
    attached, _ = worn(tmp_path, lambda: Layers(torch.tanh), r"layers\.\d\.0")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.register_backend(backend, "counted")
    variants = masked(attached)
    engine = Variants(attached)
    batching = Batching(3, "counted")
    half = len(variants) // 2 + 1  # no multiple of three
    found = dict(engine.run(variants[:half], [rows(3)], judge, batching))
    assert engine.apart is None
    compiled = len(graphs)
    assert compiled > 0
    found |= {half + i: s for i, s in engine.run(variants[half:], [rows(3)], judge, batching)}
    assert len(graphs) == compiled
    _, expected = scored(attached, variants, [rows(3)])
    for i, logits in enumerate(expected):
        assert np.abs(found[i].logits - logits).max() <= 1e-6 * np.abs(logits).max()


def test_what_cannot_be_compiled_is_told_and_right(tmp_path):
    attached, _ = worn(tmp_path, lambda: Layers(torch.tanh), r"layers\.\d\.0")

    def broken(graph, _):
        raise ValueError("no such instruction")

    torch._dynamo.register_backend(broken, "broken")
    with pytest.warns(LoraLabWarning, match="passes are not compiled: .*no such instruction"):
        assert_together_is_alone(attached, masked(attached), [rows(3)], Batching(3, "broken"))


def grown(per_work, most=64, alone=1.0):
    """The sizes that a run goes through where a piece of work takes so long in a pass over so many."""
    size, sizes = Size(None, most, alone), []
    for _ in range(16):
        sizes.append(size.now)
        size.took(size.now, per_work(size.now) * size.now, size.now)
    return list(dict.fromkeys(sizes)), size.now


def test_as_many_go_together_as_pay():
    assert grown(lambda n: 1 / n) == ([4, 8, 16, 32, 64], 64)
    assert grown(lambda n: 1 / n, most=20) == ([4, 8, 16], 16)
    assert grown(lambda n: 1 / n, most=3) == ([3], 3)
    assert grown(lambda n: 1 / min(n, 8)) == ([4, 8, 16], 8)
    assert grown(lambda n: 0.95) == ([4], 4)
    with pytest.raises(ApartError, match="4 at once take no less time each than one after another"):
        grown(lambda n: 1.1)


def test_how_many_go_together_by_itself():
    assert Execution("cpu").batching() == Batching(0)
    assert Execution(torch.device("cuda")).batching() == Batching(None)
    assert Execution("cpu", coalitions_at_once=7).batching() == Batching(7)
    assert Execution(torch.device("cuda"), coalitions_at_once=0).batching() == Batching(0)
    assert Execution("cpu", compile=True).batching() == Batching(None, True)
    with pytest.raises(OptionError, match="-2 coalitions at once; at least 1"):
        Execution(coalitions_at_once=-2)
    with pytest.raises(OptionError, match="only passes of several coalitions are compiled"):
        Execution(coalitions_at_once=0, compile=True)
    with pytest.raises(OptionError, match="`coalitions_at_once`"):
        Execution(coalitions_at_once="many")
