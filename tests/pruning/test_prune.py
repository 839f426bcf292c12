"""Pruned adapters are what the closed forms say, and PEFT reads them back as nothing else."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making_adapters import PREFIX, lora, write
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank
from lora_lab.adapters.models.attached import layers
from lora_lab.errors import AdapterError, OptionError, TunerError
from lora_lab.pruning.entries import CRITERIA, Criterion, nth_smallest, prune_weights
from lora_lab.pruning.modules import keep_modules, structured
from lora_lab.pruning.ranks import RANK_ORDERS, RankOrder, _enough, keep_ranks, prune_rank

ORDERS = [name for name in RANK_ORDERS if not RANK_ORDERS[name].random]

CASES = Path(__file__).parents[1] / "cases"
Q, K, V = "layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj"
LLAMA = "model.layers.{}.self_attn.{}_proj"


def case(name: str) -> tuple[Adapter, dict, dict[str, Tensor], dict]:
    """Adapter, what is expected of it, its ΔW, and the configuration of the reference."""
    folder = CASES / name
    return (
        Adapter.load(folder / "adapter"),
        json.loads((folder / "expected.json").read_text()),
        load_file(folder / "expected_delta.safetensors"),
        json.loads((folder / "reference_export" / "adapter_config.json").read_text()),
    )


def made(
    tmp_path: Path, *names: str, dtype: torch.dtype = torch.float64, extra: dict | None = None, **config
) -> Adapter:
    """An adapter on these modules, at rank 4 and scale 2."""
    tensors = {k: t for i, name in enumerate(names) for k, t in lora(name, rank=4, rows=8, columns=6, seed=i).items()}
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()} | (extra or {})
    return Adapter.load(
        write(tmp_path / "in", tensors, **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], **config})
    )


def reloaded(adapter: Adapter, tmp_path: Path) -> Adapter:
    return Adapter.load(adapter.save(tmp_path / "out"))


def assert_deltas(adapter: Adapter, wanted: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert set(adapter.updates) == set(wanted)
    for name, update in adapter.updates.items():
        torch.testing.assert_close(update.delta(), wanted[name], rtol=rtol, atol=1e-6)


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {name: update.delta() for name, update in adapter.updates.items()}


def differences(adapter: Adapter, other: Adapter) -> float:
    """‖ΔW − ΔW'‖ over all modules of either, from dense matrices."""
    a, b = deltas(adapter), deltas(other)
    return math.sqrt(sum(float((a[n] - b.get(n, 0 * a[n])).square().sum()) for n in a))


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(2, 12)).logits


# the cases


def test_p01_the_largest_units_are_kept_at_the_scale_that_they_had(tmp_path):
    adapter, expected, wanted, reference = case("P01_rank_prune_keeps_scaling")
    pruned = prune_rank(adapter, rank=4, by="units")
    assert (pruned.adapter.config["r"], pruned.adapter.config["lora_alpha"]) == (4, 8)
    for key in ("target_modules", "rank_pattern", "alpha_pattern", "use_rslora"):
        assert pruned.adapter.config[key] == reference[key]
    assert_deltas(reloaded(pruned.adapter, tmp_path), wanted)
    by_index = keep_ranks(adapter, dict.fromkeys(adapter.sites, expected["kept_units"]))
    exported = load_file(CASES / "P01_rank_prune_keeps_scaling/reference_export/adapter_model.safetensors")
    for export in (pruned.adapter, by_index):
        assert {site.scale for site in export.sites.values()} == {2}
        assert export.total_norm == pytest.approx(expected["total_delta_fro"], rel=1e-5)
        assert set(export.tensors) == set(exported)
        for key, tensor in exported.items():  # in whatever order the units are
            dim = 0 if ".lora_A" in key else 1
            assert sorted(map(torch.Tensor.tolist, export.tensors[key].unbind(dim))) == sorted(
                map(torch.Tensor.tolist, tensor.unbind(dim))
            )


def test_p02_uneven_ranks_carry_anchored_patterns(tmp_path):
    adapter, expected, wanted, _ = case("P02_uneven_ranks_export")
    pruned = keep_ranks(adapter, expected["kept_units"])
    again = reloaded(pruned, tmp_path)
    assert_deltas(again, wanted)
    for name, said in expected["modules"].items():
        assert (again.sites[name].rank, again.sites[name].scale) == (said["rank"], said["scaling"])
    assert all(key.startswith("^model\\.layers\\.") for key in pruned.config["rank_pattern"])
    for patterns in ("rank_pattern", "alpha_pattern"):
        assert len(pruned.config[patterns]) == 3  # the commonest value is r or lora_alpha itself
    exported = load_file(CASES / "P02_uneven_ranks_export/reference_export/adapter_model.safetensors")
    assert all(torch.equal(pruned.tensors[key], tensor) for key, tensor in exported.items())


def test_p03_a_removed_module_is_not_made_again_in_peft(tmp_path):
    from transformers import AutoModelForCausalLM

    adapter, _, wanted, reference = case("P03_module_removed")
    pruned = keep_modules(adapter, list(wanted))
    assert pruned.config["target_modules"] == reference["target_modules"]
    for key, value in reference.items():
        assert pruned.config.get(key) == value, key
    exported = load_file(CASES / "P03_module_removed/reference_export/adapter_model.safetensors")
    assert set(exported) == set(pruned.tensors)
    assert all(torch.equal(pruned.tensors[key], tensor) for key, tensor in exported.items())
    assert_deltas(reloaded(pruned, tmp_path), wanted)
    base = AutoModelForCausalLM.from_pretrained(CASES / "_bases/llama_tiny")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")  # which warns of missing keys, an error here
    assert set(layers(model)) == set(wanted)


def test_p03_the_bad_export_is_what_peft_warns_of():
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(CASES / "_bases/llama_tiny")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(base, CASES / "P03_module_removed/bad_export")


# whole modules


