"""diffusers' files: its own pipelines load what is written with the right ΔW, and what it writes is read."""

import json
import warnings

import pytest
import torch
from making_adapters import write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.reading import inspect
from lora_lab.adapters.formats.diffusion.components import by_component
from lora_lab.errors import AdapterError, LoraLabWarning, OptionError, TunerError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
CLIP = "text_model.encoder.layers"
MODULES = {
    "unet": [
        f"{BLOCK}.attn1.to_q",
        f"{BLOCK}.attn2.to_k",
        f"{BLOCK}.attn1.to_out.0",
        f"{BLOCK}.ff.net.0.proj",
        "conv_in",
        "down_blocks.0.resnets.0.conv1",
        "mid_block.attentions.0.proj_in",
    ],
    "text_encoder": [f"{CLIP}.0.self_attn.q_proj", f"{CLIP}.1.self_attn.out_proj", f"{CLIP}.1.mlp.fc1"],
    "text_encoder_2": [f"{CLIP}.1.self_attn.q_proj", f"{CLIP}.1.self_attn.v_proj"],
    "transformer": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.add_k_proj",
        "single_transformer_blocks.0.proj_out",
        "proj_out",  # of which the one before ends
        "transformer_blocks.0.ff.net.2",
    ],
}


@pytest.fixture(scope="module")
def pipelines():
    """Builds a tiny random SD 1.5, SDXL or Flux pipeline, without a hub; skipped where diffusers is not installed."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def clip(kind):
        sizes = {"hidden_size": 8, "intermediate_size": 12, "projection_dim": 6, "vocab_size": 20}
        depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 8}
        return kind(CLIPTextConfig(**sizes, **depth))

    def unet():
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
        )

    def flux():
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 0),
        )

    def build(kind):
        torch.manual_seed(0)
        one = {"vae": None, "tokenizer": None, "text_encoder": clip(CLIPTextModel)}
        two = {**one, "tokenizer_2": None, "text_encoder_2": None}
        euler = diffusers.EulerDiscreteScheduler(steps_offset=1)
        if kind == "sd":
            off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return diffusers.StableDiffusionPipeline(**one, unet=unet(), scheduler=euler, **off)
        if kind == "sdxl":
            two["text_encoder_2"] = clip(CLIPTextModelWithProjection)
            return diffusers.StableDiffusionXLPipeline(**two, unet=unet(), scheduler=euler)
        return diffusers.FluxPipeline(**two, transformer=flux(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler())

    return build


PARTS = {
    "sd": ["unet", "text_encoder"],
    "sdxl": ["unet", "text_encoder", "text_encoder_2"],
    "flux": ["transformer", "text_encoder"],
}


def module_of(pipe, name):
    """A pipeline's module by its name with the component first; CLIP's are below text_model or not."""
    part, _, rest = name.partition(".")
    model = getattr(pipe, part)
    return model.get_submodule(rest if hasattr(model, "text_model") else rest.removeprefix("text_model."))


def random_adapter(pipe, folder, names, *, seed=0, ranks=(2, 3, 4), alphas=(4.0, 3.0, 0.5), **config):
    """An adapter of these modules in PEFT's format, ranks and alphas taken in turn."""
    generator = torch.Generator().manual_seed(seed)
    tensors, patterns = {}, {"rank_pattern": {}, "alpha_pattern": {}}
    for i, name in enumerate(names):
        weight, rank = module_of(pipe, name).weight, ranks[i % len(ranks)]
        ones = (1,) * (weight.ndim - 2)
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], rank, *ones, generator=generator)
        if config.get("use_dora"):
            shape = (1, weight.shape[0], *ones) if ones else weight.shape[:1]
            tensors[f"{key}.lora_magnitude_vector"] = 1 + torch.rand(shape, generator=generator)
        patterns["rank_pattern"][name.replace(".", r"\.")] = rank
        patterns["alpha_pattern"][name.replace(".", r"\.")] = alphas[i % len(alphas)]
    return Adapter.load(write(folder, tensors, target_modules=list(names), **patterns, **config))


def names_of(kind):
    return [f"{part}.{name}" for part in PARTS[kind] for name in MODULES[part]]


