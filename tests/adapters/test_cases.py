"""Each case folder comes out as its expected.json says."""

import contextlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import combine, combine_factors
from lora_lab.errors import FileError, LoraLabError, LoraLabWarning, MismatchError, OptionError, TunerError
from lora_lab.hub import base_model
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources, base_of
from lora_lab.merging.writing.export import save

CASES = Path(__file__).parents[1] / "cases"

# case/path of the adapter, options of load, what a warning must say
VALUES = [
    ("R01_rslora_scaling/adapter", {}, None),
    ("R02_rank_alpha_pattern/adapter", {}, r"\^q_proj"),
    ("R04_legacy_2023_config/adapter", {}, None),
    ("R11_compile_ddp_fsdp_prefixes/adapter_ddp_module", {}, None),
    ("R11_compile_ddp_fsdp_prefixes/adapter_fsdp_inner", {}, None),
    ("R11_compile_ddp_fsdp_prefixes/adapter_orig_mod_inner", {}, None),
    ("R11_compile_ddp_fsdp_prefixes/adapter_orig_mod_outer", {}, None),
    ("R12_missing_base_prefix/adapter", {}, None),
    ("R14_adapter_name_inside_keys/adapter_default", {}, None),
    ("R14_adapter_name_inside_keys/adapter_lora", {}, None),
    ("R14_adapter_name_inside_keys/adapter_task-a", {}, None),
    ("R14_adapter_name_inside_keys/adapter_two_in_one_file", {"adapter_name": "one"}, None),
    ("R15_bin_only/adapter", {}, None),
    ("R15_bin_only/adapter/adapter_model.bin", {}, None),
    ("R23_modules_to_save_head/adapter", {}, None),
    ("R25_gpt2_conv1d_fan_in_fan_out/adapter", {}, None),
    ("K03_single_file_no_config/adapter_no_alpha", {}, "lora_alpha"),
    ("K03_single_file_no_config/adapter_only.safetensors", {"alpha": 8}, None),
    ("K06_diffusers_processor_keys", {}, None),
    ("K06_diffusers_processor_keys/pytorch_lora_weights.safetensors", {}, None),
    ("K07_diffusers_metadata_alpha", {}, None),
    ("K15_all_zero_B/adapter_all_zero", {}, "4 of 4 modules have zero delta"),
    ("K16_half_precision_product/adapter_bf16", {}, None),
]

ERRORS = [
    "R05_config_is_lfs_pointer/adapter",
    "R07_truncated_safetensors/adapter_cut_data",
    "R07_truncated_safetensors/adapter_cut_header",
    "R07_truncated_safetensors/adapter_eight_bytes",
    "R07_truncated_safetensors/adapter_zero_bytes",
    "R09_empty_adapter/adapter_bin",
    "R09_empty_adapter/adapter_st",
    "R14_adapter_name_inside_keys/adapter_two_in_one_file",
    "R18_nan_inf_weights/adapter",
    "R21_unpaired_lora_A/adapter",
    "R22_rank_differs_from_config/adapter",
]

NO_PRODUCT = ["R28_dora/adapter", "R28_dora/adapter_weight_suffix", "K10_pissa_olora_init/adapter"]


def expected_of(path: str) -> dict:
    return json.loads((CASES / path.partition("/")[0] / "expected.json").read_text())


def expected_deltas(path: str) -> dict[str, torch.Tensor]:
    return load_file(CASES / path.partition("/")[0] / "expected_delta.safetensors")


def assert_says(text: str, path: str) -> None:
    for alternatives in expected_of(path)["must_mention"]:
        assert any(word in text for word in alternatives.split("|")), f"{text!r} misses {alternatives!r}"


@pytest.mark.parametrize(("path", "options", "warning"), VALUES)
def test_a_case_has_the_deltas_scalings_and_ranks_that_it_should(path, options, warning):
    expected, deltas = expected_of(path), expected_deltas(path)
    if warning is None:  # any warning is an error
        adapter = Adapter.load(CASES / path, **options)
    else:
        with pytest.warns(LoraLabWarning, match=warning):
            adapter = Adapter.load(CASES / path, **options)
    assert set(adapter.updates) == set(deltas) == set(expected["modules"])
    for name, update in adapter.updates.items():
        wanted = expected["modules"][name]
        assert list(update.shape) == wanted["shape"]
        assert (update.rank, adapter.sites[name].scale) == (wanted["rank"], pytest.approx(wanted["scaling"]))
        torch.testing.assert_close(update.delta(), deltas[name], rtol=expected["rtol"], atol=1e-6)
        assert update.norm() == pytest.approx(wanted["delta_fro"], rel=1e-5)
    assert adapter.total_norm == pytest.approx(expected["total_delta_fro"], rel=1e-5)


