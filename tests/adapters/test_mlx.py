"""Adapters of mlx-lm: read with its own formulas, written so that it would load them."""

import json

import pytest
import torch
from making_adapters import PREFIX, lora, write
from safetensors.torch import load_file, save_file

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.reading import inspect
from lora_lab.errors import AdapterError, LoraLabWarning, TunerError

Q, V, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.embed_tokens"


def factors(module, inputs=4, outputs=6, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_a": torch.randn(inputs, rank, generator=generator),
        f"{module}.lora_b": torch.randn(rank, outputs, generator=generator),
    }


def mlx(folder, tensors, *, scale=20.0, rank=2, **said):
    """A folder as mlx-lm 0.32 leaves it after a training."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    parameters = {"rank": rank, "dropout": 0.1, "scale": scale, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters, "model": "org/base", **said}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def delta(tensors, module, scale, *, embedding=False):
    """What mlx-lm's LoRALinear.fuse and LoRAEmbedding.fuse add to the weight."""
    a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
    return scale * a @ b if embedding else (scale * b.T) @ a.T


def test_delta_is_mlx_lms_own(tmp_path):
    tensors = {**factors(Q), **factors(V, seed=1), **factors(EMBED, inputs=9, outputs=4, seed=2)}
    adapter = Adapter.load(mlx(tmp_path / "a", tensors))
    assert inspect(tmp_path / "a").format == "mlx"
    assert {name: site.kind for name, site in adapter.sites.items()} == {Q: "linear", V: "linear", EMBED: "embedding"}
    for name in adapter.sites:
        wanted = delta(tensors, name, 20.0, embedding=name == EMBED)
        torch.testing.assert_close(adapter.updates[name].delta(), wanted)
    assert adapter.base_model == "org/base"
    assert adapter.config["lora_dropout"] == 0.1


def test_what_mlx_lm_reads_of_what_is_written(tmp_path):
    made = {**lora(Q), **lora(V, seed=1)}
    adapter = Adapter.load(write(tmp_path / "peft", made, lora_alpha=3))
    path = adapter.save(tmp_path / "out", format="mlx")
    said = json.loads((path / "adapter_config.json").read_text())
    assert said == {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": 2,
            "scale": 1.5,
            "dropout": 0.0,
            "keys": ["self_attn.q_proj", "self_attn.v_proj"],
        },
    }
    tensors = load_file(path / "adapters.safetensors")
    assert set(tensors) == {f"{name}.{part}" for name in (Q, V) for part in ("lora_a", "lora_b")}
    for name, update in adapter.updates.items():
        assert tensors[f"{name}.lora_a"].shape == (4, 2)
        torch.testing.assert_close(delta(tensors, name, 1.5), update.delta())
    again = Adapter.load(path)
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    assert again.layout.format == "mlx"