def fused(pipe, path, names):
    """Each module's weight once diffusers has loaded the file and fused it."""
    parts = list(by_component(names))
    pipe.load_lora_weights(str(path))
    pipe.fuse_lora(components=parts)
    pipe.unload_lora_weights()
    return {name: module_of(pipe, name).weight.detach() for name in names}


def assert_gives(pipe, path, adapter):
    """diffusers adds exactly the adapter's ΔW to each module, and to no other one."""
    for part in by_component(adapter.sites):
        for parameter in getattr(pipe, part).parameters():
            parameter.data.zero_()
    after = fused(pipe, path, list(adapter.sites))
    for name, update in adapter.updates.items():
        torch.testing.assert_close(after[name], update.delta().reshape(after[name].shape), rtol=1e-5, atol=1e-6)
    changed = {
        f"{part}.{name}"
        for part in by_component(adapter.sites)
        for name, parameter in getattr(pipe, part).named_parameters()
        if parameter.any()
    }
    assert len(changed) == len(adapter.sites)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_diffusers_gives_the_same_delta_of_uneven_ranks_and_alphas_in_all_components(tmp_path, pipelines, kind, rslora):
    pipe, names = pipelines(kind), names_of(kind)
    adapter = random_adapter(pipe, tmp_path / "peft", names, use_rslora=rslora)
    path = adapter.save(tmp_path / "out", format="diffusers")
    assert [inner.name for inner in path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert_gives(pipe, path, adapter)


def test_diffusers_loads_a_lone_file_and_one_component_alone(tmp_path, pipelines):
    pipe = pipelines("sdxl")
    for part in PARTS["sdxl"]:
        adapter = random_adapter(pipe, tmp_path / part, [f"{part}.{name}" for name in MODULES[part]])
        assert_gives(pipe, adapter.save(tmp_path / f"{part}.safetensors", format="diffusers"), adapter)


def test_diffusers_loads_a_text_encoder_of_which_no_attention_is_adapted(tmp_path, pipelines):
    pipe, names = pipelines("sd"), [f"text_encoder.{CLIP}.{i}.mlp.fc1" for i in (0, 1)]
    adapter = random_adapter(pipe, tmp_path / "peft", names)
    assert_gives(pipe, adapter.save(tmp_path / "out", format="diffusers"), adapter)
    assert set(Adapter.load(tmp_path / "out").tensors) == set(adapter.tensors)


@pytest.mark.parametrize("names", [("unet", "text_encoder"), ("unet",), ("text_encoder",)])
def test_diffusers_gives_the_same_delta_of_kohyas_file(tmp_path, pipelines, names):
    pipe = pipelines("sd")
    modules = [f"{part}.{name}" for part in names for name in MODULES[part]]
    adapter = random_adapter(pipe, tmp_path / "peft", modules, alphas=(3.0,))  # of several, it loses those of a U-Net
    assert_gives(pipe, adapter.save(tmp_path / "x.safetensors", format="kohya"), adapter)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_diffusers_gives_the_delta_of_a_merge_of_its_own_files(tmp_path, pipelines, method):
    pipe, names = pipelines("sd"), names_of("sd")
    sources = []
    for seed in (0, 1):
        adapter = random_adapter(pipe, tmp_path / f"peft{seed}", names[seed:], seed=seed)
        sources.append(Adapter.load(adapter.save(tmp_path / f"{seed}.safetensors", format="diffusers")))
    merged = merge(Sources(sources, [1.0, 0.5]), method).adapter
    assert set(merged.sites) == set(names)
    assert_gives(pipe, merged.save(tmp_path / "out"), merged)  # in the format that was read


def test_diffusers_gives_the_same_weights_of_dora(tmp_path, pipelines):
    names = names_of("sd")
    adapter = random_adapter(pipelines("sd"), tmp_path / "peft", names, use_dora=True)
    adapter.save(tmp_path / "out", format="diffusers")
    before, pipe = pipelines("sd"), pipelines("sd")
    after = fused(pipe, tmp_path / "out", names)
    for name, site in adapter.sites.items():
        A, B, magnitude = (adapter.tensors[site.keys[p]] for p in ("lora_A", "lora_B", "lora_magnitude_vector"))
        # W + s B A
        whole = module_of(before, name).weight.detach().flatten(1) + site.scale * B.flatten(1) @ A.flatten(1)
        wanted = magnitude.reshape(-1, 1) * whole / whole.norm(dim=1, keepdim=True)
        torch.testing.assert_close(after[name], wanted.reshape(after[name].shape), rtol=1e-4, atol=1e-5)
    again = Adapter.load(tmp_path / "out")
    assert {
        name: torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items()
    } == dict.fromkeys(adapter.tensors, True)


def test_what_diffusers_saves_is_read_with_the_weights_that_it_has_itself(tmp_path, pipelines):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    pipe = pipelines("sd")
    configs = {
        "unet": LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], alpha_pattern={"attn2.to_v": 1}),
        "text_encoder": LoraConfig(r=3, lora_alpha=1, use_rslora=True, target_modules=["q_proj", "fc2"]),
    }
    layers = {}
    for part, config in configs.items():
        model = getattr(pipe, part)
        inject_adapter_in_model(config, model)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter)
        layers[part] = get_peft_model_state_dict(model, adapter_name="default")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        layers["unet"],
        convert_state_dict_to_diffusers(layers["text_encoder"]),
        unet_lora_adapter_metadata=configs["unet"].to_dict(),
        text_encoder_lora_adapter_metadata=configs["text_encoder"].to_dict(),
    )
    adapter = Adapter.load(tmp_path)
    for part in configs:
        for _, parameter in getattr(pipe, part).named_parameters():
            if not parameter.requires_grad:
                parameter.data.zero_()
    before = {name: module_of(pipe, name) for name in adapter.sites}
    scales = {name: before[name].scaling["default"] for name in adapter.sites}
    assert {name: site.scale for name, site in adapter.sites.items()} == pytest.approx(scales)
    for name, update in adapter.updates.items():
        torch.testing.assert_close(update.delta(), before[name].get_delta_weight("default").detach())
    attached = {n for part in configs for n, m in getattr(pipe, part).named_modules() if hasattr(m, "lora_A")}
    assert len(attached) == len(adapter.sites)
    assert not any("text_model" in name for name in attached)  # which the file does not have, and is read with


