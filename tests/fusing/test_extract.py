"""Adapters are found between checkpoints: at the rank that is there, with the error that is told, for PEFT to load."""

import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making_checkpoints import QV, in_peft, load_base, merged, train, write_base
from safetensors.torch import load_file, save_file

from lora_lab import hub
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.converting import DTYPES
from lora_lab.errors import LoraLabWarning, MismatchError, OptionError
from lora_lab.fusing.extract import ExtractOptions, cut, extract, noise_of
from lora_lab.fusing.fuse import Fusion
from lora_lab.fusing.verify import verify


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_base("llama", tmp_path_factory.mktemp("llama") / "base", torch.float32, hidden_size=32)


def write(folder, base, weights):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def save(found, folder):
    found.adapter.save(folder)
    return folder


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def close(one, other, tolerance=1e-5):
    return set(one) == set(other) and all(torch.allclose(one[n], other[n], rtol=0, atol=tolerance) for n in one)


# what was put in comes out

LORA = {
    "llama": peft.LoraConfig(r=4, target_modules=[*QV, "embed_tokens"], rank_pattern={"v_proj": 2}),
    "gpt2": peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj", "lm_head"], fan_in_fan_out=True),
    "vit": peft.LoraConfig(r=2, target_modules=["q_proj", "projection"]),
}


@pytest.mark.parametrize("name", LORA)
@pytest.mark.filterwarnings("ignore")
def test_what_was_fused_comes_out_at_its_rank_and_peft_merges_it_to_the_same(tmp_path, name):
    more = {"tie_word_embeddings": False} if name == "gpt2" else {}
    base = write_base(name, tmp_path / "base", torch.float32, **more)
    adapter = train(name, base, tmp_path / "a", LORA[name])
    wanted = merged(name, base, adapter)
    tuned = write(tmp_path / "tuned", base, wanted)
    found = extract(base, tuned, ExtractOptions(rank=8))
    source = Adapter.load(adapter)
    assert found.ranks == {module: site.rank for module, site in source.sites.items()}
    assert found.error < 1e-5
    assert not found.left
    assert found.equal == len(wanted) - len(found.ranks)
    assert close(merged(name, base, save(found, tmp_path / "b")), wanted)
    assert verify(base, [Adapter.load(tmp_path / "b")], tuned).right


