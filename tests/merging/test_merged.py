import json
from dataclasses import replace

import pytest
import torch
from making_adapters import lora, random_adapter, write
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import adapter as in_memory
from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import FileError, LoraLabWarning, MismatchError, OptionError, TunerError
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES, check, rules
from lora_lab.merging.rules import subspaces
from lora_lab.merging.sources import Sources, Weights
from lora_lab.merging.writing.export import save
from lora_lab.scoring.evaluate import score
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.task import Split

RULES = rules()

TARGETS = ["q_proj", "fc1"]
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS}
FAST = {
    "fisher": {"examples": 8},
    "regmean": {"examples": 8},
    "lorahub": {"evaluations": 6},
    "adamerging": {"steps": 2},
    "nsc": {"steps": 2, "batch_size": 24},  # all that there are, so that no order of drawing counts
    "ziplora": {"steps": 2, "batch_size": 24},
    "cat-learned": {"steps": 2, "batch_size": 24},
}
LOSSLESS = {
    "magnitude": {"density": 1.0},
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "dare-ties": {"density": 1.0},
    "della": {"density": 1.0, "window": 0.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
    "knots": {"density": 1.0},
    "core-space": {"density": 1.0},
    "tsv": {"share": 1.0},
    "ctm": {"density": 1.0},
    "robustmerge": {"density": 1.0, "scale": 0.25},  # its two factors of 2 undone
    **FAST,
}
FLATTENED = ("iso-c", "iso-cts")  # all singular values at their mean: that is the method
SEARCHED = ("lorahub", "adamerging", "nsc")  # coefficients are found, not given
RANDOM = ("dare", "dare-ties", "della")


class Few(Digits):
    """Some digits only."""

    def _load(self, split):
        return Split({name: tensor[:24] for name, tensor in super()._load(split).inputs.items()})


@pytest.fixture(scope="module")
def tasks():
    return [Few("identity"), Few("mod3")]


@pytest.fixture(scope="module")
def pair(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    made = []
    for seed, task in enumerate(tasks):
        adapter = random_adapter(task, folder / f"a{seed}", LoraConfig(**CONFIG), seed=seed, scale=0.05)
        made.append(replace(adapter, record={"task": task.record, "method": "lora", "seed": 0}))
    return made


def deltas(adapter):
    return {name: update.delta() for name, update in adapter.updates.items()}


def close(one, two, tolerance=1e-5):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=tolerance * max(1.0, float(two[name].abs().max()))), name


def regauged(adapter, seed):
    """The same ΔW from other factors."""
    generator = torch.Generator().manual_seed(seed)
    turned = {}
    for name, update in adapter.updates.items():
        R = torch.eye(update.rank) + 0.3 * torch.randn(update.rank, update.rank, generator=generator)
        turned[name] = LowRank(torch.linalg.solve(R, update.A), update.B @ R, update.shape)
    return adapter.with_updates(turned, source=f"turned {adapter.label}")


# the contract of every method


@pytest.mark.parametrize("method", MERGES)
def test_inputs_stay_as_they_are_and_shapes_and_dtypes_are_kept(method, pair, tasks):
    before = [{key: tensor.clone() for key, tensor in a.tensors.items()} for a in pair]
    merged = merge(Sources(pair, tasks=tasks), method, options=FAST.get(method)).adapter
    for adapter, copies in zip(pair, before, strict=True):
        assert all(torch.equal(adapter.tensors[key], copy) for key, copy in copies.items())
    assert set(merged.updates) == set(pair[0].updates)
    for name, update in merged.updates.items():
        assert update.shape == pair[0].updates[name].shape
        assert update.A.dtype == torch.float32
        assert torch.isfinite(update.delta()).all()
    record = merged.record["merge"]
    assert record["method"] == method
    assert [entry["adapter"] for entry in record["inputs"]] == ["a0", "a1"]
    json.dumps(merged.record, allow_nan=False)


@pytest.mark.parametrize("method", [name for name in MERGES if name not in FLATTENED + SEARCHED])
def test_one_adapter_at_weight_one_is_itself(method, pair, tasks):
    merged = merge(Sources(pair[:1], tasks=tasks[:1]), method, options=LOSSLESS.get(method), exact=True)
    close(deltas(merged.adapter), deltas(pair[0]))
    assert merged.error == 0


@pytest.mark.parametrize("method", [name for name in MERGES if name not in RANDOM])
def test_the_order_of_the_adapters_does_not_matter(method, pair, tasks):
    options = FAST.get(method)
    one = merge(Sources(pair, [1.0, 0.5], tasks=tasks), method, options=options).adapter
    two = merge(Sources(pair[::-1], [0.5, 1.0], tasks=tasks[::-1]), method, options=options).adapter
    close(deltas(one), deltas(two), 1e-3 if method in SEARCHED else 1e-5)


@pytest.mark.parametrize("method", MERGES)
def test_the_same_seed_gives_the_same_answer(method, pair, tasks):
    sources = Sources(pair, tasks=tasks)
    one, two = (merge(sources, method, options=FAST.get(method)).adapter for _ in range(2))
    assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in one.tensors)
    if "seed" in MERGES[method].defaults() and method in RANDOM:
        other = merge(sources, method, options={"seed": 1}).adapter
        assert any(not torch.equal(other.tensors[key], one.tensors[key]) for key in one.tensors)


