"""What is written, loaded by diffusers' own pipelines, gives the outputs of models to whose weights PEFT has added ΔW.

The reference never goes through a file of ours: PEFT holds the factors of the test and adds their ΔW itself.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from test_diffusers import module_of, names_of, pipelines, random_adapter
from test_kohya_in_diffusers import NAMES, sdxl_unet

__all__ = ["pipelines"]  # a fixture

TOLERANCE = 1e-5
"""Relative difference of outputs, float32: rounding gives less than 2e-6."""


def wide_enough(pipe, kind):
    """The pipeline with a U-Net of SDXL's levels, on which kohya's names of it depend."""
    if kind == "sdxl":
        torch.manual_seed(1)
        pipe.register_modules(unet=sdxl_unet())
    return pipe


@torch.no_grad()
def outputs(pipe, kind):
    """Component → its output for fixed inputs."""
    made, words = {}, torch.tensor([[3, 7, 1, 5, 19]])  # the last of the vocabulary ends a text
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, part, None)
        if encoder is not None:
            said = encoder(words)
            made[part] = said.last_hidden_state
            made[f"{part}, pooled"] = said.pooler_output if part == "text_encoder" else said.text_embeds
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    if kind == "flux":
        inputs = {"hidden_states": random(1, 6, 4), "encoder_hidden_states": random(1, 5, 8)}
        inputs |= {"pooled_projections": random(1, 8), "timestep": torch.tensor([0.4])}
        ids = {"img_ids": random(6, 3).round(), "txt_ids": torch.zeros(5, 3)}
        made["transformer"] = pipe.transformer(**inputs, **ids, return_dict=False)[0]
    else:
        made["unet"] = pipe.unet(random(1, 4, 8, 8), 7, random(1, 5, 8), return_dict=False)[0]
    return made


@torch.no_grad()
def by_peft(pipe, adapters, weights=(1.0,)):
    """A copy of the pipeline with Σ wᵢ ΔWᵢ in its weights: PEFT's own layers, filled with the factors of a test."""
    from peft import LoraConfig, inject_adapter_in_model

    pipe = type(pipe)(**deepcopy(pipe.components))
    for adapter, weight in zip(adapters, weights, strict=True):
        switches = {field: adapter.config.get(field, False) for field in ("use_rslora", "use_dora")}
        for name, site in adapter.sites.items():
            layer = module_of(pipe, name)
            holder = torch.nn.ModuleDict({"layer": deepcopy(layer)})
            alpha = adapter.config["alpha_pattern"][name.replace(".", r"\.")]
            config = LoraConfig(r=site.rank, lora_alpha=alpha, target_modules=["layer"], **switches)
            inject_adapter_in_model(config, holder)
            for part, key in site.keys.items():  # lora_A, lora_B, and of DoRA the magnitudes
                getattr(holder["layer"], part)["default"].weight.copy_(adapter.tensors[key])
            holder["layer"].merge()
            layer.weight += weight * (holder["layer"].base_layer.weight - layer.weight)
    return pipe


def relative(theirs, ours):
    return max(float((theirs[part] - out).abs().max() / out.abs().max()) for part, out in ours.items())


def assert_outputs(pipe, kind, path, reference):
    """The file, attached and not fused, gives the reference's outputs, which are not the base's."""
    wanted = outputs(reference, kind)
    assert relative(outputs(pipe, kind), wanted) > 0.01
    pipe.load_lora_weights(str(path))
    assert relative(outputs(pipe, kind), wanted) < TOLERANCE


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_every_module_and_its_scale_shows_in_the_outputs(tmp_path, pipelines, kind):
    """What the tests below rest on: without any one module, or with a scale 10 % off, the outputs are others."""
    pipe, names = pipelines(kind), names_of(kind)
    adapter = random_adapter(pipe, tmp_path / "peft", names)
    wanted = outputs(by_peft(pipe, [adapter]), kind)
    for name in names:
        others = {other: site for other, site in adapter.sites.items() if other != name}
        without = by_peft(pipe, [replace(adapter, sites=others)])
        assert relative(outputs(without, kind), wanted) > 100 * TOLERANCE, name
        scaled = by_peft(without, [replace(adapter, sites={name: adapter.sites[name]})], [1.1])
        assert relative(outputs(scaled, kind), wanted) > 10 * TOLERANCE, name


@pytest.mark.parametrize("switch", ["use_rslora", "use_dora", None])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_converted_to_diffusers_the_outputs_are_those_of_peft(tmp_path, pipelines, lora_lab, kind, switch):
    pipe = pipelines(kind)
    adapter = random_adapter(pipe, tmp_path / "peft", names_of(kind), **{switch: True} if switch else {})
    code, _, err = lora_lab("convert", str(tmp_path / "peft"), "--to", "diffusers", "-o", str(tmp_path / "out"))
    assert code == 0, err
    assert_outputs(pipe, kind, tmp_path / "out", by_peft(pipe, [adapter]))


@pytest.mark.parametrize("kind", NAMES)
def test_converted_to_kohya_the_outputs_are_those_of_peft(tmp_path, pipelines, lora_lab, kind):
    pipe = wide_enough(pipelines(kind), kind)
    # diffusers 0.42 loses the alphas of attention in files of U-Nets, so that those are tried at scale 1
    numbers = {"ranks": (4,), "alphas": (4.0,)} if "sd" in kind else {"base_model_name_or_path": "FLUX.1-dev"}
    adapter = random_adapter(pipe, tmp_path / "peft", NAMES[kind], **numbers)
    path = tmp_path / "out.safetensors"
    code, _, err = lora_lab("convert", str(tmp_path / "peft"), "--to", "kohya", "-o", str(path))
    assert code == 0, err
    assert_outputs(pipe, kind, path, by_peft(pipe, [adapter]))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_a_merge_of_diffusers_files_gives_the_outputs_of_the_sum_of_both(tmp_path, pipelines, lora_lab, kind):
    pipe, names = pipelines(kind), names_of(kind)
    adapters, paths = [], []
    for seed in (0, 1):  # each lacks a module of the other
        chosen = names[:-1] if seed else names[1:]
        adapters.append(random_adapter(pipe, tmp_path / f"peft{seed}", chosen, seed=seed))
        paths.append(str(adapters[-1].save(tmp_path / f"{seed}.safetensors", format="diffusers")))
    out = tmp_path / "out"
    options = ("--method", "task-arithmetic", "--weights", "0.75,-0.5", "-o", str(out))
    code, _, err = lora_lab("merge", *paths, *options)
    assert code == 0, err
    reference = by_peft(pipe, adapters, [0.75, -0.5])
    assert_outputs(pipe, kind, out, reference)