def test_the_error_is_that_of_what_peft_makes_of_it(llama, tmp_path):
    weights = weights_of(llama)
    generator = torch.Generator().manual_seed(0)
    changed = [name for name in weights if "mlp" in name]
    tuned = {n: t + 0.01 * torch.randn(t.shape, generator=generator) * (n in changed) for n, t in weights.items()}
    found = extract(llama, write(tmp_path / "tuned", llama, tuned), ExtractOptions(rank=3))
    got = merged("llama", llama, save(found, tmp_path / "a"))
    lost = norm = 0.0
    for name in changed:
        S = torch.linalg.svdvals((tuned[name] - weights[name]).double())
        best = float(S[3:].norm() / S.norm())  # Eckart and Young
        assert found.errors[name.removesuffix(".weight")] == pytest.approx(best, rel=1e-4)
        off = float((got[name] - tuned[name]).norm())
        assert off == pytest.approx(best * float(S.norm()), rel=1e-3)
        lost, norm = lost + off**2, norm + float(S.norm()) ** 2
    assert found.error == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    assert all(rank == 3 for rank in found.ranks.values())
    assert found.adapter.record["extract"]["error"] == found.error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_the_tuned_weights_is_no_direction(tmp_path, dtype):
    base = write_base("llama", tmp_path / "base", dtype, hidden_size=32)
    adapter = train("llama", base, tmp_path / "a", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    Fusion(base, [Adapter.load(adapter)]).write(tmp_path / "tuned")
    found = extract(base, tmp_path / "tuned", ExtractOptions(rank=16))
    assert set(found.ranks.values()) == {2}
    assert 0 < found.error < 0.02
    again = extract(base, tmp_path / "tuned", ExtractOptions(energy=0.9, dtype="bfloat16"))
    assert max(again.ranks.values()) <= 2
    assert {tensor.dtype for tensor in again.adapter.tensors.values()} == {torch.bfloat16}


def test_a_cast_is_no_difference(llama, tmp_path):
    tuned = {name: tensor.bfloat16() for name, tensor in weights_of(llama).items()}
    tuned["model.layers.0.mlp.up_proj.weight"] += 0.1
    found = extract(llama, write(tmp_path / "tuned", llama, tuned), ExtractOptions(rank=4))
    assert set(found.ranks) == {"model.layers.0.mlp.up_proj"}
    assert found.equal == len(tuned) - 1


# what cannot be an adapter


@pytest.fixture
def odd(llama, tmp_path):
    """A tuned model with a norm, a larger vocabulary of its head and one projection changed."""
    weights = weights_of(llama)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    weights["lm_head.weight"] = torch.cat([weights["lm_head.weight"], torch.ones(3, 32)])
    weights["model.layers.0.self_attn.q_proj.weight"] += torch.ones(32, 32)
    return write(tmp_path / "tuned", llama, weights)


def test_what_differs_and_is_no_layer_s_weight_is_named(llama, odd):
    found = extract(llama, odd, ExtractOptions(rank=4))
    assert found.ranks == {"model.layers.0.self_attn.q_proj": 1}
    left = {each.parameter: each for each in found.left}
    assert set(left) == {"model.norm.weight", "lm_head.weight"}
    assert left["model.norm.weight"].share == pytest.approx(0.5)
    assert left["lm_head.weight"].why == "[43, 32], and [40, 32] in the base"
    assert not any(each.whole for each in found.left)
    assert not found.adapter.others


def test_it_is_saved_whole_where_that_is_asked_for(llama, tmp_path):
    weights = weights_of(llama)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    weights["model.layers.1.post_attention_layernorm.weight"] += 0.25
    weights["model.layers.0.self_attn.q_proj.weight"] += torch.ones(32, 32)
    tuned = write(tmp_path / "tuned", llama, weights)
    found = extract(llama, tuned, ExtractOptions(rank=4, keep_whole=True))
    assert all(each.whole for each in found.left)
    assert close(merged("llama", llama, save(found, tmp_path / "a")), weights)
    assert verify(llama, [Adapter.load(tmp_path / "a")], tuned).right


def test_biases_of_adapted_layers_come_along(tmp_path):
    base = write_base("bert", tmp_path / "base", torch.float32)
    weights = weights_of(base)
    names = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    for name in names:
        weights[f"{name}.weight"] += torch.ones(16, 16)
        weights[f"{name}.bias"] += 0.5
    weights["bert.encoder.layer.0.attention.self.key.bias"] += 0.5
    tuned = write(tmp_path / "tuned", base, weights)
    found = extract(base, tuned, ExtractOptions(rank=2, keep_whole=True))
    assert set(found.ranks) == set(names)
    assert close(merged("bert", base, save(found, tmp_path / "a")), {**merged_like(base), **weights})


def merged_like(base):
    return load_base("bert", base).state_dict()


def test_without_a_layer_that_differs_there_is_no_adapter(llama, tmp_path):
    with pytest.raises(MismatchError, match=r"base: no weight of a layer differs from .*base$"):
        extract(llama, llama, ExtractOptions(rank=4))
    weights = weights_of(llama)
    weights["model.norm.weight"] += 1
    tuned = write(tmp_path / "tuned", llama, weights)
    with pytest.raises(MismatchError, match=r"what differs is model\.norm\.weight"):
        extract(llama, tuned, ExtractOptions(rank=4))


def test_other_models_and_quantised_ones_are_one_line(llama, tmp_path):
    other = write_base("gpt2", tmp_path / "gpt2", torch.float32)
    with pytest.raises(MismatchError, match=r"have no parameter in common: lm_head.*, and transformer"):
        extract(llama, other, ExtractOptions(rank=4))
    small = write_base("llama", tmp_path / "small", torch.float32, hidden_size=16, vocab_size=30, intermediate_size=20)
    with pytest.raises(MismatchError, match=r"models of different sizes: lm_head\.weight is \[40, 32\] and \[30, 16\]"):
        extract(llama, small, ExtractOptions(rank=4))
    weights = weights_of(llama)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1.0
    with pytest.raises(MismatchError, match=r"up_proj\.weight is float8_e4m3fn, quantised"):
        extract(llama, write(tmp_path / "tuned", llama, weights), ExtractOptions(rank=4))


def test_how_much_is_kept_must_be_said():
    with pytest.raises(OptionError, match="`rank`, `energy` or `ratio`"):
        ExtractOptions()
    for wrong in ({"rank": 0}, {"energy": 1.5}, {"ratio": 0.5}, {"rank": 2, "dtype": "int8"}):
        with pytest.raises(OptionError):
            ExtractOptions(**wrong)


def test_untied_embeddings_are_told_apart(tmp_path):
    base = write_base("tied", tmp_path / "base", torch.float32)
    adapter = train("tied", base, tmp_path / "a", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLabWarning)
        Fusion(base, [Adapter.load(adapter)]).write(tmp_path / "tuned")
    found = extract(base, tmp_path / "tuned", ExtractOptions(rank=4))
    assert found.ranks == {"lm_head": 2}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = load_base("tied", tmp_path / "tuned")(input_ids=ids).logits
        got = in_peft("tied", base, save(found, tmp_path / "b"))(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


# the cut

SPECTRUM = st.lists(st.floats(min_value=0.1, max_value=10), min_size=2, max_size=12)


def matrix(spectrum, rows=40, columns=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(rows, len(spectrum), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(columns, len(spectrum), generator=generator, dtype=torch.float64))
    return U * torch.tensor(sorted(spectrum, reverse=True), dtype=torch.float64) @ V.T


@given(SPECTRUM, st.integers(min_value=1, max_value=14), st.floats(0.01, 1), st.floats(1, 50))
def test_the_rank_is_the_smallest_that_all_criteria_ask_for(spectrum, rank, energy, ratio):
    S = torch.tensor(sorted(spectrum, reverse=True), dtype=torch.float64)
    delta = matrix(spectrum)
    shares = S.square().cumsum(0) / S.square().sum()
    by_energy = int((shares < energy * (1 - 1e-9)).sum()) + 1
    by_ratio = int((S[0] / ratio * (1 + 1e-9) < S).sum())
    edge = bool(((S * ratio / S[0] - 1).abs() < 1e-6).any() or ((shares / energy - 1).abs() < 1e-6).any())
    if edge:  # rounding decides
        return
    made = {
        "rank": cut(delta, 1e-9, rank=rank),
        "energy": cut(delta, 1e-9, energy=energy),
        "ratio": cut(delta, 1e-9, ratio=ratio),
        "all": cut(delta, 1e-9, rank=rank, energy=energy, ratio=ratio),
    }
    wanted = {
        "rank": min(rank, len(S)),
        "energy": min(by_energy, len(S)),
        "ratio": max(by_ratio, 1) if ratio > 1 else 0,
    }
    wanted["all"] = min(wanted.values())
    for name, update in made.items():
        assert (update.rank if update else 0) == wanted[name], name
        if update:
            off = float((update.delta() - delta).norm())
            assert off == pytest.approx(float(S[wanted[name] :].norm()), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_large_matrices_are_cut_without_all_of_their_singular_values(energy):
    """A spectrum that falls slowly, so that more directions are needed than are tried at first."""
    spectrum = [1 / (1 + i / 60) for i in range(300)]
    delta = matrix(spectrum, 1100, 1040).float()
    S = torch.tensor(spectrum, dtype=torch.float64)
    wanted = int((S.square().cumsum(0) / S.square().sum() < energy).sum()) + 1
    update = cut(delta, 1e-6, energy=energy)
    assert wanted <= update.rank <= wanted + 2
    lost = float((update.delta() - delta).norm() / delta.norm())
    assert lost == pytest.approx(float(S[update.rank :].norm() / S.norm()), rel=0.01)


def test_rounding_alone_is_below_the_noise_and_a_direction_above_it():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        exact = torch.randn(200, 300, generator=generator, dtype=torch.float64)
        rounded = exact.to(dtype)
        largest = float(torch.linalg.svdvals(rounded.double() - exact)[0])
        noise = noise_of(rounded)
        assert largest < noise < 4 * largest
        if dtype != torch.float32:  # widened, it is as coarse as before
            assert noise_of(rounded.double()) == pytest.approx(noise)


def test_types_have_the_names_that_they_have_everywhere():
    assert ExtractOptions(rank=1, dtype="bf16").dtype == "bf16"
    assert DTYPES.items() >= hub.DTYPES.items()


def test_stacks_of_experts_are_named_as_left_alone(tmp_path):
    base = write_base("experts", tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    adapter = train("experts", base, tmp_path / "a", config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_peft("experts", base, adapter).merge_and_unload().save_pretrained(tmp_path / "tuned")
    found = extract(base, tmp_path / "tuned", ExtractOptions(rank=2))
    assert {left.parameter: left.why for left in found.left} == {
        f"model.layers.{i}.mlp.experts.gate_up_proj": "a stack of 3 weights (experts)" for i in (0, 1)
    }
    assert all("q_proj" in name for name in found.ranks)