def test_names_become_a_pattern_where_a_list_would_reach_another_module(tmp_path):
    adapter = made(tmp_path, Q, f"vision.{Q}", V)
    assert keep_modules(adapter, [Q, V]).config["target_modules"] == f"^({Q}|{V})$".replace(".", "\\.")
    assert keep_modules(adapter, [f"vision.{Q}", V]).config["target_modules"] == [V, f"vision.{Q}"]


def test_settings_by_ending_become_settings_of_each_kept_module(tmp_path):
    adapter = made(
        tmp_path,
        Q,
        K,
        V,
        r=3,
        rank_pattern={".*_proj": 4},
        alpha_pattern={"layers.0.q_proj": 3, "k_proj": 5, "layers.1.*": 8},
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        exclude_modules=["v_proj"],
    )
    pruned = keep_modules(adapter, [Q, V])
    assert pruned.config["rank_pattern"] == {r"^layers\.0\.q_proj": 4, r"^layers\.1\.q_proj": 4}
    assert pruned.config["alpha_pattern"] == {r"^layers\.0\.q_proj": 3}
    assert not {"layers_to_transform", "layers_pattern", "exclude_modules"} & set(pruned.config)
    assert {n: s.scale for n, s in reloaded(pruned, tmp_path).sites.items()} == {Q: 3 / 4, V: 2}


def test_heads_and_dtypes_stay_bit_for_bit_and_the_input_is_untouched(tmp_path):
    head = {f"{PREFIX}score.weight": torch.arange(6.0), f"{PREFIX}steps": torch.tensor(3)}
    adapter = made(tmp_path, Q, K, dtype=torch.bfloat16, extra=head)
    config, keys, copies = dict(adapter.config), list(adapter.tensors), [t.clone() for t in adapter.tensors.values()]
    prune_weights(adapter, sparsity=0.6)
    prune_weights(adapter, sparsity=0.6, by="delta-magnitude")
    prune_rank(adapter, rank=1)
    pruned = keep_modules(adapter, [K])
    assert set(pruned.tensors) == {key for key in keys if "q_proj" not in key}
    assert all(pruned.tensors[key] is adapter.tensors[key] for key in pruned.tensors)
    assert set(pruned.sites) == {K}
    assert pruned.source == "pruned in"
    assert keep_modules(adapter, [K], source="only keys").source == "only keys"
    assert (config, keys) == (adapter.config, list(adapter.tensors))
    assert all(torch.equal(a, b) for a, b in zip(copies, adapter.tensors.values(), strict=True))


def test_all_modules_kept_leave_the_configuration_alone(tmp_path):
    adapter = made(tmp_path, Q, K, target_parameters=["experts.w"])
    assert keep_modules(adapter, [K, Q]).config == adapter.config


