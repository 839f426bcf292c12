"""A scale that float32 cannot hold is told in one line, wherever it comes from; any smaller one is used."""

import json

import pytest
import torch
from making_adapters import lora, write
from safetensors.torch import save_file

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import AdapterError

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 1e300},
        {"lora_alpha": -1e300},
        {"lora_alpha": 1e300, "use_rslora": True},
        {"alpha_pattern": {"q_proj": 7e38}},
        {"lora_alpha": 10**60},
    ],
)
def test_an_alpha_of_a_configuration_that_float32_cannot_hold(lora_lab, tmp_path, settings):
    write(tmp_path / "a", lora(), **settings)
    with pytest.raises(AdapterError, match=r"a/adapter_model.safetensors: layers.0.q_proj: a scale of .*the rank 2$"):
        Adapter.load(tmp_path / "a")
    for verb in (("prune", "a", "--rank", "1", "-o", "o"), ("merge", "a", "a", "-o", "o")):
        code, out, err = lora_lab(*verb)
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert "and float32 ends at 3.4e38" in err
    code, out, _ = lora_lab("inspect", "a")
    assert code == 1
    assert max(map(len, out.splitlines())) < 120


def test_the_largest_scale_of_float32_is_used(tmp_path):
    write(tmp_path / "a", {key: 0 * tensor + 1e-20 for key, tensor in lora().items()}, lora_alpha=2 * LARGEST)
    (update,) = Adapter.load(tmp_path / "a").updates.values()
    assert update.delta().max() == pytest.approx(2 * 1e-40 * LARGEST, rel=1e-5)


def test_an_alpha_tensor_that_float32_cannot_hold(tmp_path):
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(6, 2)}
    save_file({**tensors, "lora_unet_x.alpha": torch.tensor(1e300, dtype=torch.float64)}, tmp_path / "k.safetensors")
    with pytest.raises(AdapterError, match=r"k.safetensors: lora_unet_x: a scale of 5e\+299"):
        Adapter.load(tmp_path / "k.safetensors")


def test_an_alpha_of_a_loha_that_float32_cannot_hold(tmp_path):
    parts = {
        f"hada_w{i}_{half}": torch.ones(3, 2) if half == "a" else torch.ones(2, 4) for i in (1, 2) for half in "ab"
    }
    (tmp_path / "a").mkdir()
    save_file({f"base_model.model.x.{part}": t for part, t in parts.items()}, tmp_path / "a/adapter_model.safetensors")
    config = {"peft_type": "LOHA", "r": 2, "alpha": 1e300, "target_modules": ["x"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"x: a scale of 5e\+299"):
        Adapter.load(tmp_path / "a").updates  # noqa: B018