@pytest.mark.parametrize("path", ERRORS)
def test_a_case_that_cannot_be_used_is_refused_in_one_line_that_says_why(path):
    with pytest.raises(LoraLabError) as caught:
        Adapter.load(CASES / path)
    assert "\n" not in str(caught.value)
    assert_says(str(caught.value), path)


@pytest.mark.parametrize("path", NO_PRODUCT)
def test_a_case_whose_delta_is_no_product_loads_and_refuses_delta_maths(path):
    adapter = Adapter.load(CASES / path)
    assert set(adapter.sites) == set(expected_deltas(path))
    with pytest.raises(TunerError) as caught:
        _ = adapter.updates
    assert_says(str(caught.value), path)


def test_every_reading_case_is_tried():
    tried = {path.partition("/")[0] for path in [*(v[0] for v in VALUES), *ERRORS, *NO_PRODUCT]}
    tried.add("K01_kohya_alpha")  # in test_kohya.py
    there = {folder.name for folder in CASES.iterdir() if re.match(r"[RK]\d\d_", folder.name)}
    assert there == tried


@pytest.mark.parametrize("folder", ["adapter_cut_data", "adapter_cut_header"])
def test_r07_a_cut_file_is_named_with_the_size_it_has(folder):
    path = CASES / "R07_truncated_safetensors" / folder
    with pytest.raises(LoraLabError) as caught:
        Adapter.load(path)
    assert str((path / "adapter_model.safetensors").stat().st_size) in str(caught.value)
    if folder == "adapter_cut_data":
        assert str(expected_of("R07_truncated_safetensors")["expected_size"]) in str(caught.value)


def test_r12_what_lora_lab_writes_has_the_prefix(tmp_path):
    Adapter.load(CASES / "R12_missing_base_prefix/adapter").save(tmp_path / "out")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)


def test_r18_names_both_tensors_with_their_counts():
    with pytest.raises(LoraLabError, match=r"q_proj.lora_\w.weight \(1 of 64\)") as caught:
        Adapter.load(CASES / "R18_nan_inf_weights/adapter")
    assert "v_proj.lora_B.weight (1 of 64)" in str(caught.value)


def test_r23_the_head_is_kept_apart_and_written_again_byte_for_byte(tmp_path):
    adapter = Adapter.load(CASES / "R23_modules_to_save_head/adapter")
    wanted = expected_of("R23_modules_to_save_head")["full_tensors"]
    assert [key.removeprefix("base_model.model.") for key in adapter.others] == sorted(wanted)
    halved = adapter.with_updates({n: u.truncate(2)[0] for n, u in adapter.updates.items()}, source="test")
    halved.save(tmp_path / "out")
    raw = load_file(CASES / "R23_modules_to_save_head/adapter/adapter_model.safetensors")
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key in adapter.others:
        assert float(again[key].double().norm()) == pytest.approx(wanted[key.removeprefix("base_model.model.")])
        assert again[key].numpy().tobytes() == raw[key].numpy().tobytes()


def test_r25_a_square_module_is_transposed_too():
    path = "R25_gpt2_conv1d_fan_in_fan_out/adapter"
    update = Adapter.load(CASES / path).updates["transformer.h.0.attn.c_proj"]
    assert float((update.delta().T - expected_deltas(path)["transformer.h.0.attn.c_proj"]).norm()) > 0.1


def test_k03_without_any_config_the_assumed_alpha_is_told():
    with pytest.warns(LoraLabWarning, match="lora_alpha is assumed equal to the rank"):
        adapter = Adapter.load(CASES / "K03_single_file_no_config/adapter_only.safetensors")
    wanted = expected_of("K03_single_file_no_config")["single_file_if_alpha_assumed_r"]
    assert adapter.total_norm == pytest.approx(wanted, rel=1e-5)


def test_k15_untrained_layers_are_counted_and_give_no_nan():
    with pytest.warns(LoraLabWarning, match="2 of 4 modules have zero delta"):
        adapter = Adapter.load(CASES / "K15_all_zero_B/adapter_layer0_zero")
    for name, update in adapter.updates.items():
        truncated, error = update.truncate(1)
        assert truncated.rank == 1
        assert bool(torch.isfinite(truncated.delta()).all())
        assert math.isfinite(update.effective_rank())
        assert (update.norm() == 0) == (error == 0) == ("layers.0." in name)