def test_alpha_tensors_count_as_in_diffusers(tmp_path, pipelines):
    names = [f"transformer.{name}" for name in MODULES["transformer"]]
    pipe = pipelines("flux")
    plain = random_adapter(pipe, tmp_path / "peft", names, ranks=(4,), alphas=(4.0,))
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in plain.tensors.items()}
    tensors |= {f"{name}.alpha": torch.tensor(2.0**i) for i, name in enumerate(names)}
    save_file(tensors, tmp_path / "alphas.safetensors")
    adapter = Adapter.load(tmp_path / "alphas.safetensors")
    assert [adapter.sites[name].scale for name in names] == [2.0**i / 4 for i in range(len(names))]
    assert not adapter.others
    assert_gives(pipe, tmp_path / "alphas.safetensors", adapter)


# reading, without diffusers

KEY = f"unet.{BLOCK}.attn1.to_q"


def pair(module=KEY, rank=2, names=("lora_A.weight", "lora_B.weight"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, 4), (6, rank))
    return {
        f"{module}.{name}": torch.randn(shape, generator=generator) for name, shape in zip(names, shapes, strict=True)
    }


def file(path, tensors, **said):
    header = {"lora_adapter_metadata": json.dumps({k.replace("__", "."): v for k, v in said.items()})} if said else {}
    save_file(tensors, path, {"format": "pt", **header})
    return path


@pytest.mark.parametrize(
    ("names", "module"),
    [
        (("lora.down.weight", "lora.up.weight"), f"unet.{BLOCK}.attn1.to_q"),
        (("processor.to_q_lora.down.weight", "processor.to_q_lora.up.weight"), f"unet.{BLOCK}.attn1"),
        (("lora.down.weight", "lora.up.weight"), f"unet.unet.{BLOCK}.attn1.to_q"),
        (("lora_A.weight", "lora_B.weight"), f"unet.{BLOCK}.attn1.processor.to_q"),
        (("lora_A.default.weight", "lora_B.default.weight"), f"unet.{BLOCK}.attn1.to_q"),
        (("lora_A.weight", "lora_B.weight"), f"unet.base_model.model.{BLOCK}.attn1.to_q"),
    ],
)
def test_every_spelling_names_the_same_module(tmp_path, names, module):
    listing = inspect(file(tmp_path / "x.safetensors", pair(module, names=names)))
    assert (listing.format, list(listing.adapter.sites), listing.problems) == ("diffusers", [KEY], [])
    A, B = pair().values()
    assert torch.equal(listing.adapter.updates[KEY].delta(), B @ A)