@pytest.mark.parametrize("method", MERGES)
def test_what_says_so_and_nothing_else_hangs_on_the_gauge(method, pair, tasks):
    turned = [regauged(adapter, seed) for seed, adapter in enumerate(pair)]
    options = FAST.get(method)
    one = merge(Sources(pair, tasks=tasks), method, options=options).adapter
    two = merge(Sources(turned, tasks=tasks), method, options=options).adapter
    if MERGES[method].gauge_free:
        close(deltas(one), deltas(two), 2e-3)
    else:
        moved = [float((deltas(two)[name] - delta).norm() / delta.norm()) for name, delta in deltas(one).items()]
        assert min(moved) > 0.05


@pytest.mark.parametrize("method", [name for name in MERGES if not MERGES[name].reads_data])
def test_every_merge_gives_the_same_logits_in_peft(method, base_model, tmp_path):
    base = base_model("llama").float()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    sources = []
    for seed in (0, 1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(base_model("llama").float(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        model.save_pretrained(tmp_path / f"s{seed}")
        sources.append(Adapter.load(tmp_path / f"s{seed}"))
    merged = merge(Sources(sources), method)
    save(merged, tmp_path / "merged")
    tokens = torch.arange(12).reshape(2, 6)
    wrapped = PeftModel.from_pretrained(base_model("llama").float(), tmp_path / "merged").eval()
    with torch.no_grad():
        for name, update in merged.adapter.updates.items():
            base.get_submodule(name).weight += update.delta()
        assert torch.allclose(wrapped(tokens).logits, base(tokens).logits, atol=1e-4)
        assert not torch.allclose(wrapped(tokens).logits, base_model("llama").float()(tokens).logits, atol=1e-3)


def test_pefts_cat_is_the_sum(base_model, tmp_path):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(base_model("llama").float(), config, adapter_name="one")
    model.add_adapter("two", config)
    model.save_pretrained(tmp_path)
    found = [Adapter.load(tmp_path / name) for name in ("one", "two")]
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "both", combination_type="cat")
    for method in ("cat", "task-arithmetic"):
        merged = merge(Sources(found, [1.0, 0.5]), method).adapter
        for name, update in merged.updates.items():
            layer = model.base_model.model.get_submodule(name)
            assert torch.allclose(update.delta(), layer.get_delta_weight("both"), atol=1e-6)


# inputs of every kind


def tiny(folder, name, seed=0, rows=6, columns=4, rank=2, module="net.q_proj", **config):
    return Adapter.load(
        write(folder / name, lora(module, rank=rank, rows=rows, columns=columns, seed=seed), r=rank, **config)
    )


def test_ranks_alphas_and_scalings_may_differ(tmp_path):
    a = tiny(tmp_path, "a", rank=2, lora_alpha=4)
    b = tiny(tmp_path, "b", seed=1, rank=4, lora_alpha=8, use_rslora=True)
    c = tiny(tmp_path, "c", seed=2, rank=1, lora_alpha=3, rank_pattern={"q_proj": 1}, alpha_pattern={"q_proj": 5})
    merged = merge(Sources([a, b, c], [1.0, -1.0, 0.5]), "task-arithmetic")
    parts = [u.updates["net.q_proj"].delta() for u in (a, b, c)]
    expected = parts[0] - parts[1] + 0.5 * parts[2]
    assert torch.allclose(merged.adapter.updates["net.q_proj"].delta(), expected, atol=1e-5)
    save(merged, tmp_path / "m")
    assert torch.allclose(Adapter.load(tmp_path / "m").updates["net.q_proj"].delta(), expected, atol=1e-5)
    for method in ("knots", "core-space", "ties", "tsv", "lego"):
        assert merge(Sources([a, b, c]), method).adapter.updates
    with pytest.raises(MismatchError, match=r"net\.q_proj: factors of ranks 2, 4, 1 cannot be averaged"):
        merge(Sources([a, b, c]), "factor-average")


def test_a_module_that_an_adapter_leaves_alone_counts_as_zero_and_is_reported(tmp_path):
    a, b = (
        Adapter.load(write(tmp_path / f"{own}", lora(f"net.{own}", seed=seed) | lora("net.both", seed=9)))
        for seed, own in enumerate("ab")
    )
    for method, share in (("task-arithmetic", 1.0), ("average", 0.5), ("slerp", 0.5), ("factor-average", 0.25)):
        found = merge(Sources([a, b]), method).adapter.updates
        assert torch.allclose(found["net.a"].delta(), share * a.updates["net.a"].delta(), atol=1e-6)
        assert torch.allclose(found["net.b"].delta(), share * b.updates["net.b"].delta(), atol=1e-6)
    merged = merge(Sources([a, b]))
    assert [list(names) for names in merged.absent] == [["net.b"], ["net.a"]]
    assert merged.adapter.record["merge"]["absent"] == {"a": 1, "b": 1}
    ties = merge(Sources([a, b]), "ties", options={"density": 1.0}).adapter.updates
    assert torch.allclose(ties["net.a"].delta(), a.updates["net.a"].delta(), atol=1e-6)


class Net(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict(
            {"emb": nn.Embedding(7, 5), "conv": nn.Conv2d(3, 4, 2), "conv1": nn.Conv1d(3, 4, 2), "lin": nn.Linear(5, 6)}
        )

    def forward(self, x):
        return x


def test_embeddings_and_convolutions_are_merged_in_their_own_layout(tmp_path):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["emb", "conv", "conv1", "lin"], init_lora_weights=False)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        get_peft_model(Net(), config).save_pretrained(tmp_path / f"{seed}")
        found.append(Adapter.load(tmp_path / f"{seed}"))
    for method in ("task-arithmetic", "ties", "core-space", "tsv"):
        merged = merge(Sources(found), method)
        save(merged, tmp_path / method)
        torch.manual_seed(5)
        base = Net()
        wrapped = PeftModel.from_pretrained(base, tmp_path / method)
        for name, update in merged.adapter.updates.items():
            layer = wrapped.base_model.model.get_submodule(name)
            assert torch.allclose(layer.get_delta_weight("default"), update.delta(), atol=1e-5), (method, name)
        if method == "task-arithmetic":
            sums = [deltas(adapter) for adapter in found]
            close(deltas(merged.adapter), {name: sums[0][name] + sums[1][name] for name in sums[0]})


def test_gpt2s_transposed_layers_are_merged_as_stored(base_model, tmp_path):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = get_peft_model(base_model("gpt2").float(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        model.save_pretrained(tmp_path / f"{seed}")
        found.append(Adapter.load(tmp_path / f"{seed}"))
    merged = merge(Sources(found), "ties")
    save(merged, tmp_path / "m")
    wrapped = PeftModel.from_pretrained(base_model("gpt2").float(), tmp_path / "m")
    for name, update in merged.adapter.updates.items():
        weight = wrapped.base_model.model.get_submodule(name).get_delta_weight("default")
        assert torch.allclose(weight, update.delta(), atol=1e-5)


def test_half_precision_inputs_are_computed_in_float32(tmp_path):
    a, b = (
        Adapter.load(write(tmp_path / f"{seed}", lora(seed=seed, dtype=torch.bfloat16), r=2, lora_alpha=4))
        for seed in (0, 1)
    )
    merged = merge(Sources([a, b]), "task-arithmetic").adapter
    (name,) = merged.updates
    assert torch.equal(merged.updates[name].delta(), (a.updates[name] + b.updates[name]).delta())


def test_a_file_in_bfloat16_tells_the_error_of_its_rounding(tmp_path):
    a, b = tiny(tmp_path, "a"), tiny(tmp_path, "b", seed=1)
    merged = merge(Sources([a, b]), "task-arithmetic", dtype="bfloat16")
    save(merged, tmp_path / "half.safetensors")
    found = Adapter.load(tmp_path / "half.safetensors").updates["net.q_proj"]
    exact = (a.updates["net.q_proj"] + b.updates["net.q_proj"]).delta()
    assert merged.error == pytest.approx(float((found.delta() - exact).norm() / exact.norm()), rel=1e-3)
    assert 1e-4 < merged.error < 1e-2


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties", "della", "breadcrumbs", "magnitude"])
def test_what_works_on_entries_is_cut_to_the_ranks_of_the_sources_together_unless_it_is_to_be_exact(method, tmp_path):
    found = [tiny(tmp_path, f"{s}", seed=s, rows=20, columns=16, rank=rank) for s, rank in enumerate((2, 3))]
    whole = merge(Sources(found), method, exact=True)
    exact = whole.adapter.updates["net.q_proj"].delta().double()
    assert (whole.error, whole.adapter.sites["net.q_proj"].rank) == (0, 16)
    merged = merge(Sources(found), method)
    kept = merged.adapter.updates["net.q_proj"]
    S = torch.linalg.svdvals(exact)
    assert kept.rank == 5
    assert merged.error == pytest.approx(float(S[5:].norm() / S.norm()), rel=1e-4)
    assert float((kept.delta() - exact).norm() / exact.norm()) == pytest.approx(merged.error, rel=1e-4)
    with pytest.raises(OptionError, match="a rank of 3 and exact are both asked for"):
        merge(Sources(found), method, exact=True, rank=3)


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ([torch.bfloat16, torch.bfloat16], torch.bfloat16),
        ([torch.float16, torch.float16], torch.float16),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.float64, torch.float64], torch.float32),
    ],
)
def test_the_file_is_in_the_widest_dtype_of_the_adapters(kinds, wanted, tmp_path):
    found = [
        Adapter.load(write(tmp_path / f"{seed}", lora("net.q_proj", seed=seed, dtype=kind), r=2, lora_alpha=4))
        for seed, kind in enumerate(kinds)
    ]
    merged = merge(Sources(found, [1.0, 0.3]))  # 0.3 is no number of bfloat16
    exact = sum(w * f.updates["net.q_proj"].delta().double() for w, f in zip((1.0, 0.3), found, strict=True))
    assert {tensor.dtype for tensor in merged.adapter.tensors.values()} == {wanted}
    assert merged.adapter.record["merge"]["dtype"] == str(wanted).removeprefix("torch.")
    true = float((merged.adapter.updates["net.q_proj"].delta().double() - exact).norm() / exact.norm())
    assert merged.error == (pytest.approx(true, rel=1e-3) if wanted != torch.float32 else 0)
    assert true > 1e-5 or wanted == torch.float32
    for alias, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert {t.dtype for t in merge(Sources(found), dtype=alias).adapter.tensors.values()} == {kind}


