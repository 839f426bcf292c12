"""Right merges are called right, and wrong ones made on purpose by the name of what is wrong with them."""

import json
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making_checkpoints import QV, in_peft, load_base, merged, train, write_base
from safetensors.torch import load_file, save_file

from lora_lab import files
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import LoraLabWarning, MismatchError
from lora_lab.fusing.changes import Change
from lora_lab.fusing.fuse import FuseOptions, Fusion
from lora_lab.fusing.measuring import Weight
from lora_lab.fusing.verify import verify

PLAIN = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*QV, "up_proj"])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def made(request, tmp_path_factory):
    """A base, an adapter of it, and base and ΔW by parameter."""
    folder = tmp_path_factory.mktemp("made")
    base = write_base("llama", folder / "base", request.param, hidden_size=32)
    adapter = train("llama", base, folder / "a", PLAIN)
    weights = load_file(base / "model.safetensors")
    deltas = {f"{name}.weight": u.delta() for name, u in Adapter.load(adapter).updates.items()}
    return base, adapter, weights, deltas


def write(folder, base, weights):
    """A checkpoint of these weights with the base's configuration."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def verified(base, adapters, checkpoint, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLabWarning)
        loaded = [Adapter.load(adapter) for adapter in adapters]
    return verify(base, loaded, checkpoint, **options)


def kinds(found):
    return {finding.parameter: finding.kind for finding in found.findings}


def fused(weights, deltas, factor=1.0, dtype=None):
    """base + factor · ΔW in its dtype, rounded once."""
    return {
        name: (tensor.float() + factor * deltas.get(name, 0)).to(dtype or tensor.dtype)
        for name, tensor in weights.items()
    }


# right merges


def test_what_is_fused_here_is_exact(made, tmp_path):
    base, adapter, _, deltas = made
    Fusion(base, [Adapter.load(adapter)], FuseOptions(max_shard_size=2e-5)).write(tmp_path / "m")
    found = verified(base, [adapter], tmp_path / "m")
    assert found.right
    assert kinds(found) == dict.fromkeys(sorted(deltas), "exact") | kinds(found)
    assert set(kinds(found)) == set(deltas)
    assert found.verdict == f"yes: base + adapter, exactly, in all {len(deltas)} parameters that are adapted"
    assert found.unchanged == len(load_file(base / "model.safetensors")) - len(deltas)


def test_what_peft_merged_and_transformers_saved_is_right(made, tmp_path):
    base, adapter, _, _ = made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_peft("llama", base, adapter).merge_and_unload().save_pretrained(tmp_path / "m")
    found = verified(base, [adapter], tmp_path / "m")
    assert found.right, found.verdict
    assert found.verdict.startswith("yes: base + adapter, ")


@pytest.mark.parametrize("cast_first", [True, False])
def test_a_merge_in_another_dtype_is_right_up_to_rounding(made, tmp_path, cast_first):
    base, adapter, weights, deltas = made
    start = {name: t.to(torch.bfloat16) for name, t in weights.items()} if cast_first else weights
    made_in = fused(start, {name: d.bfloat16() for name, d in deltas.items()}, dtype=torch.bfloat16)
    found = verified(base, [adapter], write(tmp_path / "m", base, made_in))
    assert found.right, found.verdict
    assert all(kind in ("exact", "rounding") for kind in kinds(found).values())
    for dtype in (torch.float32, torch.float16):  # stored in another dtype since
        back = {name: t.to(dtype) for name, t in made_in.items()}
        found = verified(base, [adapter], write(tmp_path / str(dtype), base, back))
        assert found.right, found.verdict
        assert set(kinds(found).values()) == {"rounding"}
        words = f"up to rounding of bfloat16, stored as {str(dtype).removeprefix('torch.')}, in all 6 parameters"
        assert words in found.verdict
    wrong = {name: t.half() for name, t in fused(weights, deltas, 0.5, torch.bfloat16).items()}
    assert set(kinds(verified(base, [adapter], write(tmp_path / "half", base, wrong))).values()) == {"scaled"}


def test_weights_that_fit_fewer_digits_by_chance_are_exact(tmp_path):
    base, update = torch.ones(4, 6).half(), LowRank(torch.ones(1, 6), 0.5 * torch.ones(4, 1))
    weight = Weight(base, base + 0.5, Change(update=update), torch.device("cpu"))
    assert (weight.measure().kind, weight.measure().rounding) == ("exact", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=QV, use_dora=True),
        peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["lm_head", "input_layernorm"]),
        peft.LoraConfig(r=2, target_modules=QV, trainable_token_indices=[1, 3]),
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=QV),
        peft.LoHaConfig(r=2, target_modules=QV),
    ],
    ids=range(5),
)
def test_other_tuners_and_heads_are_right_or_missing(tmp_path, config):
    base = write_base("llama", tmp_path / "base", torch.float32)
    adapter = train("llama", base, tmp_path / "a", config)
    wanted = merged("llama", base, adapter)
    assert verified(base, [adapter], write(tmp_path / "m", base, wanted)).right
    found = verified(base, [adapter], base)
    assert not found.right
    assert set(kinds(found).values()) <= {"missing", "head"}


def test_several_adapters_are_verified_by_their_sum(made, tmp_path):
    base, adapter, weights, deltas = made
    other = train("llama", base, tmp_path / "b", peft.LoraConfig(r=2, target_modules=["q_proj"]), seed=4)
    more = {f"{name}.weight": u.delta() for name, u in Adapter.load(other).updates.items()}
    both = {name: deltas.get(name, 0) - 0.5 * more.get(name, 0) for name in {**deltas, **more}}
    checkpoint = write(tmp_path / "m", base, fused(weights, both))
    assert verified(base, [adapter, other], checkpoint, coefficients=(1, -0.5)).right
    found = verified(base, [adapter], checkpoint)
    assert {kind for name, kind in kinds(found).items() if "q_proj" in name} == {"other"}
    assert all(kind in ("exact", "rounding") for name, kind in kinds(found).items() if "q_proj" not in name)


# wrong merges


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.5, "as if the scale alpha / rank = 2 were left out"),
        (2.0, "as if the scale alpha / rank = 2 were applied twice|as if it were added twice"),
        (-1.0, "as if it were taken away"),
        (1.3, r"\(× 1.3\)|\(× 1.29\)|\(× 1.31\)"),
    ],
)
def test_a_wrong_factor_is_measured_and_explained(made, tmp_path, factor, words):
    base, adapter, weights, deltas = made
    found = verified(base, [adapter], write(tmp_path / "m", base, fused(weights, deltas, factor)))
    assert not found.right
    assert set(kinds(found).values()) == {"scaled"}
    assert all(finding.factor == pytest.approx(factor, rel=5e-3) for finding in found.findings)
    assert __import__("re").search(words, found.verdict), found.verdict
    assert found.verdict.startswith(f"no: {len(deltas)} of {len(deltas)} have ΔW times a factor")


def test_a_factor_near_one_is_told_where_the_dtype_shows_it(made, tmp_path):
    base, adapter, weights, deltas = made
    found = verified(base, [adapter], write(tmp_path / "m", base, fused(weights, deltas, 1.004)))
    if weights["model.norm.weight"].dtype == torch.bfloat16:
        assert found.right  # as far as it tells
    else:
        assert f"{len(deltas)} of {len(deltas)} have ΔW times a factor (× 1.004)" in found.verdict


def test_a_merge_that_was_not_done_or_left_a_module_out_is_told(made, tmp_path):
    base, adapter, weights, deltas = made
    found = verified(base, [adapter], base)
    assert found.verdict == f"no: {len(deltas)} of {len(deltas)} are as in the base, without ΔW"
    left = sorted(deltas)[2]
    partly = fused(weights, {name: delta for name, delta in deltas.items() if name != left})
    found = verified(base, [adapter], write(tmp_path / "m", base, partly))
    assert [name for name, kind in kinds(found).items() if kind == "missing"] == [left]
    assert found.verdict == f"no: 1 of {len(deltas)} are as in the base, without ΔW"


def test_a_transposed_update_is_told(made, tmp_path):
    base, adapter, weights, deltas = made
    name = next(name for name in deltas if "q_proj" in name)
    found = verified(base, [adapter], write(tmp_path / "m", base, fused(weights, {**deltas, name: deltas[name].T})))
    assert [n for n, kind in kinds(found).items() if kind not in ("exact", "rounding")] == [name]
    assert kinds(found)[name] == "transposed"
    assert "1 of 6 have ΔW transposed" in found.verdict


def test_parts_of_a_fused_weight_in_another_order_are_neither(made, tmp_path):
    base, adapter, weights, deltas = made
    name = next(name for name in deltas if "up_proj" in name)
    rolled = torch.roll(deltas[name], 8, 0)
    found = verified(base, [adapter], write(tmp_path / "m", base, fused(weights, {**deltas, name: rolled})))
    (finding,) = [finding for finding in found.findings if not finding.right]
    assert (finding.parameter, finding.kind) == (name, "other")
    expected = float((rolled - deltas[name]).norm() / deltas[name].norm())
    assert finding.residual == pytest.approx(expected, rel=0.05)


def test_what_else_changed_is_told(made, tmp_path):
    base, adapter, weights, deltas = made
    right = fused(weights, deltas)
    right["model.norm.weight"] = right["model.norm.weight"] * 1.5
    del right["model.layers.1.mlp.down_proj.weight"]
    right["extra.weight"] = torch.ones(2)
    found = verified(base, [adapter], write(tmp_path / "m", base, right))
    wrong = {finding.parameter: finding for finding in found.findings if not finding.right}
    assert {name: finding.kind for name, finding in wrong.items()} == {
        "model.norm.weight": "unnamed",
        "model.layers.1.mlp.down_proj.weight": "absent",
        "extra.weight": "added",
    }
    assert wrong["model.norm.weight"].residual == pytest.approx(0.5)
    assert "1 changed though no adapter names them" in found.verdict


def test_the_experts_of_a_layer_are_compared_as_the_adapter_sees_them(tmp_path):
    base = write_base("experts", tmp_path / "base", torch.float32)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    adapter = train("experts", base, tmp_path / "a", config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_peft("experts", base, adapter).merge_and_unload().save_pretrained(tmp_path / "m")
    found = verified(base, [adapter], tmp_path / "m")
    assert found.right
    assert set(kinds(found)) == {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)}


def test_peft_s_merge_of_one_of_two_tied_embeddings_is_not_the_adapted_model(tmp_path):
    base = write_base("tied", tmp_path / "base", torch.float32)
    adapter = train("tied", base, tmp_path / "a", peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_peft("tied", base, adapter).merge_and_unload().save_pretrained(tmp_path / "m")
        loaded = Adapter.load(adapter)
    found = verified(base, [adapter], tmp_path / "m")
    assert kinds(found) == {
        "model.embed_tokens.weight": kinds(found)["model.embed_tokens.weight"],
        "lm_head.weight": "unnamed",
    }
    assert not found.right
    Fusion(base, [loaded]).write(tmp_path / "ours")
    assert verified(base, [adapter], tmp_path / "ours").right


def test_shards_and_quantised_checkpoints(made, tmp_path):
    base, adapter, weights, deltas = made
    checkpoint = write(tmp_path / "m", base, fused(weights, deltas))
    config = json.loads((base / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(MismatchError, match=r"m: its weights are quantised \(gptq\)"):
        verified(base, [adapter], checkpoint)
    assert load_base("llama", base) is not None
    assert files.open_checkpoint(base).keys() == weights.keys()


# one weight


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(min_value=-6, max_value=-1),
    st.sampled_from([1.0, 0.5, 2.0, 0.25, -1.0, 1.7]),
    st.integers(min_value=0, max_value=99),
)
def test_the_factor_is_found_whatever_the_size_of_the_update(dtype, power, factor, seed):
    """From updates far below a step of the weight to larger ones; too small ones cannot be told from no update."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(96, 80, generator=generator) * 0.02).to(dtype)
    A, B = torch.randn(4, 80, generator=generator), torch.randn(96, 4, generator=generator) * 10**power
    update = LowRank(A, B)
    merged_weight = (base.float() + factor * update.delta()).to(dtype)
    found = Weight(base, merged_weight, Change(update=update), torch.device("cpu")).measure()
    visible = (merged_weight != base).float().mean()
    if factor == 1:
        assert found.kind == "exact"
    elif visible > 0.05:
        assert found.kind == "scaled"
        assert found.factor == pytest.approx(factor, rel=0.05)
    elif visible == 0:
        assert found.kind in ("missing", "exact")
