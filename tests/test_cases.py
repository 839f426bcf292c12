"""Each case folder comes out as its expected.json says."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_lab.adapter import Adapter
from lora_lab.errors import LoraLabError, LoraLabWarning, TunerError
from lora_lab.lowrank import combine, combine_factors

CASES = Path(__file__).parent / "cases"

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