@pytest.mark.parametrize(
    ("module", "read_as"),
    [
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora", f"text_encoder.{CLIP}.0.self_attn.q_proj"),
        ("text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer", f"text_encoder.{CLIP}.0.mlp.fc1"),
        (
            "text_encoder_2.text_model.encoder.layers.0.self_attn.to_out_lora",
            f"text_encoder_2.{CLIP}.0.self_attn.out_proj",
        ),
        ("unet.mid_block.attn1.processor.to_out_lora", "unet.mid_block.attn1.to_out.0"),
        ("unet.mid_block.attn1.processor.add_k_proj_lora", "unet.mid_block.attn1.add_k_proj"),
    ],
)
def test_old_spellings_are_read_by_the_component_that_they_are_of(tmp_path, module, read_as):
    tensors = pair(module, names=("down.weight", "up.weight"))
    assert list(Adapter.load(file(tmp_path / "x.safetensors", tensors)).sites) == [read_as]


@pytest.mark.parametrize(("module", "part"), [("down_blocks.0.to_q", "unet"), ("blocks.0.attn1.to_q", "transformer")])
def test_a_file_that_names_no_component_is_read_as_its_models_and_that_is_told(tmp_path, module, part):
    path = file(tmp_path / "x.safetensors", pair(module), r=2, lora_alpha=6)
    with pytest.warns(LoraLabWarning, match=f"2 keys name no component: {module}.*is read as {part}.{module}"):
        adapter = Adapter.load(path)
    assert {name: site.scale for name, site in adapter.sites.items()} == {f"{part}.{module}": 3.0}


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ("{", "lora_adapter_metadata in its header is not JSON"),
        ("[1]", "is no object of fields"),
        ('{"unet.r": "2"}', "unet: r is '2' in the config; a rank of at least 1 belongs there"),
        ('{"unet.r": 2, "unet.lora_alpha": "much"}', "lora_alpha is 'much'; a number belongs there"),
        ('{"unet.r": 2, "unet.lora_alpha": {"a": 1}}', "a number belongs there"),
        ('{"unet.r": 3, "unet.lora_alpha": 3}', "rank 2 in the file and 3 in the config"),
        ('{"unet.r": 2, "unet.rank_pattern": [1]}', "rank_pattern is a list"),
    ],
)
def test_a_header_is_checked_as_data(tmp_path, header, text):
    save_file(pair(), tmp_path / "x.safetensors", {"lora_adapter_metadata": header})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLabWarning)
        with pytest.raises(AdapterError) as caught:
            Adapter.load(tmp_path / "x.safetensors")
    assert text in str(caught.value)
    assert "x.safetensors" in str(caught.value)


def test_components_whose_rslora_differs_keep_their_scales(tmp_path):
    tensors = {**pair(), **pair(f"text_encoder.{CLIP}.0.mlp.fc1", rank=4)}
    said = {"unet__r": 2, "unet__lora_alpha": 6, "text_encoder__r": 4, "text_encoder__lora_alpha": 6}
    adapter = Adapter.load(file(tmp_path / "x.safetensors", tensors, **said, text_encoder__use_rslora=True))
    assert {name: site.scale for name, site in adapter.sites.items()} == {
        KEY: 3.0,
        f"text_encoder.{CLIP}.0.mlp.fc1": pytest.approx(3.0),
    }


def test_a_component_that_the_header_leaves_out_has_its_rank_for_alpha(tmp_path):
    tensors = {**pair(), **pair(f"text_encoder.{CLIP}.0.mlp.fc1", rank=4)}
    adapter = Adapter.load(file(tmp_path / "x.safetensors", tensors, unet__r=2, unet__lora_alpha=6))
    assert [adapter.sites[name].scale for name in adapter.sites] == [1.0, 3.0]


def test_components_that_differ_in_what_changes_delta_are_refused(tmp_path):
    tensors = {**pair(), **pair(f"text_encoder.{CLIP}.0.mlp.fc1")}
    tensors[f"{KEY}.lora_magnitude_vector"] = torch.ones(6)
    with pytest.raises(AdapterError, match="use_dora is not the same in all components"):
        Adapter.load(file(tmp_path / "x.safetensors", tensors))