TUNERS = {
    "lora": peft.LoraConfig(r=2, use_rslora=True, rank_pattern={"v_proj": 3}, target_modules=["q_proj", "v_proj"]),
    "dora": peft.LoraConfig(r=2, use_dora=True, alpha_pattern={"0.self_attn.v_proj": 3}, target_modules="all-linear"),
    "layers": peft.LoraConfig(r=2, layers_to_transform=[1], target_modules=["q_proj", "k_proj", "v_proj"]),
    "loha": peft.LoHaConfig(
        r=2,
        alpha=3,
        rank_pattern={"v_proj": 3},
        alpha_pattern={"1.self_attn.v_proj": 7},
        target_modules=["q_proj", "v_proj"],
    ),
    "lokr": peft.LoKrConfig(r=2, alpha=3, alpha_pattern={"v_proj": 7}, target_modules=["q_proj", "v_proj"]),
    "hira": peft.HiraConfig(r=2, rank_pattern={"v_proj": 3}, target_modules=["q_proj", "v_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "fourier": peft.FourierFTConfig(
        n_frequency=9, n_frequency_pattern={"v_proj": 5}, target_modules=["q_proj", "v_proj"]
    ),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj", "up_proj"], feedforward_modules=["down_proj"]),
    "ia3-pattern": peft.IA3Config(target_modules=r".*(k|down)_proj", feedforward_modules=r".*down_proj"),
}


@pytest.mark.parametrize("keep", ["odd", "even", "one"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_modules_removed_are_modules_switched_off_for_every_tuner(base_model, tmp_path, tuner, keep):
    torch.manual_seed(0)
    model = randomised(peft.get_peft_model(base_model("llama"), TUNERS[tuner]))
    model.save_pretrained(tmp_path / "peft")
    whole = logits(model)
    adapter = Adapter.load(tmp_path / "peft")
    kept = {"odd": list(adapter.sites)[1::2], "even": list(adapter.sites)[::2], "one": list(adapter.sites)[-1:]}[keep]
    for name, layer in layers(model).items():
        layer._disable_adapters = name not in kept
    wanted = logits(model)
    assert float((wanted - whole).abs().max()) > 1e-6
    again = peft.PeftModel.from_pretrained(
        base_model("llama"), structured(adapter, kept).adapter.save(tmp_path / "out")
    )
    assert set(layers(again)) == set(kept)
    torch.testing.assert_close(logits(again.eval()), wanted, rtol=0, atol=1e-12)


def test_trained_biases_of_removed_modules_stay(base_model, tmp_path):
    config = peft.LoraConfig(r=2, bias="all", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = randomised(peft.get_peft_model(base_model("gpt2"), config))
    model.save_pretrained(tmp_path / "peft")
    adapter = Adapter.load(tmp_path / "peft")
    first, *gone = adapter.sites
    pruned = keep_modules(adapter, [first])
    assert f"{PREFIX}{first}.base_layer.bias" in pruned.tensors
    assert all(f"{PREFIX}{name}.bias" in pruned.tensors for name in gone)
    for name, layer in layers(model).items():
        layer._disable_adapters = name != first
    again = peft.PeftModel.from_pretrained(base_model("gpt2"), pruned.save(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-12)


def test_adalora_forgets_the_rank_pattern_of_removed_modules(tmp_path):
    tensors = {
        f"{PREFIX}{name}.lora_{part}": torch.ones(shape)
        for name in (Q, K)
        for part, shape in {"A": (2, 4), "B": (6, 2), "E": (2, 1)}.items()
    }
    pattern = {f"{Q}.lora_E": [True, False], f"{K}.lora_E": [True, True]}
    adapter = Adapter.load(write(tmp_path / "in", tensors, peft_type="ADALORA"))
    adapter = dataclasses.replace(adapter, config={**adapter.config, "rank_pattern": pattern})
    assert keep_modules(adapter, [K]).config["rank_pattern"] == {f"{K}.lora_E": [True, True]}


def test_an_embedding_that_is_no_longer_adapted_is_saved_under_its_own_name(base_model, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    model = randomised(peft.get_peft_model(base_model("llama"), config))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        model.save_pretrained(tmp_path / "peft")
    adapter = Adapter.load(tmp_path / "peft")
    assert f"{PREFIX}model.embed_tokens.base_layer.weight" in adapter.tensors
    pruned = keep_modules(adapter, [LLAMA.format(0, "q")])
    assert f"{PREFIX}model.embed_tokens.weight" in pruned.tensors
    for name, layer in layers(model).items():
        layer._disable_adapters = name not in pruned.sites
    again = peft.PeftModel.from_pretrained(base_model("llama"), pruned.save(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            ["layers.9.q_proj", Q],
            r"in has no module layers\.9\.q_proj; there are: layers\.0\.k_proj, layers\.0\.q_proj",
        ),
        ([], r"no module of in would be left; at least one is needed of: layers\.0\.k_proj"),
    ],
)
def test_unknown_and_no_modules_are_refused(tmp_path, names, text):
    with pytest.raises(OptionError, match=text):
        keep_modules(made(tmp_path, Q, K), names)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"target_parameters": ["experts.w"]}, "target_parameters names parameters by their endings.*all of them"),
        ({"peft_type": "TINYLORA"}, "TINYLORA sets its modules up together, so none can be left out"),
        ({"peft_type": "VERA"}, "VERA shares projections .* and the file lacks them, so no module can be left out"),
    ],
)
def test_tuners_that_cannot_lose_a_module_say_why(tmp_path, config, text):
    adapter = made(tmp_path, Q, K)
    adapter = dataclasses.replace(adapter, config={**adapter.config, **config})
    with pytest.raises(TunerError, match=text):
        keep_modules(adapter, [Q])


def test_vera_keeps_its_largest_module(base_model, tmp_path):
    config = peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"])  # v_proj is half as large
    peft.get_peft_model(base_model("llama"), config).save_pretrained(tmp_path / "peft")
    adapter = Adapter.load(tmp_path / "peft")
    assert set(keep_modules(adapter, [LLAMA.format(0, "q")]).sites) == {LLAMA.format(0, "q")}
    with pytest.raises(TunerError, match="as large as its largest module, which must be kept"):
        keep_modules(adapter, [LLAMA.format(0, "v")])


def test_structured_pruning_tells_what_it_cost(tmp_path):
    adapter = made(tmp_path, Q, K, V)
    pruned = structured(adapter, [V, Q])
    norms = {name: update.norm() for name, update in adapter.updates.items()}
    assert (pruned.modules, pruned.ranks, pruned.sparsity) == ((2, 3), (8, 12), None)
    assert pruned.bytes == (3 * 4 * 14 * 8, 2 * 4 * 14 * 8)
    assert pruned.errors == {Q: 0, K: 1, V: 0}
    assert pruned.error == pytest.approx(norms[K] / math.hypot(*norms.values()))


def test_the_record_lists_every_pruning_and_survives_saving(tmp_path):
    adapter = dataclasses.replace(made(tmp_path, Q, K), record={"task": {"name": "digits/relabel"}})
    once = prune_rank(adapter, rank=3).adapter
    twice = reloaded(structured(once, [Q]).adapter, tmp_path)
    assert twice.record == {
        "task": {"name": "digits/relabel"},
        "pruned": [{"rank": 3, "by": "svd", "from": "in"}, {"modules": [Q], "from": "pruned in"}],
    }
    older = dataclasses.replace(adapter, record={"pruned": {"rank": 9}})
    entries = prune_weights(older, sparsity=0.5, seed=3).adapter.record["pruned"]
    said = {"sparsity": 0.5, "by": "magnitude", "per_matrix": False, "seed": 3, "from": "in"}
    assert entries == [{"rank": 9}, said]


# ranks


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_alpha": 7, "alpha_pattern": {"k_proj": 3.3}}])
def test_units_are_sliced_and_scales_do_not_change(tmp_path, config):
    adapter = made(tmp_path, Q, K, V, dtype=torch.bfloat16, **config)
    kept = {Q: [2], K: [3, 0, 1], V: []}
    pruned = keep_ranks(adapter, kept)
    again = reloaded(pruned, tmp_path)
    assert set(again.sites) == {Q, K}
    assert pruned.config.get("use_rslora", False) == config.get("use_rslora", False)
    for name in again.sites:
        A, B = (f"{PREFIX}{name}.lora_{part}.weight" for part in "AB")
        assert torch.equal(again.tensors[A], adapter.tensors[A][sorted(kept[name])])
        assert torch.equal(again.tensors[B], adapter.tensors[B][:, sorted(kept[name])])
        assert again.sites[name] == pruned.sites[name]
        assert again.sites[name].scale == pytest.approx(adapter.sites[name].scale, rel=3e-16)
        assert again.sites[name].rank == len(kept[name])


@given(rank=st.integers(1, 40), left=st.integers(1, 40), alpha=st.floats(0.01, 1000), rslora=st.booleans())
def test_any_rank_keeps_the_scale_to_the_last_bits(rank, left, alpha, rslora):
    left = min(rank, left)
    config = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    tensors = lora(Q, rank=rank)
    site = Site(
        Q, "linear", {key.split(".")[-2]: key for key in tensors}, rank, alpha / (rank**0.5 if rslora else rank)
    )
    pruned = keep_ranks(Adapter(tensors, config, {Q: site}), {Q: range(left)})
    root = math.sqrt(left) if rslora else left
    assert pruned.config["lora_alpha"] / root == pytest.approx(site.scale, rel=4e-16)
    written = float(pruned.config["lora_alpha"])
    for other in (math.nextafter(written, math.inf), math.nextafter(written, -math.inf)):
        assert abs(other / root - site.scale) >= abs(written / root - site.scale)  # no float gives it better
    assert pruned.sites[Q].scale == pruned.config["lora_alpha"] / root
    assert (pruned.config["r"], pruned.config.get("rank_pattern", {})) == (left, {})


@pytest.mark.parametrize(("rank", "left", "alpha"), [(4, 3, 8), (8, 3, 16.5), (64, 7, 0.1875)])
def test_the_scale_stays_to_the_last_bit_where_a_float_gives_it(rank, left, alpha):
    tensors = lora(Q, rank=rank)
    site = Site(Q, "linear", {key.split(".")[-2]: key for key in tensors}, rank, alpha / rank)
    pruned = keep_ranks(Adapter(tensors, {"r": rank, "lora_alpha": alpha}, {Q: site}), {Q: range(left)})
    assert pruned.config["lora_alpha"] == alpha * left / rank
    assert pruned.sites[Q].scale == site.scale


def test_modules_that_are_not_named_stay_whole(tmp_path):
    adapter = made(tmp_path, Q, K)
    pruned = keep_ranks(adapter, {Q: [0]})
    assert {name: site.rank for name, site in pruned.sites.items()} == {Q: 1, K: 4}
    assert all(pruned.tensors[key] is adapter.tensors[key] for key in adapter.sites[K].keys.values())
    assert keep_ranks(adapter, {}).config == adapter.config


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_uneven_ranks_give_the_same_logits_in_peft_as_the_dense_deltas(base_model, tmp_path, name, by):
    options = {"gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}}
    settings = {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "embed_tokens"]}
    config = peft.LoraConfig(**{**settings, **options.get(name, {}), "rank_pattern": {".*0.*(q_proj|attn.c_proj)": 2}})
    model = randomised(peft.get_peft_model(base_model(name), config))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        model.save_pretrained(tmp_path / "peft")
    pruned = prune_rank(Adapter.load(tmp_path / "peft"), energy=0.8, by=by).adapter
    assert len({site.rank for site in pruned.sites.values()}) > 1
    base = base_model(name)
    with torch.no_grad():
        for module, update in pruned.updates.items():
            base.get_submodule(module).weight += update.delta()
    again = peft.PeftModel.from_pretrained(base_model(name), pruned.save(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(again), logits(base), rtol=0, atol=1e-12)
    assert float((logits(again) - logits(model)).abs().max()) > 1e-4


@pytest.mark.parametrize("by", ORDERS)
def test_every_kind_of_layer_is_pruned_in_its_own_layout(tmp_path, by):
    tensors = {
        f"{PREFIX}conv.lora_A.weight": torch.randn(4, 3, 2, 2),
        f"{PREFIX}conv.lora_B.weight": torch.randn(5, 4, 1, 1),
        f"{PREFIX}embed.lora_embedding_A": torch.randn(4, 9),
        f"{PREFIX}embed.lora_embedding_B": torch.randn(6, 4),
        **lora(Q, rank=4, rows=6, columns=6),
    }
    adapter = Adapter.load(write(tmp_path / "in", tensors, r=4, lora_alpha=6, fan_in_fan_out=True))
    pruned = reloaded(prune_rank(adapter, rank=2, by=by).adapter, tmp_path)
    assert {name: site.kind for name, site in pruned.sites.items()} == {
        name: site.kind for name, site in adapter.sites.items()
    }
    assert pruned.tensors[f"{PREFIX}conv.lora_A.weight"].shape == (2, 3, 2, 2)
    assert pruned.tensors[f"{PREFIX}conv.lora_B.weight"].shape == (5, 2, 1, 1)
    assert pruned.tensors[f"{PREFIX}embed.lora_embedding_A"].shape == (2, 9)
    for name, update in pruned.updates.items():
        before = adapter.updates[name]
        if by == "svd":
            wanted = before.truncate(2)[0].delta()
        else:
            size = before.A.norm(dim=1) * before.B.norm(dim=0)
            top = size.topk(2).indices
            wanted = (before.B[:, top] @ before.A[top]).reshape(before.shape)
        torch.testing.assert_close(update.delta(), wanted, rtol=1e-4, atol=1e-5)


def test_the_svd_loses_the_tail_of_the_singular_values(tmp_path):
    adapter = made(tmp_path, Q, K)
    pruned = prune_rank(adapter, rank=3)
    values = {name: update.singular_values().square() for name, update in adapter.updates.items()}
    for name, S2 in values.items():
        assert pruned.errors[name] == pytest.approx(math.sqrt(float(S2[3:].sum() / S2.sum())))
    lost, whole = (sum(float(S2[k:].sum()) for S2 in values.values()) for k in (3, 0))
    assert pruned.error == pytest.approx(math.sqrt(lost / whole))
    assert pruned.error == pytest.approx(differences(adapter, pruned.adapter) / adapter.total_norm)
    assert pruned.ranks == (6, 8)
    assert {site.scale for site in pruned.adapter.sites.values()} == {2}
    assert prune_rank(adapter, rank=3, by="units").error > pruned.error


@pytest.mark.parametrize(
    ("cut", "rank"),
    [  # norms of the units: 4, 3, 2, 1
        ({"cumulative": 0.4}, 1),
        ({"cumulative": 0.41}, 2),
        ({"cumulative": 0.7}, 2),
        ({"cumulative": 0.9}, 3),
        ({"cumulative": 1.0}, 4),
        ({"ratio": 1.0}, 1),
        ({"ratio": 1.34}, 2),
        ({"ratio": 1.99}, 2),
        ({"ratio": 2.01}, 3),
        ({"ratio": 100.0}, 4),
        ({"ratio": 100.0, "rank": 2}, 2),
        ({"energy": 0.96, "rank": 2}, 2),
        ({"energy": 0.54, "rank": 3}, 2),
    ],
)
@pytest.mark.parametrize("by", ["svd", "units"])
def test_shares_of_the_norms_and_their_ratio_with_a_rank_as_the_most(tmp_path, cut, rank, by):
    tensors = {
        f"{PREFIX}{Q}.lora_A.weight": torch.eye(4, 6, dtype=torch.float64),
        f"{PREFIX}{Q}.lora_B.weight": torch.eye(7, 4, dtype=torch.float64) * torch.tensor([2.0, 4.0, 1.0, 3.0]),
    }
    adapter = Adapter.load(write(tmp_path / "in", tensors, r=4, lora_alpha=4))
    pruned = prune_rank(adapter, **cut, by=by)
    assert pruned.ranks == (rank, 4)
    assert pruned.error == pytest.approx(math.sqrt(sum([16, 9, 4, 1][rank:]) / 30), abs=1e-7)
    assert pruned.adapter.record["pruned"][-1].items() >= {**cut, "by": by}.items()


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (16 / 30, 1), (0.54, 2), (25 / 30, 2), (0.96, 3), (1, 4)])
@pytest.mark.parametrize("by", ORDERS)
def test_energy_keeps_as_few_ranks_as_it_takes(tmp_path, energy, rank, by):
    tensors = {  # squares of the singular values, in this order: 4, 16, 1, 9
        f"{PREFIX}{Q}.lora_A.weight": torch.eye(4, 6, dtype=torch.float64),
        f"{PREFIX}{Q}.lora_B.weight": torch.eye(7, 4, dtype=torch.float64) * torch.tensor([2.0, 4.0, 1.0, 3.0]),
    }
    adapter = Adapter.load(write(tmp_path / "in", tensors, r=4, lora_alpha=4))
    pruned = prune_rank(adapter, energy=energy, by=by)
    assert pruned.ranks == (rank, 4)
    assert pruned.error == pytest.approx(math.sqrt(sum([16, 9, 4, 1][rank:]) / 30), abs=1e-7)


