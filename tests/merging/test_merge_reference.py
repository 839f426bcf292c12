"""PEFT is the judge of merges: of what the sources mean, and of what the merged file means, in float64."""

import functools

import peft
import pytest
import torch
from making_adapters import PREFIX
from peft_models import LORA, Layers, assert_same, logits, quiet_embeddings, randomised
from tiny_models import SHAPES, Net, Tiny, adapter, updates
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import MismatchError, TunerError
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES
from lora_lab.merging.sources import Sources
from lora_lab.merging.writing.export import save

# A second adapter for each base: another rank and scale, and modules that the first one leaves alone or has alone.
OTHER = {
    "bert": {"r": 2, "lora_alpha": 7, "target_modules": ["key", "value"], "task_type": "SEQ_CLS"},
    "gpt2": {
        "r": 3,
        "lora_alpha": 2,
        "target_modules": ["c_attn", "c_fc"],
        "use_rslora": True,
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
    },
    "llama": {
        "r": 1,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "o_proj", "embed_tokens"],
        "rank_pattern": {r"model\.layers\.\d\.self_attn\.q_proj": 2},
        "alpha_pattern": {"o_proj": 3},
        "use_rslora": True,
        "task_type": "CAUSAL_LM",
    },
}
WITHOUT_DATA = [name for name in MERGES if not MERGES[name].reads_data]
ONE_RANK = ("factor-average", "robustmerge")
WEIGHTS = [1.0, -0.5]


@pytest.fixture
def pair(base_model, tmp_path):
    """Name of a base → two adapters that PEFT wrote for it, and PEFT's own ΔW of each."""

    def make(name: str):
        adapters, deltas = [], []
        for seed, config in enumerate((LORA[name], OTHER[name])):
            model = randomised(peft.get_peft_model(base_model(name), peft.LoraConfig(**config)), seed)
            with quiet_embeddings():
                model.save_pretrained(tmp_path / "ab"[seed])
            adapters.append(Adapter.load(tmp_path / "ab"[seed]))
            deltas.append(pefts_deltas(model))
        return adapters, deltas

    return make


def pefts_deltas(model: nn.Module) -> dict[str, Tensor]:
    return {
        key.removeprefix(PREFIX): layer.get_delta_weight("default").detach()
        for key, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def weighted(deltas: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """Σ wᵢ ΔWᵢ, 0 where one has none."""
    found: dict[str, Tensor] = {}
    for each, weight in zip(deltas, weights, strict=True):
        for name, delta in each.items():
            found[name] = found.get(name, torch.zeros_like(delta)) + weight * delta
    return found


def with_deltas(base: nn.Module, deltas: dict[str, Tensor], whole: dict[str, Tensor] | None = None) -> nn.Module:
    """The base with ΔW added to its weights, and with these whole tensors in their place."""
    with torch.no_grad():
        for name, delta in deltas.items():
            base.get_submodule(name).weight += delta
        for key, tensor in (whole or {}).items():
            base.get_parameter(key.removeprefix(PREFIX)).copy_(tensor)
    return base


def wide(made: Adapter) -> dict[str, Tensor]:
    return {name: (u.B.double() @ u.A.double()).reshape(u.shape) for name, u in made.updates.items()}


def whole(made: Adapter) -> dict[str, Tensor]:
    return {key: made.tensors[key] for key in made.others if ".base_layer." not in key}


def heads_of(name: str) -> str | None:
    return "average" if name == "bert" else None


@pytest.mark.parametrize("method", ["task-arithmetic", "cat"])
@pytest.mark.parametrize("name", LORA)
def test_a_sum_of_unlike_adapters_is_the_sum_of_pefts_own_deltas(pair, base_model, tmp_path, name, method):
    adapters, deltas = pair(name)
    merged = merge(Sources(adapters, WEIGHTS), method, heads=heads_of(name))
    wanted = weighted(deltas, WEIGHTS)
    assert set(merged.adapter.updates) == set(wanted)
    for module, delta in wanted.items():  # the file is in float32
        torch.testing.assert_close(wide(merged.adapter)[module], delta, rtol=0, atol=3e-7)
    assert all(merged.absent)
    assert merged.error == 0
    loaded = peft.PeftModel.from_pretrained(base_model(name), save(merged, tmp_path / "merged")).eval()
    dense = logits(with_deltas(base_model(name), wanted, whole(merged.adapter)))
    assert float((dense - logits(base_model(name))).abs().max()) > 0.01
    torch.testing.assert_close(logits(loaded), dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("gpt2", method) for method in WITHOUT_DATA if method not in ONE_RANK),  # their ranks differ
        *(("llama", method) for method in ("slerp", "ties", "core-space", "lego", "tsv")),
        *(("bert", method) for method in ("average", "dare", "knots")),
    ],
)
def test_peft_gives_the_logits_of_the_dense_merge_for_every_method(pair, base_model, tmp_path, name, method):
    adapters, _ = pair(name)
    merged = merge(Sources(adapters), method, heads=heads_of(name))
    loaded = peft.PeftModel.from_pretrained(base_model(name), save(merged, tmp_path / "merged")).eval()
    wanted = logits(with_deltas(base_model(name), wide(merged.adapter), whole(merged.adapter)))
    assert_same(logits(loaded), wanted)