def test_k16_a_product_that_overflows_in_half_precision_is_finite():
    adapter = Adapter.load(CASES / "K16_half_precision_product/adapter_fp16_overflow")
    (update,) = adapter.updates.values()
    entry = expected_of("K16_half_precision_product")["fp16_case_entry"]
    torch.testing.assert_close(update.delta(), torch.full(update.shape, entry))
    assert float(update.svd()[1][0]) == pytest.approx(entry * math.sqrt(math.prod(update.shape)))


def test_l01_a_gauge_twin_is_far_in_factors_and_nowhere_in_delta():
    folder, expected = CASES / "L01_gauge_twin_interpolation", expected_of("L01_gauge_twin_interpolation")
    a, twin = Adapter.load(folder / "a").updates, Adapter.load(folder / "twin").updates
    half = [0.5, 0.5]
    for name, wanted in expected_deltas("L01_gauge_twin_interpolation").items():
        middle = combine([a[name], twin[name]], half)
        torch.testing.assert_close(middle.delta(), wanted, rtol=expected["rtol"], atol=1e-6)
    factors = [combine_factors([a[name], twin[name]], half) for name in a]
    total = math.hypot(*(update.norm() for update in factors))
    assert total == pytest.approx(expected["factor_mid_total"], rel=1e-5)


# the second round of cases


@pytest.mark.parametrize(
    ("path", "warning"),
    [
        ("N01_comfy_alpha_tensors/comfy.safetensors", None),
        ("N03_prefix_outside_base_model/misplaced", "4 keys have 'base_model.model.' behind another name"),
        ("N04_module_names_with_lora/adapter", None),
    ],
)
def test_a_case_with_odd_names_has_the_deltas_and_whole_tensors_that_it_should(path, warning):
    expected, deltas = expected_of(path), expected_deltas(path)
    with pytest.warns(LoraLabWarning, match=warning) if warning else contextlib.nullcontext():
        adapter = Adapter.load(CASES / path)
    assert set(adapter.updates) == set(deltas) == set(expected["modules"])
    for name, update in adapter.updates.items():
        torch.testing.assert_close(update.delta(), deltas[name], rtol=expected["rtol"], atol=1e-6)
        assert update.norm() == pytest.approx(expected["modules"][name]["delta_fro"], rel=1e-5)
    whole = [key.removeprefix("base_model.model.") for key in adapter.others]
    assert whole == expected.get("whole_tensors", [])
    for name, scale in expected.get("scaling", {}).items():
        assert adapter.sites[name].scale == scale


def test_n03_a_misplaced_prefix_and_the_right_one_are_the_same_modules():
    folder = CASES / "N03_prefix_outside_base_model"
    with pytest.warns(LoraLabWarning, match="behind another name"):
        a, b, doubled = (Adapter.load(folder / name) for name in ("misplaced", "right", "doubled"))
    assert a.sites.keys() == b.sites.keys()
    assert len(Sources([a, b]).modules) == 2
    assert not any("base_model" in name for adapter in (a, b, doubled) for name in adapter.sites)


def test_n04_a_head_whose_name_begins_with_lora_is_a_whole_tensor():
    adapter = Adapter.load(CASES / "N04_module_names_with_lora/head_only")
    assert list(adapter.sites) == ["enc.q_proj"]
    assert adapter.others == ["base_model.model.heads.lora_head.weight"]


# merging


def sources_of(case: str, names: str = "a b", weights=None, **more) -> Sources:
    adapters = [Adapter.load(CASES / case / name) for name in names.split()]
    return Sources(adapters, expected_of(case).get("weights") if weights is None else weights, **more)


def assert_deltas(adapter: Adapter, case: str, wanted=None) -> None:
    wanted = expected_deltas(case) if wanted is None else wanted
    assert set(adapter.updates) == set(wanted)
    for name, update in adapter.updates.items():
        torch.testing.assert_close(update.delta(), wanted[name], rtol=expected_of(case)["rtol"], atol=1e-6)


def assert_peft_loads(folder: Path, case: str) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_model(str(CASES / "_bases/llama_tiny")), folder)  # warnings are errors
    for name, wanted in expected_deltas(case).items():
        layer = model.base_model.model.get_submodule(name)
        found = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(found, wanted, rtol=expected_of(case)["rtol"], atol=1e-6)


@pytest.mark.parametrize(
    ("case", "rank"),
    [("M01_rslora_identity_merge", None), ("M02_linear_cross_terms", 8), ("M04_different_ranks", 12)],
)
def test_a_weighted_sum_of_a_case_is_exact_and_peft_loads_it(case, rank, tmp_path):
    merged = merge(sources_of(case), "task-arithmetic")
    assert_deltas(merged.adapter, case)
    assert merged.error == 0
    assert rank is None or {update.rank for update in merged.adapter.updates.values()} == {rank}
    assert merged.adapter.total_norm == pytest.approx(expected_of(case)["total_delta_fro"], rel=1e-5)
    save(merged, tmp_path / "merged")
    assert_deltas(Adapter.load(tmp_path / "merged"), case)
    assert_peft_loads(tmp_path / "merged", case)