def test_uneven_ranks_and_scales_become_one_and_that_is_told(tmp_path):
    made = {**lora(Q), **lora(V, rank=3, seed=1)}
    config = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 1}}
    adapter = Adapter.load(write(tmp_path / "peft", made, **config))
    with pytest.warns(LoraLabWarning) as told:
        path = adapter.save(tmp_path / "out", format="mlx")
    assert [str(warning.message) for warning in told] == [
        "ranks of 1 modules are padded with zeros to 3, MLX's one rank for all",
        "scales that differ are multiplied into lora_b, MLX having one scale for all",
    ]
    parameters = json.loads((path / "adapter_config.json").read_text())["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (3, 1.0)
    again = Adapter.load(path)
    for name, update in adapter.updates.items():
        assert again.sites[name].rank == 3
        assert torch.equal(again.updates[name].delta(), update.delta())


@pytest.mark.parametrize(("alpha", "dtype"), [(8, torch.bfloat16), (0.3, torch.float32)])
def test_a_scale_that_would_round_bfloat16_is_multiplied_in_float32(tmp_path, alpha, dtype):
    made = {key: tensor.bfloat16() for key, tensor in {**lora(Q), **lora(V, seed=1)}.items()}
    adapter = Adapter.load(write(tmp_path / "peft", made, alpha_pattern={"v_proj": alpha}))
    with pytest.warns(LoraLabWarning, match="scales that differ"):
        path = adapter.save(tmp_path / "out", format="mlx")
    tensors = load_file(path / "adapters.safetensors")
    assert (tensors[f"{Q}.lora_b"].dtype, tensors[f"{V}.lora_b"].dtype) == (torch.bfloat16, dtype)
    for name, update in Adapter.load(path).updates.items():
        assert torch.equal(update.delta(), adapter.updates[name].delta())


def test_dora_has_its_magnitudes(tmp_path):
    tensors = {**factors(Q), f"{Q}.m": torch.rand(6)}
    adapter = Adapter.load(mlx(tmp_path / "a", tensors, fine_tune_type="dora"))
    assert torch.equal(adapter.tensors[f"{PREFIX}{Q}.lora_magnitude_vector"], tensors[f"{Q}.m"])
    assert "DoRA" in adapter.why_not_additive
    path = adapter.save(tmp_path / "b")
    written = load_file(path / "adapters.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())
    assert json.loads((path / "adapter_config.json").read_text())["fine_tune_type"] == "dora"


@pytest.mark.parametrize(
    ("tensors", "said", "text"),
    [
        (factors(Q), {"fine_tune_type": "full"}, "whole weights of an MLX fine-tuning"),
        (factors(Q), {"fine_tune_type": "vera"}, "fine_tune_type is 'vera'.*lora or dora is read"),
        (factors(Q), {"lora_parameters": None}, "lora_parameters is None"),
        (factors(Q), {"lora_parameters": {"rank": 2, "scale": "20"}}, "scale is '20' in lora_parameters"),
        (factors(Q), {"lora_parameters": {"rank": 0, "scale": 20}}, "rank is 0 in lora_parameters"),
        (factors(Q), {"lora_parameters": {"rank": 3, "scale": 20}}, "rank 2 in the file and 3 in the config"),
        ({f"{Q}.lora_a": torch.ones(8, 2, 4), f"{Q}.lora_b": torch.ones(8, 6, 2)}, {}, "a stack of experts"),
        ({**factors(EMBED), f"{EMBED}.m": torch.ones(6)}, {"fine_tune_type": "dora"}, "DoRA of an embedding"),
        ({f"{Q}.lora_a": torch.ones(4, 2)}, {}, "no lora_B"),
        ({**factors(Q), f"{Q}.lora_c": torch.ones(2)}, {}, "lora_c"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path, tensors, said, text):
    with pytest.raises(AdapterError, match=text):
        Adapter.load(mlx(tmp_path / "a", tensors, **said))


def test_a_file_without_its_configuration_is_refused(tmp_path):
    mlx(tmp_path / "a", factors(Q))
    (tmp_path / "a" / "adapters.safetensors").rename(tmp_path / "0000100_adapters.safetensors")
    with pytest.raises(AdapterError, match=r"without its adapter_config\.json, which says"):
        Adapter.load(tmp_path / "0000100_adapters.safetensors")
    adapter = Adapter.load(tmp_path / "0000100_adapters.safetensors", config=tmp_path / "a")
    assert adapter.sites[Q].scale == 20.0


def test_an_alpha_beside_the_scale_does_not_count_and_is_told(tmp_path):
    path = mlx(tmp_path / "a", factors(Q), lora_parameters={"rank": 2, "scale": 10.0, "alpha": 16})
    with pytest.warns(LoraLabWarning, match="alpha beside the scale 10"):
        assert Adapter.load(path).sites[Q].scale == 10.0


def test_conv1d_layers_stay_what_they_are(tmp_path):
    module = "transformer.h.0.attn.c_attn"
    adapter = Adapter.load(write(tmp_path / "peft", lora(module), fan_in_fan_out=True))
    again = Adapter.load(adapter.save(tmp_path / "out", format="mlx"))
    assert torch.equal(again.updates[module].delta(), adapter.updates[module].delta())
    assert again.updates[module].shape == (4, 6)


@pytest.mark.parametrize(
    ("module", "config", "text"),
    [
        ("model.layers.0.embeddings", {}, "tells embeddings by their names"),
        (Q, {"init_lora_weights": "pissa"}, "PiSSA"),
    ],
)
def test_what_mlx_has_no_place_for_is_refused_and_nothing_written(tmp_path, module, config, text):
    adapter = Adapter.load(write(tmp_path / "peft", lora(module), **config))
    with pytest.raises(TunerError, match=text):
        adapter.save(tmp_path / "out", format="mlx")
    assert not (tmp_path / "out").exists()