@pytest.mark.parametrize(
    "method",
    [
        *("task-arithmetic", "slerp", "ties", "della", "knots", "tsv", "iso-c", "lego"),
        *("ctm", "pico", "procrustes-mean", "robustmerge", "wudi"),
    ],
)
def test_every_kind_of_layer_means_the_same_in_peft(tmp_path, method):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Layers().double()

    adapters, deltas = [], []
    targets = ["embedding", "conv1", "conv2", "point", "linear"]  # PEFT's own ΔW of a Conv3d 1 × 1 × 1 is broken
    for seed, (rank, names) in enumerate([(3, targets), (2, targets[:-1])]):
        config = peft.LoraConfig(r=rank, lora_alpha=4, target_modules=names)
        model = randomised(peft.get_peft_model(make(), config), seed)
        model.save_pretrained(tmp_path / str(seed))
        adapters.append(Adapter.load(tmp_path / str(seed)))
        deltas.append(pefts_deltas(model))
    weights = None if method in ("slerp", "procrustes-mean") else WEIGHTS
    options = {"factors": "aligned"} if method == "robustmerge" else {}
    merged = merge(Sources(adapters, weights), method, options=options)
    assert {name: u.shape for name, u in merged.adapter.updates.items()} == {
        name: tuple(delta.shape) for name, delta in deltas[0].items()
    }
    if method == "task-arithmetic":
        for name, delta in weighted(deltas, WEIGHTS).items():
            torch.testing.assert_close(wide(merged.adapter)[name], delta, rtol=0, atol=3e-7)
    loaded = peft.PeftModel.from_pretrained(make(), save(merged, tmp_path / "merged")).eval()
    ids = torch.arange(14).reshape(2, 7) % 7
    assert_same(loaded(ids).detach(), with_deltas(make(), wide(merged.adapter))(ids).detach())


@pytest.mark.parametrize("method", [name for name in MERGES if MERGES[name].reads_data])
def test_merges_that_look_at_data_mean_the_same_in_peft(tmp_path, method):
    steps = {key: {"steps": 2} for key in ("adamerging", "nsc", "ziplora", "cat-learned")}
    options = {"lorahub": {"evaluations": 5}, **steps}.get(method)
    tasks = [Tiny(0), Tiny(1)]
    merged = merge(Sources([adapter(updates(i), f"a{i}") for i in range(2)], tasks=tasks), method, options=options)
    base, x = tasks[0].build_model().double(), torch.randn(5, 6, dtype=torch.float64)
    wanted = with_deltas(tasks[0].build_model().double(), wide(merged.adapter))(x).logits
    loaded = peft.PeftModel.from_pretrained(base, save(merged, tmp_path / "merged")).eval()
    assert_same(loaded(x).logits, wanted)


def test_pefts_cat_is_the_sum_where_it_can_be_trusted(base_model):
    config = functools.partial(peft.LoraConfig, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base_model("llama"), config(r=2, lora_alpha=3), adapter_name="one")
    model.add_adapter("two", config(r=4, lora_alpha=4))
    adapters = []
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        randomised(model, seed)
        tensors = peft.get_peft_model_state_dict(model, adapter_name=name)
        adapters.append(made_of(tensors, model.peft_config[name], name))
    model.add_weighted_adapter(["one", "two"], [0.7, 1.3], "both", combination_type="cat")
    for method in ("cat", "task-arithmetic"):
        merged = merge(Sources(adapters, [0.7, 1.3]), method).adapter
        for name, delta in wide(merged).items():
            layer = model.base_model.model.get_submodule(name)
            torch.testing.assert_close(delta, layer.get_delta_weight("both").detach(), rtol=0, atol=1e-6)
            assert merged.updates[name].rank == 6


def made_of(tensors, config, source) -> Adapter:
    from lora_lab.adapters.formats.peft.peft_format import parse

    settings = {"peft_type": "LORA", "r": config.r, "lora_alpha": config.lora_alpha}
    parsed = parse(tensors, settings, source)
    return Adapter(parsed.tensors, settings, parsed.sites, {}, source)


# ΔW that needs the base