def test_a_rank_cuts_to_the_best_approximation_and_tells_the_error(tmp_path):
    found = [tiny(tmp_path, f"{s}", seed=s, rows=20, columns=16, rank=4) for s in (0, 1, 2)]
    for method in ("task-arithmetic", "ties"):
        whole = merge(Sources(found), method, exact=True).adapter.updates["net.q_proj"].delta().double()
        merged = merge(Sources(found), method, rank=3)
        kept = merged.adapter.updates["net.q_proj"]
        S = torch.linalg.svdvals(whole)
        best = float(S[3:].norm() / S.norm())
        assert kept.rank == 3
        assert float((kept.delta() - whole).norm() / whole.norm()) == pytest.approx(best, rel=1e-4)
        assert merged.error == pytest.approx(best, rel=1e-4)
        assert merged.errors["net.q_proj"] == pytest.approx(best, rel=1e-4)


def uneven(seed, dtype, names="abc"):
    """Modules of unlike shapes and sizes, entries of whole numbers, so that many tie."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for size, (name, shape) in enumerate({"a": (5, 4), "b": (3, 6), "c": (7, 2)}.items(), 1):
        if name in names:
            B = torch.randint(-2, 3, (shape[0], 2), generator=generator).to(dtype)
            made[f"net.{name}"] = LowRank(torch.randn(2, shape[1], generator=generator).round().to(dtype), size * B)
    return in_memory(made, f"u{seed}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["ties", "magnitude"])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_entries_are_trimmed_over_all_modules_together_or_in_each(method, dtype, density):
    found = [uneven(0, dtype), uneven(1, dtype, "ac"), uneven(2, dtype, "b")]
    found[2] = in_memory({**found[2].updates, "net.a": found[0].updates["net.a"]}, "u2")
    sources, weights = Sources(found, [1.0, 0.5, 2.0]), [1.0, 0.5, 2.0]
    modules, own = sources.modules, [deltas(adapter) for adapter in found]
    shapes = [sources.shapes[name] for name in modules]
    parts = [[d.get(n, torch.zeros(s, dtype=dtype)) for n, s in zip(modules, shapes, strict=True)] for d in own]
    # of the vector of all modules that an adapter changes, by a sort
    cut = []
    for adapter, pieces in zip(own, parts, strict=True):
        whole = torch.cat([p.flatten() for p in pieces]).double()
        count = max(1, round(density * sum(d.numel() for d in adapter.values())))
        order = sorted(range(len(whole)), key=lambda i, v=whole: (-abs(float(v[i])), i))
        mask = torch.zeros(len(whole), dtype=torch.bool)
        mask[order[:count]] = True
        cut.append((whole * mask).split([p.numel() for p in pieces]))
    together = merge(sources, method, options={"density": density}).adapter.updates
    apart = merge(sources, method, options={"density": density, "scope": "module"}).adapter.updates
    for m, (name, shape) in enumerate(zip(modules, shapes, strict=True)):
        wanted = RULES[method]([pieces[m].reshape(shape) for pieces in cut], weights, density=1.0)
        torch.testing.assert_close(together[name].delta().double(), wanted, rtol=1e-6, atol=1e-6)
        alone = RULES[method]([pieces[m] for pieces in parts], weights, density=density)
        torch.testing.assert_close(apart[name].delta().double(), alone.double(), rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(together[name].delta(), apart[name].delta()) for name in modules)


@pytest.mark.parametrize("bases", [{}, {"bases": "factors"}])
@pytest.mark.parametrize("method", ["knots", "core-space"])
def test_inside_of_shared_bases_entries_are_trimmed_over_all_modules_together_too(method, bases):
    if method == "knots" and bases:
        pytest.skip("knots has one kind of bases")
    found = [uneven(seed, torch.float64) for seed in range(2)]
    sources = Sources(found)
    space = {"knots": subspaces.knots, "core-space": subspaces.core_space}[method]
    spaces = {name: space(sources.updates_of(name), **bases) for name in sources.modules}
    whole = [torch.cat([spaces[name].cores[i].flatten() for name in sources.modules]) for i in range(2)]
    merged = RULES["ties"](whole, [1.0, 1.0], density=0.2, scope="module")
    made = merge(sources, method, options={"density": 0.2, **bases}).adapter.updates
    parts = merged.split([spaces[name].cores[0].numel() for name in sources.modules])
    for name, part in zip(sources.modules, parts, strict=True):
        wanted = spaces[name].back(part.reshape(spaces[name].cores[0].shape)).delta()
        torch.testing.assert_close(made[name].delta().double(), wanted, rtol=1e-5, atol=1e-5)


def test_every_method_says_which_published_variant_it_is():
    for name in MERGES:
        assert 8 < len(MERGES[name].variant) < 120, name


def test_dora_needs_its_base_and_then_is_exact(base_model, tmp_path):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], use_dora=True)
    torch.manual_seed(0)
    model = get_peft_model(base_model("llama").float(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "dora")
    dora = Adapter.load(tmp_path / "dora")
    with pytest.raises(TunerError, match=r"dora: DoRA .*no base model was given"):
        Sources([dora])
    merged = merge(Sources([dora, dora], [0.5, 0.5], base=lambda: base_model("llama")), "task-arithmetic").adapter
    before = {name: base_model("llama").get_submodule(name).weight.float() for name in merged.updates}
    whole = model.merge_and_unload()
    for name, update in merged.updates.items():
        assert torch.allclose(update.delta(), whole.get_submodule(name).weight - before[name], atol=1e-5)


# weights


def test_weights_by_pattern_and_by_layer(tmp_path):
    names = [f"net.layers.{i}.q_proj" for i in range(3)]
    tensors = [{k: t for i, n in enumerate(names) for k, t in lora(n, seed=10 * s + i).items()} for s in (0, 1)]
    a, b = (Adapter.load(write(tmp_path / f"{s}", each, r=2, lora_alpha=4)) for s, each in enumerate(tensors))
    sources = Sources([a, b], Weights((1.0, 1.0), layers=({0: 1, 2: 0}, {0: 0, 2: 1})))
    merged = merge(sources, "task-arithmetic").adapter
    for i, (x, y) in enumerate([(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]):
        expected = x * a.updates[names[i]].delta() + y * b.updates[names[i]].delta()
        assert torch.allclose(merged.updates[names[i]].delta(), expected, atol=1e-6)
    assert merged.record["merge"]["weights"] == ["0:1,2:0", "0:0,2:1"]
    weights = Weights((1.0, 1.0), {r"layers\.1\.": (2.0, 0.0)})
    merged = merge(Sources([a, b], weights), "task-arithmetic").adapter
    assert torch.allclose(merged.updates[names[1]].delta(), 2 * a.updates[names[1]].delta(), atol=1e-6)
    assert torch.allclose(
        merged.updates[names[0]].delta(), (a.updates[names[0]] + b.updates[names[0]]).delta(), atol=1e-6
    )
    with pytest.raises(OptionError, match="matches no module"):
        Sources([a, b], Weights((1.0, 1.0), {"layers.9": (1.0, 1.0)}))


# heads


def headed(folder, name, labels, seed):
    tensors = lora("net.q_proj", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors["base_model.model.classifier.weight"] = torch.randn(labels, 4, generator=generator)
    return Adapter.load(write(folder / name, tensors, r=2, lora_alpha=4, modules_to_save=["classifier"]))


def test_heads_that_differ_are_never_dropped_in_silence(tmp_path):
    a, b, c = headed(tmp_path, "a", 2, 0), headed(tmp_path, "b", 3, 1), headed(tmp_path, "c", 2, 2)
    with pytest.raises(MismatchError, match=r"classifier\.weight differs: it is \(2, 4\) in .*a and \(3, 4\) in .*b"):
        merge(Sources([a, b]))
    with pytest.raises(MismatchError, match=r"classifier\.weight \(2, 4\) differs .*`heads` keep-own"):
        merge(Sources([a, c]))
    with pytest.raises(MismatchError, match=r"classifier\.weight cannot be averaged"):
        merge(Sources([a, b]), heads="average")
    with pytest.raises(OptionError, match="did you mean 'average'"):
        merge(Sources([a, c]), heads="averaged")
    key = "base_model.model.classifier.weight"
    assert torch.equal(merge(Sources([a, a])).adapter.tensors[key], a.tensors[key])
    assert torch.equal(merge(Sources([a, b]), heads="first").adapter.tensors[key], a.tensors[key])
    mean = merge(Sources([a, c]), heads="average").adapter.tensors[key]
    assert torch.allclose(mean, (a.tensors[key] + c.tensors[key]) / 2)
    apart = merge(Sources([a, b]), heads="keep-own")
    assert key not in apart.adapter.tensors
    assert not apart.adapter.config["modules_to_save"]
    save(apart, tmp_path / "m")
    from safetensors.torch import load_file

    for name, adapter in (("a", a), ("b", b)):
        assert torch.equal(load_file(tmp_path / "m" / "heads" / f"{name}.safetensors")[key], adapter.tensors[key])
    with pytest.raises(OptionError, match="a folder is needed"):
        save(apart, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


# refusals, and the file


def test_adapters_that_do_not_fit_together_are_refused_by_name(tmp_path):
    a = tiny(tmp_path, "a", base_model_name_or_path="one")
    b = tiny(tmp_path, "b", base_model_name_or_path="two")
    with pytest.warns(LoraLabWarning, match=r"a and .*b name different base models, 'one' and 'two'"):
        Sources([a, b])
    wide = tiny(tmp_path, "wide", columns=5)
    with pytest.raises(MismatchError, match=r"a and .*wide: net\.q_proj is \(6, 4\) and \(6, 5\)"):
        Sources([a, wide])
    with pytest.raises(OptionError, match="no adapter"):
        Sources([])
    with pytest.raises(OptionError, match=r"their tasks|own tasks"):
        merge(Sources([a, a]), "fisher")


def test_methods_and_options_that_do_not_exist_are_refused():
    with pytest.raises(OptionError, match="did you mean 'ties'"):
        check("tise", {})
    with pytest.raises(OptionError, match=r"unknown option of ties 'denstiy' \(did you mean 'density'\?\)"):
        check("ties", {"denstiy": 0.2})
    with pytest.raises(OptionError, match="cat has no options"):
        check("cat", {"scale": 1.0})
    with pytest.raises(OptionError, match="unknown inner rule"):
        check("knots", {"inner": "tise"})
    assert check("knots", {"inner": "dare", "seed": 3}) == {"inner": "dare", "seed": 3}
    with pytest.raises(OptionError, match="unknown option of knots 'seed'"):
        check("knots", {"seed": 3})  # ties, the default inside, draws nothing


def test_every_method_says_in_its_first_line_what_comes_out():
    for name, entry in MERGES.items():
        assert 10 < len(entry.about) < 90, name


def test_options_out_of_range_are_refused(tmp_path):
    a = tiny(tmp_path, "a")
    for options, text in (({"rank": 0}, "rank is 0; it must be at least 1"), ({"dtype": "int8"}, "unknown dtype")):
        with pytest.raises(OptionError, match=text):
            merge(Sources([a]), **options)


def test_factors_whose_product_float32_cannot_hold_are_refused_with_their_source(tmp_path):
    a, big = tiny(tmp_path, "a"), tiny(tmp_path, "big")
    huge = replace(big, tensors={k: t * 1e25 for k, t in big.tensors.items()})
    with pytest.raises(MismatchError, match=r"big: ΔW of net\.q_proj is not finite"):
        merge(Sources([a, huge]))


@pytest.mark.parametrize("method", [name for name in MERGES if not MERGES[name].reads_data])
def test_a_merge_that_float32_cannot_hold_is_refused_with_its_module(tmp_path, method):
    found = [tiny(tmp_path, f"{seed}", seed=seed) for seed in (0, 1)]
    with pytest.raises(MismatchError, match=r"net\.q_proj.* is not finite"):
        merge(Sources(found), method, coefficient=3e38)
    if method not in ("average", "factor-average", "procrustes-mean", "slerp"):  # which divide by the weights
        with pytest.raises(MismatchError, match=r"net\.q_proj.* is not finite"):
            merge(Sources(found, [1e38, -1e38]), method)


def test_the_card_and_the_header_say_how_it_was_made(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    found = [tiny(tmp_path, "a"), tiny(tmp_path, "b", seed=1)]
    merged = merge(Sources(found, [1.0, 0.5]), "ties", options={"density": 0.4}, coefficient=0.5)
    save(merged, tmp_path / "m", inputs=folders)
    text = (tmp_path / "m" / "README.md").read_text()
    for words in ("A merge by ties", "density = 0.4", "1, 0.5", "| coefficient | 0.5 |", "sha256", "* a", "peft"):
        assert words in text
    record = Adapter.load(tmp_path / "m").record["merge"]
    assert record["options"] == {"density": 0.4, "scope": "global", "scale": 1.0}
    assert record["weights"] == [1.0, 0.5]
    assert len({entry["sha256"] for entry in record["inputs"]}) == 2
    assert record["versions"]["torch"]


def test_a_file_that_does_not_hold_what_was_meant_is_not_kept(tmp_path, monkeypatch):
    merged = merge(Sources([tiny(tmp_path, "a")]))
    true = Adapter.save

    def wrong(self, path, **options):
        return true(replace(self, tensors={k: t * 1.001 for k, t in self.tensors.items()}), path, **options)

    monkeypatch.setattr(Adapter, "save", wrong)
    with pytest.raises(FileError, match=r"does not give the ΔW of net\.q_proj"):
        save(merged, tmp_path / "m")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_an_existing_output_is_replaced_only_with_force(tmp_path):
    merged = merge(Sources([tiny(tmp_path, "a")]))
    save(merged, tmp_path / "m")
    with pytest.raises(FileError, match="exists already"):
        save(merged, tmp_path / "m")
    save(merged, tmp_path / "m", force=True)


def test_what_all_sources_agree_on_stays_in_the_record(pair, tasks):
    merged = merge(Sources(pair)).adapter
    assert merged.record["method"] == "lora"
    assert "task" not in merged.record
    same = merge(Sources([pair[0], pair[0]], [0.5, 0.5])).adapter
    assert same.record["task"] == tasks[0].record
    assert score(tasks[0], same).mean_loss == pytest.approx(score(tasks[0], pair[0]).mean_loss, abs=1e-5)


def test_random_methods_thin_modules_of_one_shape_differently(tmp_path):
    tensors = {
        **lora("net.q_proj", seed=0),
        **{k.replace("q_proj", "v_proj"): t for k, t in lora("net.q_proj", seed=0).items()},
    }
    one = Adapter.load(write(tmp_path / "a", tensors, r=2, lora_alpha=4))
    merged = merge(Sources([one]), "dare", exact=True).adapter.updates
    assert not torch.equal(merged["net.q_proj"].delta() != 0, merged["net.v_proj"].delta() != 0)


def test_adamerging_sees_every_source_under_its_own_head(tmp_path):
    config = LoraConfig(**CONFIG, modules_to_save=["classifier"])
    task = Few("identity")
    found = [random_adapter(task, tmp_path / f"{s}", config, seed=s, scale=0.1) for s in (0, 1)]

    class Copy(Few):
        record = {"name": "another, so that no model is shared"}  # noqa: RUF012

    shared = merge(Sources(found, tasks=[task, task]), "adamerging", options={"steps": 3}, heads="keep-own")
    apart = merge(Sources(found, tasks=[task, Copy("identity")]), "adamerging", options={"steps": 3}, heads="keep-own")
    close(deltas(shared.adapter), deltas(apart.adapter))


def test_progress_counts_modules(pair):
    told = []
    merge(Sources(pair), "ties", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(pair[0].sites), len(pair[0].sites))


def test_a_merge_prints_in_one_line_without_its_tensors(pair, tasks):
    made = merge(Sources(pair), "average", heads="first")
    assert "\n" not in repr(made)
    assert len(repr(made)) < 600
    assert f"errors=<{len(made.errors)} entries>" in repr(made)
    assert repr(subspaces.Subspace([torch.zeros(2, 3)], abs)).startswith("Subspace(cores=<1 entry>, back=")
    assert repr(Split({"labels": torch.zeros(2)})).startswith("Split(2 examples")
