"""The base's weights beside ΔW, module by module: of every layout, and in the journal."""

import numpy as np
import peft
import pytest
import torch
from making_checkpoints import QV, train, write_base
from safetensors.torch import load_file, save_file

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import MismatchError
from lora_lab.fusing.weights import Weights, inside_of
from lora_lab.scoring.execution import Execution

CASES = {
    "llama": (peft.LoraConfig(r=2, target_modules=QV), "model.layers.1.self_attn.v_proj", False),
    "gpt2": (peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), "transformer.h.1.attn.c_attn", True),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    config, module, turned = CASES[request.param]
    base = write_base(request.param, tmp_path / "base")
    return base, Adapter.load(train(request.param, base, tmp_path / "a", config)), module, turned


def test_weights_run_from_inputs_to_outputs_whatever_the_base_stores(case):
    base, adapter, module, turned = case
    weights, tensor = Weights(base, [adapter]), load_file(base / "model.safetensors")[f"{module}.weight"]
    assert torch.equal(weights.read(module), tensor.T if turned else tensor)
    assert weights.shape(module) == tuple(weights.read(module).shape)
    (update,) = weights.updates(module).values()
    own = adapter.updates[module]
    torch.testing.assert_close(update.delta(), own.delta().T if turned else own.delta())
    assert weights.modules == sorted(adapter.sites)


def test_intruders_are_those_of_dense_weights_and_known_the_second_time(case, tmp_path, monkeypatch):
    base, adapter, module, _ = case
    told = []
    on = Execution(device="cpu", cache=tmp_path / "cache", confirm=told.append)
    first = inside_of(base, [adapter], 3, on)[0]
    weights = Weights(base, [adapter])
    W, delta = weights.read(module).double().numpy(), weights.updates(module)[0].delta().double().numpy()
    U, moved = np.linalg.svd(W, full_matrices=False)[0], np.linalg.svd(W + delta)[0][:, :3]
    np.testing.assert_allclose(first[module].similarities, np.abs(U.T @ moved).max(0), atol=1e-6)
    assert told[0].variants == len(adapter.sites)
    monkeypatch.setattr("lora_lab.fusing.weights.Weights.decomposed", None)  # nothing is computed again
    again = inside_of(base, [adapter], 3, on)[0]
    assert {k: repr(vars(v)) for k, v in again.items()} == {k: repr(vars(v)) for k, v in first.items()}
    with pytest.raises(TypeError):
        inside_of(base, [adapter], 4, on)


def test_another_base_is_named_and_so_is_a_weight_that_is_not_finite(case, tmp_path):
    base, adapter, module, _ = case
    tensors = load_file(base / "model.safetensors")
    tensors[f"{module}.weight"][0, 0] = torch.nan
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match=f"base: {module}.weight: the weight is not finite$"):
        inside_of(base, [adapter], 3)
    other = write_base("bert", tmp_path / "other")
    with pytest.raises(MismatchError, match="the base has no module"):
        inside_of(other, [adapter], 3)