@pytest.mark.parametrize("method", ["task-arithmetic", "average", "cat", "slerp"])
def test_m01_one_rslora_adapter_alone_stays_itself(method, tmp_path):
    case = "M01_rslora_identity_merge"
    merged = merge(sources_of(case, "a", [1.0]), method)
    assert_deltas(merged.adapter, case)
    save(merged, tmp_path / "merged.safetensors")
    assert_deltas(Adapter.load(tmp_path / "merged.safetensors"), case)


def test_m02_halves_have_no_cross_terms():
    case = "M02_linear_cross_terms"
    merged = merge(sources_of(case, weights=[0.5, 0.5]), "task-arithmetic")
    assert merged.adapter.total_norm == pytest.approx(expected_of(case)["half_half_total"], rel=1e-5)


@pytest.mark.parametrize("rank", [8, 4])
def test_m04_a_lower_rank_has_the_best_error_that_there_is(rank):
    case = "M04_different_ranks"
    merged = merge(sources_of(case), "task-arithmetic", rank=rank)
    best, total = expected_of(case)["best_error"][str(rank)], expected_of(case)["total_delta_fro"]
    assert merged.error == pytest.approx(best / total, rel=1e-4)
    whole = expected_deltas(case)
    gone = [float((update.delta() - whole[name]).norm()) for name, update in merged.adapter.updates.items()]
    assert math.hypot(*gone) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("method", ["task-arithmetic", "average", "cat"])
def test_m05_ranks_that_differ_between_modules_are_in_the_file_that_peft_loads(method, tmp_path):
    case = "M05_rank_pattern_export_reload"
    merged = merge(sources_of(case), method)
    assert {update.rank for update in merged.adapter.updates.values()} == {4, 8}
    save(merged, tmp_path / "merged")
    assert_deltas(Adapter.load(tmp_path / "merged"), case)
    assert_peft_loads(tmp_path / "merged", case)


def test_m08_a_wrong_number_of_weights_is_refused_with_both_counts():
    case = "M08_weight_count_and_names"
    with pytest.raises(OptionError) as caught:
        sources_of(case, weights=expected_of(case)["weights_bad"])
    assert_says(str(caught.value), case)
    with pytest.raises(OptionError, match="2 adapters and 1 weights"):
        sources_of(case, weights=[1.0])


@pytest.mark.parametrize("method", ["task-arithmetic", "average", "cat", "factor-average", "slerp"])
def test_m08_an_adapter_given_twice_at_a_half_is_itself(method):
    case = "M08_weight_count_and_names"
    merged = merge(sources_of(case, "a a", expected_of(case)["weights_twice"]), method, rank=4)
    assert merged.error < 1e-5
    assert_deltas(merged.adapter, case)


def test_m08_what_is_there_already_stays_unless_it_is_forced(tmp_path):
    case = "M08_weight_count_and_names"
    merged = merge(sources_of(case, "a a", expected_of(case)["weights_twice"]))
    there, other = tmp_path / "there", merge(sources_of(case, "a b", [1.0, 1.0]))
    save(other, there)
    with pytest.raises(FileError, match="there: exists already"):
        save(merged, there)
    assert_deltas(Adapter.load(there), case, {name: u.delta() for name, u in other.adapter.updates.items()})
    save(merged, there, force=True)
    assert_deltas(Adapter.load(there), case)
    (there / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match=r"holds more than an adapter \(notes.txt\)"):
        save(other, there, force=True)
    assert_deltas(Adapter.load(there), case)


def test_m10_ties_comes_out_as_by_hand():
    case = "M10_ties_by_hand"
    expected = expected_of(case)
    for names, key in (("a b", "result"), ("b a", "result"), ("a_neg b_neg", "negated_majority_rule")):
        merged = merge(sources_of(case, names), "ties", options={"density": expected["density"]})
        assert_deltas(merged.adapter, case, {"net.lin": torch.tensor(expected[key])})
    assert torch.equal(expected_deltas(case)["net.lin"], torch.tensor(expected["result"]))


@pytest.mark.parametrize("method", ["dare", "magnitude"])
def test_m11_at_density_1_nothing_is_thinned(method):
    case = "M11_density_edges"
    assert_deltas(merge(sources_of(case), method, options={"density": 1.0}).adapter, case)