def test_units_that_reach_the_share_exactly_are_enough():
    """What is lost after one unit, 2⁻⁵⁰ + 2⁻¹⁰⁰, is to the last bit what rounding is allowed to lose: 4 ε ‖ΔW‖²."""
    sizes = torch.tensor([1.0, 2.0**-25, 2.0**-50], dtype=torch.float64)
    assert _enough(LowRank(torch.diag(sizes), torch.eye(3, dtype=torch.float64), (3, 3)), 1.0) == 1
    larger = sizes * torch.tensor([1.0, 1 + 2.0**-50, 1.0], dtype=torch.float64)
    assert _enough(LowRank(torch.diag(larger), torch.eye(3, dtype=torch.float64), (3, 3)), 1.0) == 2


@given(seed=st.integers(0, 2**31), energy=st.floats(0.01, 1), by=st.sampled_from(ORDERS))
def test_the_share_of_energy_is_reached_and_one_rank_less_would_not_reach_it(seed, energy, by):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(5, 6, generator=generator).double(), torch.randn(4, 5, generator=generator).double()
    tensors = dict(zip(lora(Q), (A, B), strict=True))
    site = Site(Q, "linear", {key.split(".")[-2]: key for key in tensors}, 5, 1.0)
    adapter = Adapter(tensors, {"r": 5, "lora_alpha": 5}, {Q: site})
    pruned = prune_rank(adapter, energy=energy, by=by)
    assert 1 - pruned.error**2 >= energy - 1e-12
    if pruned.ranks[0] > 1:
        fewer = prune_rank(adapter, rank=pruned.ranks[0] - 1, by=by)
        assert 1 - fewer.error**2 < energy + 1e-12


