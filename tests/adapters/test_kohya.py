"""Kohya's files: ΔW against dense formulas, what is written, and what is refused."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_lab import Adapter, inspect
from lora_lab.errors import AdapterError, LoraLabWarning, TunerError
from tests.adapters.test_cases import CASES, expected_deltas, expected_of

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SGM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
MIDDLE = "lora_unet_mid_block_attentions_0_proj_in"
FULL = {
    UNET: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    CONV: "unet.down_blocks.0.resnets.0.conv1",
    TEXT: "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    SGM: "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(name=UNET, rank=4, rows=6, columns=5, alpha=2.0, kernel=(), seed=0):
    tensors = {
        f"{name}.lora_down.weight": random(rank, columns, *kernel, seed=seed),
        f"{name}.lora_up.weight": random(rows, rank, *[1] * len(kernel), seed=seed + 1),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def saved(path, tensors, header=None):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, header)
    return path


def load(tmp_path, tensors, **options):
    return Adapter.load(saved(tmp_path / "in.safetensors", tensors), **options)


def problems(tmp_path, tensors):
    return inspect(saved(tmp_path / "in.safetensors", tensors)).problems


def one(adapter):
    (update,) = adapter.updates.values()
    return update


def test_k01_each_module_has_the_scale_of_its_alpha():
    path = "K01_kohya_alpha/kohya.safetensors"
    expected, deltas = expected_of(path), expected_deltas(path)
    adapter = Adapter.load(CASES / path)
    query = "text_model.encoder.layers.0.self_attn.q_proj"
    names = {"lora_te_text_model_encoder_layers_0_self_attn_q_proj": f"text_encoder.{query}"}
    assert len(adapter.updates) == len(deltas) == 3
    for own, delta in deltas.items():
        name = names.get(own) or FULL[UNET].replace("to_q", "to_out.0" if own.endswith("to_out_0") else "to_q")
        torch.testing.assert_close(adapter.updates[name].delta(), delta, rtol=expected["rtol"], atol=1e-6)
        assert adapter.sites[name].scale == expected["modules"][own]["scaling"]
    assert adapter.total_norm == pytest.approx(expected["total_delta_fro"], rel=1e-5)


def test_the_update_is_up_times_down_times_alpha_by_rank(tmp_path):
    tensors = pair(alpha=3.0)
    adapter = load(tmp_path, tensors)
    assert list(adapter.sites) == [FULL[UNET]]
    wanted = 0.75 * tensors[f"{UNET}.lora_up.weight"] @ tensors[f"{UNET}.lora_down.weight"]
    torch.testing.assert_close(one(adapter).delta(), wanted)


def test_without_alpha_the_scale_is_one_or_what_is_given(tmp_path):
    tensors = pair(alpha=None)
    with pytest.warns(LoraLabWarning, match="1 of 1 modules have no alpha tensor: scale 1"):
        assert load(tmp_path, tensors).sites[FULL[UNET]].scale == 1
    assert load(tmp_path, tensors, alpha=2).sites[FULL[UNET]].scale == 0.5
    mixed = {**tensors, **pair(TEXT, alpha=1.0)}
    with pytest.warns(LoraLabWarning, match="alpha 2 is not used where the file has alpha tensors"):
        scales = {name: site.scale for name, site in load(tmp_path, mixed, alpha=2).sites.items()}
    assert scales == {FULL[UNET]: 0.5, FULL[TEXT]: 0.25}


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (3,), (2, 3, 3)])
def test_a_convolution_is_the_product_over_its_kernel(tmp_path, kernel):
    tensors = pair(CONV, kernel=kernel, alpha=8.0)
    update = one(load(tmp_path, tensors))
    up, down = tensors[f"{CONV}.lora_up.weight"].flatten(1), tensors[f"{CONV}.lora_down.weight"]
    torch.testing.assert_close(update.delta(), 2 * torch.einsum("or,r...->o...", up, down))
    assert update.shape == (6, 5, *kernel)


@pytest.mark.parametrize("thin", ["lora_up", "lora_down"])
def test_half_of_a_pointwise_convolution_may_be_a_matrix(tmp_path, thin):
    tensors = pair(CONV, kernel=(1, 1), alpha=4.0)
    wanted = (tensors[f"{CONV}.lora_up.weight"].flatten(1) @ tensors[f"{CONV}.lora_down.weight"].flatten(1))[
        ..., None, None
    ]
    tensors[f"{CONV}.{thin}.weight"] = tensors[f"{CONV}.{thin}.weight"].flatten(1)
    torch.testing.assert_close(one(load(tmp_path, tensors)).delta(), wanted)


@pytest.mark.parametrize("kernel", [(3, 3), (3,)])
def test_a_core_is_multiplied_in(tmp_path, kernel):
    ones = [1] * len(kernel)
    up, mid, down = random(6, 4, *ones), random(4, 4, *kernel), random(4, 5, *ones)
    tensors = {f"{CONV}.lora_{part}.weight": t for part, t in (("up", up), ("mid", mid), ("down", down))}
    update = one(load(tmp_path, {**tensors, f"{CONV}.alpha": torch.tensor(2.0)}))
    wanted = 0.5 * torch.einsum("oa,abk,bi->oik", up.flatten(1), mid.flatten(2), down.flatten(1))
    torch.testing.assert_close(update.delta(), wanted.reshape(6, 5, *kernel))
    assert update.rank == 4


def test_a_core_between_matrices_is_no_pair(tmp_path):
    tensors = {**pair(), f"{UNET}.lora_mid.weight": random(4, 3, 3, 3)}
    assert problems(tmp_path, tensors)[0].endswith(
        f"{UNET}: lora_down, lora_up and lora_mid of shapes [4, 5] and [6, 4] and [4, 3, 3, 3] do not fit together"
    )


@pytest.mark.parametrize(("name", "kernel"), [(UNET, ()), (CONV, (3, 3))])
def test_a_dora_scale_for_each_output_is_pefts_magnitude(tmp_path, name, kernel):
    """W' = m (W + ΔW) / ‖W + ΔW‖ by rows, as LyCORIS and ComfyUI have it, against PEFT's layer."""
    import peft

    layer = torch.nn.Conv2d(5, 6, kernel, bias=False) if kernel else torch.nn.Linear(5, 6, bias=False)
    inner = model = torch.nn.ModuleDict({})
    path = FULL[name].split(".")[1:]
    for part in path[:-1]:
        if part not in inner:
            inner[part] = torch.nn.ModuleDict({})
        inner = inner[part]
    inner[path[-1]] = layer
    weight, magnitude = layer.weight.detach().clone(), random(6, *[1] * max(1, len(kernel) + 1)).abs() + 0.1
    tensors = {**pair(name, kernel=kernel, alpha=2.0), f"{name}.dora_scale": magnitude}
    adapter = load(tmp_path, tensors)
    assert "DoRA" in adapter.why_not_additive
    adapter.save(tmp_path / "peft", format="peft")
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "peft/unet").merge_and_unload()
    got = merged.get_submodule(".".join(path)).weight
    up, down = tensors[f"{name}.lora_up.weight"].flatten(1), tensors[f"{name}.lora_down.weight"]
    full = weight + 0.5 * torch.einsum("or,r...->o...", up, down)
    norm = full.flatten(1).norm(dim=1).reshape(magnitude.shape)
    torch.testing.assert_close(got, magnitude * full / norm)


def test_a_dora_scale_for_each_input_is_refused_by_name(tmp_path):
    found = problems(tmp_path, {**pair(), f"{UNET}.dora_scale": torch.ones(1, 5)})
    assert len(found) == 1
    assert f"{UNET}.dora_scale: a DoRA magnitude for each input" in found[0]


@st.composite
def files(draw):
    """A file of a few modules, with convolutions, cores, DoRA, several dtypes, ranks and alphas."""
    seed = draw(st.integers(0, 2**20))
    tensors = {}
    dora = draw(st.booleans())
    for name in draw(
        st.lists(
            st.sampled_from([UNET, CONV, TEXT, SGM.replace("input_blocks_4_1", "mid_block_attentions_0")]),
            min_size=1,
            unique=True,
        )
    ):
        kernel = draw(st.sampled_from([(1, 1), (3, 3)])) if name == CONV else ()
        rank = draw(st.integers(1, 6))
        alpha = draw(st.none() | st.floats(0.0625, 64, width=32))
        part = pair(name, rank, 6, 5, alpha, kernel, seed)
        if dora:
            part[f"{name}.dora_scale"] = random(6, *[1] * (1 + len(kernel)), seed=seed)
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        tensors |= {key: tensor.to(dtype) if not key.endswith("alpha") else tensor for key, tensor in part.items()}
    return tensors


@settings(max_examples=40, deadline=None)
@given(tensors=files())
@pytest.mark.filterwarnings("ignore::lora_lab.errors.LoraLabWarning")
def test_what_is_written_is_what_was_read(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("trip")
    before = load(folder, tensors)
    before.save(folder / "out.safetensors")
    written = load_file(folder / "out.safetensors")
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype
        assert torch.equal(written[key], tensor), key
    assert all(key in tensors or key.endswith(".alpha") for key in written)
    after = Adapter.load(folder / "out.safetensors")
    assert after.config["target_modules"] == before.config["target_modules"]
    assert after.layout.names == before.layout.names
    before.save(folder / "peft", format="peft")
    by_peft = Adapter.load(folder / "peft")
    for other in (after, by_peft):
        assert {name: site.scale for name, site in other.sites.items()} == {
            name: site.scale for name, site in before.sites.items()
        }
        assert all(torch.equal(other.tensors[key], tensor) for key, tensor in before.tensors.items())


@pytest.mark.filterwarnings("ignore:.*stay as they are")
@pytest.mark.parametrize(
    ("names", "scheme"),
    [
        ([SGM, "lora_te1_text_model_encoder_layers_0_mlp_fc1"], "sgm numbered"),
        ([UNET, TEXT], ""),
        (["lora_unet_output_blocks_2_1_conv"], "sgm narrow"),
        (["lora_unet_double_blocks_0_img_attn_qkv", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"], "numbered"),
        (
            ["lora_te2_encoder_block_0_layer_0_SelfAttention_q", "lora_unet_double_blocks_0_img_mlp_0"],
            "numbered second",
        ),
        (["lycoris_transformer_blocks_0_attn_to_q"], "lycoris"),
        (["lora_unet_frobnicator_7"], ""),
    ],
)
def test_every_scheme_is_written_as_it_was_read(tmp_path, names, scheme):
    tensors = {key: tensor for name in names for key, tensor in pair(name).items()}
    adapter = Adapter.load(saved(tmp_path / "in.safetensors", tensors))
    assert adapter.layout.names == scheme
    adapter.save(tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()


def test_a_name_that_is_not_known_stays_and_is_told(tmp_path):
    with pytest.warns(LoraLabWarning, match="1 names of modules are not known and stay as they are: lora_unet_frob_7"):
        adapter = load(tmp_path, pair("lora_unet_frob_7"))
    assert list(adapter.updates) == ["lora_unet_frob_7"]


def test_an_adapter_in_pefts_format_is_written_by_the_names_of_its_model(tmp_path):
    for name in (SGM, "lora_unet_output_blocks_2_2_conv"):
        load(tmp_path, pair(name, kernel=(3, 3) if name.endswith("conv") else ())).save(tmp_path / name, format="peft")
    adapter = Adapter.load(tmp_path / SGM)
    adapter.save(tmp_path / "sd.safetensors", format="kohya")  # one layer deep, as in SD
    assert f"{SGM.replace('input_blocks_4_1', 'down_blocks_1_attentions_0')}.alpha" in load_file(
        tmp_path / "sd.safetensors"
    )
    deep = load(tmp_path, pair(SGM.replace("transformer_blocks_0", "transformer_blocks_1")))
    deep.save(tmp_path / "deep", format="peft")
    Adapter.load(tmp_path / "deep").save(tmp_path / "xl.safetensors", format="kohya")
    assert all(key.startswith("lora_unet_input_blocks_4_1_") for key in load_file(tmp_path / "xl.safetensors"))


def test_modules_without_a_flat_name_are_refused_with_their_names(tmp_path):
    from tests.making_adapters import lora, write

    adapter = Adapter.load(write(tmp_path / "llm", lora("model.layers.0.self_attn.q_proj")))
    with pytest.raises(
        AdapterError, match=r"a kohya file has no name that is known for 1 of 1 modules: model\.layers\.0\.self"
    ):
        adapter.save(tmp_path / "out.safetensors", format="kohya")
    assert not (tmp_path / "out.safetensors").exists()


def header_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


HEADER = {
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": "2", "algo": "locon"}),
    "ss_base_model_version": "sd_v1",
    "modelspec.title": "a title",
    "sshs_model_hash": "ab",
}


def test_metadata_is_kept_and_says_the_new_ranks(tmp_path):
    tensors = {**pair(UNET), **pair(CONV, kernel=(3, 3), rank=3, alpha=3.0)}
    adapter = Adapter.load(saved(tmp_path / "in.safetensors", tensors, HEADER))
    pruned = adapter.with_updates({n: u.truncate(2)[0] for n, u in adapter.updates.items()}, source="pruned")
    pruned.save(tmp_path / "out.safetensors")
    header = header_of(tmp_path / "out.safetensors")
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "2"
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2", "algo": "locon"}
    assert (header["ss_base_model_version"], header["modelspec.title"]) == ("sd_v1", "a title")
    assert header["ss_network_module"] == "lycoris.kohya"
    assert "sshs_model_hash" not in header
    alphas = {key: float(t) for key, t in load_file(tmp_path / "out.safetensors").items() if key.endswith("alpha")}
    assert alphas == {f"{UNET}.alpha": 2, f"{CONV}.alpha": 2}


def test_uneven_ranks_are_called_dynamic(tmp_path):
    load(tmp_path, {**pair(UNET), **pair(TEXT, rank=3)}).save(tmp_path / "out.safetensors")
    header = header_of(tmp_path / "out.safetensors")
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "2")
    assert "ss_network_args" not in header


def test_what_belongs_to_no_module_is_kept_and_told(tmp_path):
    tensors = {**pair(), "bundle_emb.cat.string_to_param.*": random(2, 8)}
    with pytest.warns(LoraLabWarning, match="1 tensors that belong to no module are kept as they are: bundle_emb"):
        adapter = load(tmp_path, tensors)
    adapter.save(tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["bundle_emb.cat.string_to_param.*"], random(2, 8))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({f"{UNET}.alpha": torch.ones(2)}, f"{UNET}.alpha: an alpha of shape [2]; one number belongs there"),
        ({f"{UNET}.alpha": torch.tensor(math.nan)}, f"{UNET}.alpha: an alpha of nan; a finite number belongs there"),
        ({f"{UNET}.alpha": torch.tensor(0.0)}, f"{UNET}.alpha: an alpha of 0, which some programs take for no update"),
        ({f"{UNET}.lora_up.weight": random(6, 3)}, f"{UNET}: lora_down and lora_up of shapes [4, 5] and [6, 3] are no"),
        ({f"{UNET}.lora_up.weight": random(6)}, f"{UNET}: lora_down and lora_up of shapes [4, 5] and [6] are no pair"),
        ({f"{UNET}.lora_up.weight": random(6, 4, 3, 3)}, f"{UNET}: lora_down and lora_up of shapes"),
        ({f"{UNET}.lora_up.weight": torch.ones(6, 4, dtype=torch.int8)}, f"{UNET}: factors of torch.float32 and"),
        ({f"{UNET}.lora_up.weight": None}, f"{UNET}.lora_down.weight: half of its pair is missing"),
        ({f"{TEXT}.alpha": torch.tensor(1.0)}, f"{TEXT}.alpha: the factors that it belongs to are missing"),
        (pair(SGM), "two schemes; a file is of one model"),
        ({**pair(TEXT), **pair(TEXT.replace("te_", "te1_"))}, "two names of one module"),
        (pair(UNET.replace("down_blocks_0_attentions_0", "input_blocks_1_1")), "two names of one module"),
        (pair("diffusion_model.double_blocks.0.img_mlp.0"), "two schemes; a file is of one model"),
        ({f"{UNET}.lora_A.weight": random(4, 5)}, f"{UNET}.lora_down.weight: two tensors for one place"),
        ({f"{UNET}.diff_b": random(6)}, f"{UNET}.diff_b: a change of a bias"),
        ({f"{UNET}.lora_down.0.weight": random(6)}, f"{UNET}.lora_down.0.weight: changes the model"),
        ({"x.weight_mask": random(6)}, "x.weight_mask: changes the model in a way that is not known here"),
        ({f"{UNET}.lora_up.weight": random(6, 4) / 0}, "non-finite values"),
        ({f"{UNET}.dora_scale": torch.ones(4)}, f"{UNET}.dora_scale: a DoRA magnitude of shape [4] for 6 outputs"),
        ({"lora_unet_\x07.alpha": torch.ones(1)}, "characters that cannot be printed"),
    ],
)  # fmt: skip
def test_a_broken_file_is_told_in_one_line_that_names_the_tensor(tmp_path, change, line):
    tensors = {**pair(), **change}
    found = problems(tmp_path, {key: tensor for key, tensor in tensors.items() if tensor is not None})
    assert any(line in problem for problem in found), found
    assert not any("\n" in problem for problem in found)
    with pytest.raises(AdapterError):
        Adapter.load(tmp_path / "in.safetensors")


def test_the_same_fault_of_many_tensors_is_one_line(tmp_path):
    tensors = {f"lora_unet_blocks_{i}_attn_to_q.alpha": torch.ones(2) for i in range(3_300)}
    tensors |= {f"lora_unet_blocks_{i}_attn_to_q.lora_down.weight": torch.ones(1, 1) for i in range(3_300)}
    tensors |= {f"lora_unet_blocks_{i}_attn_to_q.lora_up.weight": torch.ones(1, 1) for i in range(3_300)}
    found = problems(tmp_path, tensors)
    assert len(found) == 1
    assert "(3300 in all): an alpha of shape [2]" in found[0]


def test_other_tuners_and_tensors_that_have_no_place_are_refused_by_name(tmp_path):
    from tests.making_adapters import lora, write

    name = FULL[TEXT]
    heads = {**lora(name), "base_model.model.unet.conv_in.weight": random(3, 3)}
    with pytest.raises(TunerError, match=r"a kohya file has no place for tensors beside the adapter's own .*conv_in"):
        Adapter.load(write(tmp_path / "a", heads)).save(tmp_path / "x.safetensors", format="kohya")
    embedding = {
        f"base_model.model.{name}.lora_embedding_A": random(2, 8),
        f"base_model.model.{name}.lora_embedding_B": random(4, 2),
    }
    with pytest.raises(TunerError, match=r"a kohya file has no place for .*mlp\.fc1 .embedding."):
        Adapter.load(write(tmp_path / "b", embedding)).save(tmp_path / "x.safetensors", format="kohya")
    assert not (tmp_path / "x.safetensors").exists()