@pytest.mark.parametrize("density", [0.0, 1.5, -0.1, math.nan])
@pytest.mark.parametrize("method", ["ties", "dare", "magnitude", "dare-ties", "della", "breadcrumbs"])
def test_m11_a_density_outside_of_its_range_is_refused_by_name(method, density):
    with pytest.raises(OptionError) as caught:
        merge(sources_of("M11_density_edges"), method, options={"density": density})
    assert_says(str(caught.value), "M11_density_edges")


@pytest.mark.parametrize("heads", [None, "average"])
def test_m13_heads_of_different_shapes_are_refused_with_their_shapes(heads):
    with pytest.raises(MismatchError) as caught:
        merge(sources_of("M13_heads_conflict"), heads=heads)
    assert_says(str(caught.value), "M13_heads_conflict")
    assert "\n" not in str(caught.value)


def test_m13_heads_that_differ_follow_an_option_and_are_refused_without(tmp_path):
    case = "M13_heads_conflict"
    sources = sources_of(case, "a c")
    with pytest.raises(MismatchError) as caught:
        merge(sources)
    for word in [*expected_of(case)["must_mention_ac"], "keep-own", "average", "first"]:
        assert word in str(caught.value)
    a, c = (adapter.tensors for adapter in sources.adapters)
    keys = sources.adapters[0].others
    assert any(not torch.equal(a[key], c[key]) for key in keys)
    for how, wanted in (("first", a), ("average", {key: (a[key] + c[key]) / 2 for key in keys})):
        made = merge(sources, heads=how)
        assert set(made.adapter.others) == set(keys)
        assert all(torch.allclose(made.adapter.tensors[key], wanted[key]) for key in keys)
    save(merge(sources, heads="keep-own"), tmp_path / "kept")
    assert not Adapter.load(tmp_path / "kept").others
    for label, own in (("a", a), ("c", c)):
        kept = load_file(tmp_path / "kept" / "heads" / f"{label}.safetensors")
        assert all(torch.equal(kept[key], own[key]) for key in keys)


def test_m13_first_takes_the_head_of_whichever_is_first():
    for names in ("a b", "b a"):
        sources = sources_of("M13_heads_conflict", names)
        made, own = merge(sources, heads="first").adapter, sources.adapters[0]
        assert all(torch.equal(made.tensors[key], own.tensors[key]) for key in own.others)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task-arithmetic", {}),
        ("average", {}),
        ("magnitude", {"density": 1.0}),
        ("core-space", {"inner": "task-arithmetic"}),
        ("knots", {"inner": "average"}),
    ],
)
def test_k16_half_precision_is_merged_in_single_precision(method, options):
    case = "K16_half_precision_product"
    merged = merge(sources_of(case, "adapter_bf16", [1.0]), method, options=options, dtype="float32")
    assert_deltas(merged.adapter, case)


@pytest.mark.parametrize("method", ["task-arithmetic", "average", "ties", "slerp"])
def test_k16_a_merge_whose_product_overflows_in_half_precision_is_finite(method, tmp_path):
    case = "K16_half_precision_product"
    options = {"density": 1.0} if method == "ties" else {}
    sources = sources_of(case, "adapter_fp16_overflow adapter_fp16_overflow", [0.5, 0.5])
    save(merge(sources, method, options=options, dtype="float32"), tmp_path / "merged")
    for update in Adapter.load(tmp_path / "merged").updates.values():
        torch.testing.assert_close(update.delta(), torch.full(update.shape, expected_of(case)["fp16_case_entry"]))


@pytest.mark.parametrize("folder", ["adapter", "adapter_weight_suffix"])
def test_r28_dora_is_merged_exactly_where_the_base_is_given(folder, tmp_path):
    case = "R28_dora"
    base = base_of([Adapter.load(CASES / case / folder)], str(CASES / expected_of(case)["base"]))
    for names, weights in ((folder, [1.0]), (f"{folder} {folder}", [0.25, 0.75])):
        merged = merge(sources_of(case, names, weights, base=base), "task-arithmetic")
        assert_deltas(merged.adapter, case)
    assert merged.adapter.why_not_additive is None
    save(merged, tmp_path / "merged")
    assert_peft_loads(tmp_path / "merged", case)


def test_r28_dora_without_the_base_is_refused_by_name():
    assert base_of([Adapter.load(CASES / "R28_dora/adapter")], None) is None
    with pytest.raises(TunerError) as caught:
        sources_of("R28_dora", "adapter", [1.0])
    assert_says(str(caught.value), "R28_dora")
    assert "no base model was given" in str(caught.value)