@pytest.mark.parametrize("by", ORDERS)
def test_a_rank_that_a_module_does_not_exceed_leaves_it_alone(tmp_path, by):
    tensors = {**lora(Q, rank=1), **lora(K, rank=3)}
    adapter = Adapter.load(write(tmp_path / "in", tensors, r=3, rank_pattern={"q_proj": 1}))
    pruned = prune_rank(adapter, rank=2, by=by).adapter
    assert all(pruned.tensors[key] is adapter.tensors[key] for key in adapter.sites[Q].keys.values())
    assert (pruned.sites[K].rank, pruned.sites[K].scale) == (2, pytest.approx(4 / 3))
    same = prune_rank(adapter, rank=3, by=by)
    assert same.adapter.config == adapter.config
    assert same.error == 0


def test_of_units_that_tie_the_first_is_kept(tmp_path):
    rank = 64  # enough for a sort that is not stable to show
    tensors = {key: torch.ones_like(tensor) for key, tensor in lora(Q, rank=rank).items()}
    A = next(iter(tensors))
    tensors[A][:, 0] *= torch.tensor([1.0, -1.0] * 32)  # by its sign a unit is known
    pruned = prune_rank(Adapter.load(write(tmp_path / "in", tensors, r=rank)), rank=3, by="units").adapter
    assert pruned.tensors[A][:, 0].tolist() == [1, -1, 1]


def test_a_module_smaller_than_its_rank_comes_down_to_what_it_holds(tmp_path):
    adapter = Adapter.load(write(tmp_path / "in", lora(Q, rank=8, rows=3, columns=4), r=8))
    pruned = prune_rank(adapter, rank=5)
    assert pruned.ranks == (3, 8)
    assert pruned.error == pytest.approx(0, abs=1e-6)