OTHER_TUNERS = {
    "dora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_dora=True),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "v_proj"]),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "v_proj"]),
    "hira": peft.HiraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("name", OTHER_TUNERS)
def test_an_adapter_without_a_plain_delta_is_merged_against_its_base(base_model, tmp_path, name):
    """Without the base as well, where ΔW follows from its tensors (LoHa, LoKr); all others are refused then."""
    plain = randomised(
        peft.get_peft_model(base_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])), seed=5
    )
    plain.save_pretrained(tmp_path / "plain")
    model = randomised(peft.get_peft_model(base_model("llama"), OTHER_TUNERS[name]), seed=1)
    model.save_pretrained(tmp_path / name)
    adapters = [Adapter.load(tmp_path / "plain"), Adapter.load(tmp_path / name)]
    merged = [merge(Sources(adapters, [1.0, 2.0], base=lambda: base_model("llama")))]
    if name in ("loha", "lokr"):
        merged.append(merge(Sources(adapters, [1.0, 2.0])))
    else:
        with pytest.raises(TunerError, match=rf"{name}: .*; no base model was given"):
            Sources(adapters)
    base, whole_model = base_model("llama"), model.merge_and_unload()
    changed = {
        module: whole_model.get_submodule(module).weight - base.get_submodule(module).weight
        for module in adapters[1].sites
    }
    wanted = weighted([pefts_deltas(plain), changed], [1.0, 2.0])
    for one in merged:
        assert set(one.adapter.updates) == set(wanted)
        for module, delta in wanted.items():  # the base was in float32
            torch.testing.assert_close(wide(one.adapter)[module], delta.detach(), rtol=0, atol=5e-6)
    assert merged[-1].adapter.config["peft_type"] == "LORA"
    loaded = peft.PeftModel.from_pretrained(base_model("llama"), save(merged[-1], tmp_path / "merged")).eval()
    assert_same(logits(loaded), logits(with_deltas(base_model("llama"), wide(merged[-1].adapter))))


def test_a_base_of_another_shape_is_refused(base_model, tmp_path):
    model = peft.get_peft_model(base_model("llama"), OTHER_TUNERS["dora"])
    randomised(model).save_pretrained(tmp_path / "dora")
    with pytest.raises(MismatchError, match=r"dora: the model has no module model\.layers\.0"):
        Sources([Adapter.load(tmp_path / "dora")], base=lambda: base_model("gpt2"))


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")
def test_a_bias_that_an_adapter_adds_is_never_dropped_in_silence(base_model, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], lora_bias=True)
    randomised(peft.get_peft_model(base_model("bert"), config)).save_pretrained(tmp_path / "biased")
    with pytest.raises(TunerError, match="lora_bias"):
        merge(Sources([Adapter.load(tmp_path / "biased")], base=lambda: base_model("bert")))


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape", "ignore:`lora_bias=True` was passed")
def test_a_bias_without_a_place_is_refused_too(base_model, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    randomised(peft.get_peft_model(base_model("llama"), config)).save_pretrained(tmp_path / "biased")
    with pytest.raises(TunerError, match="lora_bias"):
        merge(Sources([Adapter.load(tmp_path / "biased")], base=lambda: base_model("llama")))


# heads


@pytest.fixture
def classifiers(base_model, tmp_path):
    """Two sequence classifiers with heads of their own, as PEFT writes them."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    for seed in range(2):
        model = peft.get_peft_model(base_model("bert"), peft.LoraConfig(**config))
        randomised(model, seed).save_pretrained(tmp_path / f"a{seed}")
    return [Adapter.load(tmp_path / f"a{seed}") for seed in range(2)]


@pytest.mark.parametrize("heads", ["average", "first"])
def test_heads_in_the_file_are_those_that_peft_uses(classifiers, base_model, tmp_path, heads):
    merged = merge(Sources(classifiers), heads=heads)
    shares = [0.5, 0.5] if heads == "average" else [1.0, 0.0]
    wanted = {
        key: sum(share * a.tensors[key] for share, a in zip(shares, classifiers, strict=True))
        for key in classifiers[0].others
    }
    assert whole(merged.adapter).keys() == wanted.keys()
    loaded = peft.PeftModel.from_pretrained(base_model("bert"), save(merged, tmp_path / "merged")).eval()
    assert_same(logits(loaded), logits(with_deltas(base_model("bert"), wide(merged.adapter), wanted)))


def test_an_adapter_whose_heads_are_kept_apart_is_loaded_by_peft(classifiers, base_model, tmp_path):
    merged = merge(Sources(classifiers), heads="keep-own")
    loaded = peft.PeftModel.from_pretrained(base_model("bert"), save(merged, tmp_path / "merged")).eval()
    assert_same(logits(loaded), logits(with_deltas(base_model("bert"), wide(merged.adapter))))


def test_the_tiny_net_is_what_its_adapters_are_made_for():
    model = Net()
    assert {name: tuple(model.get_submodule(name).weight.shape) for name in SHAPES} == SHAPES