def test_a_pissa_component_leaves_the_whole_without_a_delta(tmp_path):
    tensors = {**pair(), **pair(f"text_encoder.{CLIP}.0.mlp.fc1")}
    said = {f"{part}__{field}": 2 for part in ("unet", "text_encoder") for field in ("r", "lora_alpha")}
    path = file(tmp_path / "x.safetensors", tensors, **said, text_encoder__init_lora_weights="pissa_niter_4")
    with pytest.raises(TunerError, match="PiSSA"):
        _ = Adapter.load(path).updates


def test_another_tools_dora_scale_is_refused_by_name(tmp_path):
    tensors = {**pair(), f"{KEY}.dora_scale": torch.ones(6)}
    with pytest.raises(AdapterError, match="dora_scale"):
        Adapter.load(file(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize("module", ["transformer.h.0.attn.c_attn", "transformer.blocks.0.attn.Wqkv", "model.q_proj"])
def test_a_language_models_transformer_is_no_pipelines(tmp_path, module):
    listing = inspect(file(tmp_path / "x.safetensors", pair(module)))
    assert (listing.format, list(listing.adapter.sites)) == ("safetensors", [module])
    assert listing.adapter.layout.format == "peft"


# writing


def load(folder, tensors, **config):
    renamed = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    return Adapter.load(write(folder, renamed, **config))


@pytest.mark.parametrize(
    ("tensors", "config", "text"),
    [
        (pair("down_blocks.0.q"), {}, "not down_blocks.0.q; of a UNet alone, `rename` =unet says whose they are"),
        (
            {**pair(), "unet.head.weight": torch.ones(2)},
            {},
            "no place for tensors beside the adapter's own .*unet.head",
        ),
        (pair(), {"init_lora_weights": "pissa"}, "PiSSA"),
        (pair(f"text_encoder.{CLIP}", names=("lora_embedding_A", "lora_embedding_B")), {}, "embedding"),
    ],
)
def test_what_diffusers_has_no_place_for_is_refused_and_nothing_written(tmp_path, tensors, config, text):
    adapter = load(tmp_path / "peft", tensors, **config)
    with pytest.raises(TunerError, match=text):
        adapter.save(tmp_path / "out", format="diffusers")
    assert not (tmp_path / "out").exists()


def test_what_is_read_is_written_again_bit_for_bit_with_the_rest_of_its_header(tmp_path):
    said = {"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True}
    header = {"modelspec.title": "A", "modelspec.hash_sha256": "0x1", "lora_adapter_metadata": json.dumps(said)}
    save_file(pair(), tmp_path / "a.safetensors", header)
    first = Adapter.load(tmp_path / "a.safetensors")
    again = Adapter.load(first.save(tmp_path / "b.safetensors"))
    assert again.config == first.config
    assert again.layout == first.layout
    assert again.layout.header == {"modelspec.title": "A"}
    written = load_file(tmp_path / "b.safetensors")
    assert written.keys() == pair().keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in pair().items())


# PEFT's folders of components


def test_peft_has_a_folder_for_each_component_which_its_models_load(tmp_path, pipelines):
    from peft import PeftModel

    pipe = pipelines("sdxl")
    names = [f"{part}.{name}" for part in ("unet", "text_encoder_2") for name in MODULES[part]]
    made = random_adapter(pipe, tmp_path / "plain", names)
    adapter = Adapter.load(made.save(tmp_path / "x.safetensors", format="diffusers"))
    path = adapter.save(tmp_path / "out", format="peft")
    assert sorted(inner.name for inner in path.iterdir()) == ["text_encoder_2", "unet"]
    for part in ("unet", "text_encoder_2"):
        model = PeftModel.from_pretrained(getattr(pipe, part), path / part).base_model.model
        for name in MODULES[part]:
            delta = model.get_submodule(name).get_delta_weight("default").detach()
            wanted = adapter.updates[f"{part}.{name}"].delta()
            torch.testing.assert_close(delta, wanted.reshape(delta.shape), rtol=1e-5, atol=1e-6)
        assert sum(hasattr(module, "lora_A") for module in model.modules()) == len(MODULES[part])
    again = Adapter.load(path)
    assert again.config == adapter.config
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    assert sorted(p.name for p in again.save(tmp_path / "third").iterdir()) == ["text_encoder_2", "unet"]


def test_a_lone_file_of_peft_for_several_components_is_refused(tmp_path):
    tensors = {**pair(), **pair(f"text_encoder.{CLIP}.0.mlp.fc1")}
    adapter = Adapter.load(file(tmp_path / "x.safetensors", tensors))
    with pytest.raises(
        OptionError, match="needs a file for each model of text_encoder, unet; a name without an ending"
    ):
        adapter.save(tmp_path / "y.safetensors", format="peft")


def test_a_broken_component_is_named(tmp_path):
    tensors = {**pair(), **pair(f"text_encoder.{CLIP}.0.mlp.fc1")}
    path = Adapter.load(file(tmp_path / "x.safetensors", tensors)).save(tmp_path / "out", format="peft")
    weights = path / "text_encoder" / "adapter_model.safetensors"
    broken = load_file(weights)
    next(iter(broken.values()))[0, 0] = float("nan")
    save_file(broken, weights)
    with pytest.raises(AdapterError, match=r"text_encoder/adapter_model\.safetensors: non-finite"):
        Adapter.load(path)


def test_the_record_of_every_component_must_be_the_users_own(tmp_path):
    from dataclasses import replace

    from lora_lab.files.trust import Origin

    tensors = {**pair(), **pair(f"text_encoder.{CLIP}.0.mlp.fc1")}
    adapter = Adapter.load(file(tmp_path / "x.safetensors", tensors))
    own = replace(adapter, record={"method": "lora", "seed": 1}, origin=Origin(own=True))
    path = own.save(tmp_path / "out", format="peft")
    again = Adapter.load(path)
    assert (again.record, again.origin.own) == ({"method": "lora", "seed": 1}, True)
    config = json.loads((path / "unet" / "adapter_config.json").read_text())
    (path / "unet" / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.5}))
    assert not Adapter.load(path).origin.own