def test_svd_factors_have_the_dtype_of_the_old(tmp_path):
    adapter = made(tmp_path, Q, dtype=torch.bfloat16)
    pruned = prune_rank(adapter, rank=2)
    assert {tensor.dtype for tensor in pruned.adapter.tensors.values()} == {torch.bfloat16}
    assert pruned.error == pytest.approx(differences(adapter, pruned.adapter) / adapter.total_norm)
    assert pruned.error == pytest.approx(adapter.updates[Q].truncate(2)[1], rel=0.05)


@pytest.mark.parametrize("by", ORDERS)
def test_under_energy_a_zero_module_is_removed_but_never_the_last(tmp_path, by):
    zero = {f"{PREFIX}{K}.lora_B.weight": torch.zeros(8, 4)}
    with pytest.warns(UserWarning, match="1 of 2 modules have zero delta"):
        adapter = made(tmp_path, Q, K, extra=zero)
    pruned = prune_rank(adapter, energy=0.9, by=by)
    assert set(pruned.adapter.sites) == {Q}
    assert pruned.errors[K] == 0
    ranked = prune_rank(adapter, rank=1, by=by)
    assert ranked.modules == (2, 2)
    assert torch.equal(
        ranked.adapter.tensors[f"{PREFIX}{K}.lora_A.weight"], adapter.tensors[f"{PREFIX}{K}.lora_A.weight"][:1]
    )
    with pytest.raises(AdapterError, match=r"nothing would be left: ΔW is 0 in all 1 modules"):
        prune_rank(keep_modules(adapter, [K]), energy=0.9, by=by)


def test_orthogonal_initialisation_does_not_hinder_an_odd_rank(base_model, tmp_path):
    config = peft.LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=["q_proj"])
    randomised(peft.get_peft_model(base_model("llama"), config)).save_pretrained(tmp_path / "peft")
    pruned = prune_rank(Adapter.load(tmp_path / "peft"), rank=3).adapter
    again = peft.PeftModel.from_pretrained(base_model("llama"), pruned.save(tmp_path / "out"))
    assert set(layers(again)) == set(pruned.sites)


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        ({Q: [4]}, r"layers\.0\.q_proj has no unit 4; its 4 units are 0 to 3"),
        ({Q: [-1]}, r"has no unit -1"),
        ({Q: [1, 1]}, r"units of layers\.0\.q_proj are named twice: 1"),
        ({"x": [0]}, r"in has no module x; there are: layers\.0\.q_proj"),
        ({Q: []}, r"no module of in would be left"),
    ],
)
def test_units_that_are_not_there_are_refused(tmp_path, kept, text):
    with pytest.raises(OptionError, match=text):
        keep_ranks(made(tmp_path, Q), kept)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "none of rank, energy, cumulative, ratio given; a rank, one of"),
        ({"ratio": 2.0, "energy": 0.5}, "both of energy and ratio given; a rank, one of"),
        ({"ratio": 0.5}, r"ratio is 0\.5; a number of at least 1 is needed"),
        ({"cumulative": 0.0}, r"cumulative is 0\.0; a share above 0"),
        ({"ratio": 2.0, "by": "random"}, "in an order drawn at random .* are not cut by a ratio"),
        ({"rank": 0}, "a rank of 0 was asked for; it is at least 1"),
        ({"energy": 0.0}, r"energy is 0\.0; a share above 0 and up to 1"),
        ({"energy": 1.5}, r"energy is 1\.5"),
        ({"energy": math.nan}, "energy is nan"),
        ({"rank": 2, "by": "unit"}, r"unknown order of ranks 'unit' \(did you mean 'units'"),
    ],
)
def test_options_of_rank_pruning_that_cannot_be_are_refused(tmp_path, options, text):
    with pytest.raises(OptionError, match=text):
        prune_rank(made(tmp_path, Q), **options)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "LOHA"}, "this LOHA adapter has no ranks to be removed: LOHA updates are no plain product"),
        ({"use_dora": True}, "this LORA adapter has no ranks to be removed: DoRA rescales"),
        ({"init_lora_weights": "pissa"}, "has no ranks to be removed: .*PiSSA"),
    ],
)
def test_adapters_without_ranks_are_refused_by_name(tmp_path, config, text):
    adapter = made(tmp_path, Q)
    adapter = dataclasses.replace(adapter, config={**adapter.config, **config})
    for action in (lambda: keep_ranks(adapter, {Q: [0]}), lambda: prune_rank(adapter, rank=1)):
        with pytest.raises(TunerError, match=text):
            action()


# single entries


def zeros(adapter: Adapter) -> dict[str, int]:
    return {key: int((tensor == 0).sum()) for key, tensor in adapter.tensors.items()}


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.29, 0.5, 0.77])
@pytest.mark.parametrize("per_matrix", [False, True])
@pytest.mark.parametrize("by", ["magnitude", "random"])
def test_exactly_the_share_asked_for_is_set_to_zero(base_model, tmp_path, sparsity, per_matrix, by):
    config = peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"])  # keeps its shapes
    randomised(peft.get_peft_model(base_model("llama").float(), config)).save_pretrained(tmp_path / "peft")
    adapter = Adapter.load(tmp_path / "peft")
    count = sum(tensor.numel() for tensor in adapter.tensors.values())
    pruned = prune_weights(adapter, sparsity=sparsity, by=by, per_matrix=per_matrix)
    found = zeros(pruned.adapter)
    if per_matrix:
        assert found == {key: round(sparsity * tensor.numel()) for key, tensor in adapter.tensors.items()}
    else:
        assert sum(found.values()) == round(sparsity * count)
    assert pruned.sparsity == sum(found.values()) / count
    for key, tensor in pruned.adapter.tensors.items():
        assert torch.equal(tensor[tensor != 0], adapter.tensors[key][tensor != 0])
    assert pruned.ranks is None
    before, after = (
        torch.cat([update.delta().flatten() for update in each.updates.values()]) for each in (adapter, pruned.adapter)
    )
    assert pruned.error == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-4, abs=1e-6)


def test_the_smallest_go_first_of_all_or_of_each_matrix(tmp_path):
    A, B = lora(Q)
    tensors = {
        A: torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]]),
        B: torch.tensor([[10.0, 20.0], [-30.0, 40.0], [50.0, 60.0]]),
    }
    adapter = Adapter.load(write(tmp_path / "in", tensors))
    each = prune_weights(adapter, sparsity=0.5, per_matrix=True)
    # the first row of A has gone, and its column of B with it
    assert [each.adapter.tensors[key].tolist() for key in (A, B)] == [[[-4, 5, -6]], [[0], [40], [60]]]
    assert each.adapter.sites[Q].scale == adapter.sites[Q].scale
    assert (each.ranks, each.adapter.config["r"], each.adapter.config["lora_alpha"]) == ((1, 2), 1, 2)
    assert each.sparsity == 0.5
    together = prune_weights(adapter, sparsity=1 / 3)
    assert [together.adapter.tensors[key].tolist() for key in (A, B)] == [[[0, 5, -6]], [[20], [40], [60]]]
    with pytest.raises(AdapterError, match=r"at sparsity 0\.5 nothing would be left"):
        prune_weights(adapter, sparsity=0.5)  # every entry of A is smaller than any of B


def test_of_entries_that_tie_the_first_go(tmp_path):
    tensors = {key: torch.ones_like(tensor) for key, tensor in lora(Q, rank=2, rows=3, columns=3).items()}
    adapter = Adapter.load(write(tmp_path / "in", tensors))
    A, B = prune_weights(adapter, sparsity=2 / 12).adapter.tensors.values()
    assert A.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert bool((B == 1).all())


def test_units_and_modules_that_came_out_as_zero_are_removed_and_the_update_is_the_same(tmp_path):
    small = {key: tensor * 1e-6 for key, tensor in lora(V, rank=4, rows=8, columns=6).items()}
    adapter = made(tmp_path, Q, K, extra=small)
    pruned = prune_weights(adapter, sparsity=0.7)
    assert pruned.modules == (2, 3)
    assert V not in pruned.adapter.sites
    assert pruned.errors[V] == 1
    assert all((pruned.adapter.tensors[key] != 0).any() for key in pruned.adapter.tensors)
    assert_deltas(reloaded(pruned.adapter, tmp_path), deltas(pruned.adapter))
    assert {site.scale for site in pruned.adapter.sites.values()} == {2}
    assert pruned.error == pytest.approx(differences(adapter, pruned.adapter) / adapter.total_norm)


def test_dora_keeps_its_magnitudes_and_shapes(base_model, tmp_path):
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
    randomised(peft.get_peft_model(base_model("llama"), config)).save_pretrained(tmp_path / "peft")
    adapter = Adapter.load(tmp_path / "peft")
    pruned = prune_weights(adapter, sparsity=0.9).adapter
    for key, tensor in pruned.tensors.items():
        assert tensor.shape == adapter.tensors[key].shape
        assert torch.equal(tensor, adapter.tensors[key]) == ("magnitude" in key)


@pytest.mark.parametrize("by", CRITERIA)
@pytest.mark.parametrize("per_matrix", [False, True])
def test_sparsity_zero_changes_nothing_and_one_is_refused(tmp_path, by, per_matrix):
    adapter = made(tmp_path, Q, K)
    same = prune_weights(adapter, sparsity=0, by=by, per_matrix=per_matrix)
    assert_deltas(same.adapter, deltas(adapter), rtol=1e-12)
    assert same.error == pytest.approx(0, abs=1e-12)
    assert same.sparsity == 0
    with pytest.raises(AdapterError, match="in: at sparsity 1 nothing would be left; a lower one is needed"):
        prune_weights(adapter, sparsity=1, by=by, per_matrix=per_matrix)


def test_random_pruning_follows_its_seed_alone(tmp_path):
    adapter = made(tmp_path, Q, K)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (
        zeros_at(prune_weights(adapter, sparsity=0.3, by="random", seed=s).adapter) for s in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert first == again != other


def zeros_at(adapter: Adapter) -> dict[str, list]:
    return {key: (tensor == 0).nonzero().tolist() for key, tensor in adapter.tensors.items()}


def test_random_pruning_spares_no_matrix(tmp_path):
    pruned = prune_weights(made(tmp_path, Q, K), sparsity=0.4, by="random")
    shares = [count / pruned.adapter.tensors[key].numel() for key, count in zeros(pruned.adapter).items()]
    assert all(0.1 < share < 0.8 for share in shares)


@pytest.mark.parametrize("per_matrix", [False, True])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_delta_pruning_is_what_sorting_the_whole_delta_gives(tmp_path, per_matrix, sparsity):
    adapter = made(tmp_path, Q, K, dtype=torch.float32, alpha_pattern={"k_proj": 2})
    whole = {name: delta.flatten() for name, delta in deltas(adapter).items()}
    every = torch.cat(list(whole.values())).abs().sort().values
    wanted = {}
    for name, delta in whole.items():
        ordered = delta.abs().sort().values if per_matrix else every
        limit = ordered[round(sparsity * len(ordered)) - 1]
        wanted[name] = torch.where(delta.abs() <= limit, 0, delta).reshape(adapter.updates[name].shape)
    pruned = prune_weights(adapter, sparsity=sparsity, by="delta-magnitude", per_matrix=per_matrix)
    again = reloaded(pruned.adapter, tmp_path)
    found = deltas(again)
    for name, delta in wanted.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(delta)), delta, rtol=1e-5, atol=1e-5)
        assert not delta.any() or again.sites[name].rank == torch.linalg.matrix_rank(delta)
    assert pruned.sparsity == sum(round(sparsity * len(d)) for d in whole.values()) / sum(
        len(d) for d in whole.values()
    )
    lost = math.sqrt(sum(float((wanted[n].flatten() - whole[n]).square().sum()) for n in whole))
    assert pruned.error == pytest.approx(lost / adapter.total_norm, rel=1e-4)