def test_a_header_that_was_changed_is_not_the_users_own(tmp_path):
    from dataclasses import replace

    from lora_lab.files.trust import Origin

    adapter = replace(
        Adapter.load(file(tmp_path / "x.safetensors", pair())), record={"seed": 1}, origin=Origin(own=True)
    )
    path = adapter.save(tmp_path / "own.safetensors")
    assert Adapter.load(path).origin.own
    with safe_open(path, "pt") as opened:
        header = opened.metadata()
    header["lora_adapter_metadata"] = header["lora_adapter_metadata"].replace(
        '"unet.lora_alpha": 2', '"unet.lora_alpha": 4'
    )
    save_file(load_file(path), path, header)
    again = Adapter.load(path)
    assert (again.sites[KEY].scale, again.origin.own) == (2.0, False)


def test_diffusers_reads_a_kohya_file_of_flux_as_what_it_is_converted_to(tmp_path, pipelines):
    from lora_lab.adapters.files.converting import converted

    shapes = {"img_attn.qkv": (24, 8), "txt_attn.qkv": (24, 8), "img_attn.proj": (8, 8), "txt_mlp.2": (8, 32)}
    shapes |= {"img_mod.lin": (48, 8), "txt_mod.lin": (48, 8)}
    tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        factors = pair(f"diffusion_model.double_blocks.0.{name}", seed=seed)
        (A, a), (B, b) = factors.items()
        generator = torch.Generator().manual_seed(seed)
        tensors |= {
            A: torch.randn(len(a), shape[1], generator=generator),
            B: torch.randn(shape[0], b.shape[1], generator=generator),
        }
    kohya = Adapter.load(load(tmp_path / "peft", tensors).save(tmp_path / "k.safetensors", format="kohya"))
    made = converted(kohya, "diffusers").adapter
    names = list(made.sites)
    weights = []
    for path in (tmp_path / "k.safetensors", made.save(tmp_path / "d")):
        pipe = pipelines("flux")
        weights.append(fused(pipe, path, names))
    base = pipelines("flux")
    for name in names:
        torch.testing.assert_close(weights[0][name], weights[1][name])
        assert not torch.equal(weights[0][name], module_of(base, name).weight)