def test_delta_pruning_to_a_rank_is_the_best_of_that_rank_and_tells_both_losses(tmp_path):
    adapter = made(tmp_path, Q, K)
    exact = prune_weights(adapter, sparsity=0.5, by="delta-magnitude").adapter
    pruned = prune_weights(adapter, sparsity=0.5, by="delta-magnitude", rank=2)
    assert pruned.ranks == (4, 8)
    assert_deltas(pruned.adapter, {name: update.truncate(2)[0].delta() for name, update in exact.updates.items()})
    assert pruned.error == pytest.approx(differences(adapter, pruned.adapter) / adapter.total_norm)
    assert pruned.error > differences(adapter, exact) / adapter.total_norm


def test_delta_pruning_removes_modules_that_it_empties(tmp_path):
    small = {key: tensor * 1e-3 for key, tensor in lora(V, rank=4, rows=8, columns=6).items()}
    pruned = prune_weights(made(tmp_path, Q, K, extra=small), sparsity=0.5, by="delta-magnitude")
    assert set(pruned.adapter.sites) == {Q, K}
    assert (pruned.modules, pruned.errors[V]) == ((2, 3), 1)


@pytest.mark.parametrize("by", CRITERIA)
def test_pruning_removes_a_module_that_was_zero_before(tmp_path, by):
    with pytest.warns(UserWarning, match="1 of 2 modules have zero delta"):
        adapter = made(tmp_path, Q, K, extra={f"{PREFIX}{K}.lora_B.weight": torch.zeros(8, 4)})
    pruned = prune_weights(adapter, sparsity=0.1, by=by)
    assert set(pruned.adapter.sites) == {Q}
    assert pruned.errors[K] == 0
    assert set(prune_weights(adapter, sparsity=0, by=by).adapter.sites) == {Q, K}


def test_delta_pruning_reaches_convolutions_in_their_shape(tmp_path):
    tensors = {
        f"{PREFIX}conv.lora_A.weight": torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)),
        f"{PREFIX}conv.lora_B.weight": torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(1)),
    }
    adapter = Adapter.load(write(tmp_path / "in", tensors))
    again = reloaded(prune_weights(adapter, sparsity=0.5, by="delta-magnitude").adapter, tmp_path)
    before, after = adapter.updates["conv"].delta(), again.updates["conv"].delta()
    limit = before.abs().median()
    torch.testing.assert_close(after, torch.where(before.abs() <= limit, 0, before), rtol=1e-4, atol=1e-5)


def test_delta_pruning_without_a_delta_is_refused(tmp_path):
    adapter = made(tmp_path, Q)
    dora = dataclasses.replace(adapter, config={**adapter.config, "use_dora": True})
    with pytest.raises(TunerError, match="DoRA rescales"):
        prune_weights(dora, sparsity=0.5, by="delta-magnitude")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.1}, r"sparsity is 1\.1; a share from 0 to 1 is needed"),
        ({"sparsity": -0.1}, r"sparsity is -0\.1; a share from 0 to 1"),
        ({"sparsity": math.nan}, "sparsity is nan; a share from 0 to 1"),
        (
            {"sparsity": 0.5, "by": "magnitud"},
            r"unknown criterion 'magnitud' \(did you mean 'magnitude'\?\); there are",
        ),
        ({"sparsity": 0.5, "rank": 2}, "magnitude keeps the factors, so a rank of 2 .* option of: delta-magnitude"),
        ({"sparsity": 0.5, "rank": 0, "by": "delta-magnitude"}, "a rank of 0 was asked for; it is at least 1"),
    ],
)
def test_options_of_weight_pruning_that_cannot_be_are_refused(tmp_path, options, text):
    with pytest.raises(OptionError, match=text):
        prune_weights(made(tmp_path, Q), **options)


def test_a_new_criterion_is_one_function_and_one_line(tmp_path, monkeypatch):
    def last(update: LowRank, generator):
        return update, list(range(update.rank))[::-1]

    def inverse(tensor: Tensor, generator: torch.Generator) -> Tensor:
        return 1 / tensor.abs()

    monkeypatch.setitem(RANK_ORDERS.entries, "last", RankOrder(last))
    monkeypatch.setitem(CRITERIA.entries, "inverse", Criterion(inverse))
    adapter = made(tmp_path, Q)
    A, B = adapter.sites[Q].keys.values()
    assert torch.equal(prune_rank(adapter, rank=1, by="last").adapter.tensors[A], adapter.tensors[A][3:])
    pruned = prune_weights(adapter, sparsity=1 / 56, by="inverse").adapter
    largest = max(float(tensor.abs().max()) for tensor in adapter.tensors.values())
    gone = torch.cat([adapter.tensors[key][pruned.tensors[key] == 0] for key in (A, B)])
    assert gone.abs().tolist() == [largest]


# the threshold


def bits(value: Tensor) -> int:
    return int(value.view({4: torch.int32, 8: torch.int64}[value.itemsize]))


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([0, 1, 2, 7]),
    scale=st.sampled_from([0.0, 1e-42, 1e-6, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    share=st.floats(0, 1),
)
def test_the_threshold_is_the_one_of_a_sort_also_where_values_tie(sizes, seed, levels, scale, dtype, share):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, generator=generator, dtype=dtype).abs() for n in sizes]
    parts = [(part * levels).round() * scale if levels else part * scale for part in parts]
    ordered = torch.cat(parts).sort().values
    count = max(1, round(share * len(ordered)))
    threshold, ties = nth_smallest(lambda: parts, count)
    assert threshold == bits(ordered[count - 1])
    assert ties == int((ordered[:count] == ordered[count - 1]).sum())
