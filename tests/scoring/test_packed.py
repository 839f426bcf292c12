"""Bases in GPTQ and AWQ, packed by hand, scored on a processor as PEFT has them; skipped without their packages."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.attached import attach
from lora_lab.adapters.models.codes import is_quantised, weight_shape
from lora_lab.analysis.questions import Evaluate, Shapley
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

CASES = Path(__file__).parents[1] / "cases"
SHAPE = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
GROUP, PER_WORD = 32, 8  # inputs that share a scale; codes of 4 bits in an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word, as AutoAWQ's "gemm" has them
HOW = {
    "gptq": {"desc_act": False, "sym": False, "checkpoint_format": "gptq", "backend": "torch"},
    "awq": {"zero_point": True, "version": "gemm", "backend": "torch_awq"},
}
needs_packages = pytest.mark.filterwarnings("ignore")  # those of packages that the tests do not install


class WithoutWeight(nn.Module):
    """A layer as gptqmodel has it: codes in `qweight`, and what stands in for `weight` is no tensor."""

    in_features, out_features = 3, 5

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(1, 5, dtype=torch.int32))
        self.weight = SimpleNamespace(device="cpu")


def test_codes_tell_the_shape_of_the_weight_that_they_stand_for():
    assert weight_shape(WithoutWeight()) == (5, 3)
    assert is_quantised(WithoutWeight())
    assert weight_shape(nn.Linear(3, 5)) == (5, 3)
    assert weight_shape(nn.Module()) is None
    assert weight_shape(nn.LayerNorm(3, elementwise_affine=False)) is None


def codes_of(weight):
    """(codes [out, in], zeros [out, groups], scales [out, groups], the weight that they stand for [out, in])."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).half().float()
    zeros = torch.round(-low / scales).clamp(0, 15)
    codes = torch.round(groups / scales[..., None] + zeros[..., None]).clamp(0, 15)
    meant = (codes - zeros[..., None]) * scales[..., None]
    return codes.reshape(weight.shape).long(), zeros.long(), scales, meant.reshape(weight.shape)


def packed(codes, dim, order=range(PER_WORD)):
    """Eight codes of 4 bits along `dim` in an int32 each."""
    parts = codes.movedim(dim, 0).unflatten(0, (-1, PER_WORD))
    words = sum(parts[:, k] << 4 * place for place, k in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(0, dim).contiguous()


def pieces(method, codes, zeros, scales):
    """The tensors of a layer in a checkpoint."""
    if method == "gptq":  # packed along the inputs; zeros are kept less one
        zeros = packed((zeros.T - 1) & 15, 1)
        group = torch.arange(codes.shape[1], dtype=torch.int32) // GROUP
        return {"qweight": packed(codes.T, 0), "qzeros": zeros, "scales": scales.T.half().contiguous(), "g_idx": group}
    zeros = packed(zeros.T, 1, AWQ_ORDER)
    return {"qweight": packed(codes.T, 1, AWQ_ORDER), "qzeros": zeros, "scales": scales.T.half().contiguous()}


@pytest.fixture(scope="module", params=["gptq", "awq"])
def folder(request, tmp_path_factory):
    """A base in codes, and the one with the weights that the codes stand for; a task on each, and an adapter."""
    for package in ("gptqmodel", "optimum"):
        pytest.importorskip(package)
    folder, config = tmp_path_factory.mktemp(request.param), LlamaConfig(**SHAPE, num_attention_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    stored, meant = {}, model.state_dict()
    for name, weight in model.state_dict().items():
        stored[name] = weight.half()
        if name.endswith("proj.weight"):
            del stored[name]
            *found, meant[name] = codes_of(weight)
            layer = name.removesuffix("weight")
            stored.update({layer + piece: tensor for piece, tensor in pieces(request.param, *found).items()})
    model.load_state_dict(meant)
    model.save_pretrained(folder / "plain")
    how = {"quant_method": request.param, "bits": 4, "group_size": GROUP, **HOW[request.param]}
    (folder / "codes").mkdir()
    save_file(stored, folder / "codes" / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "codes" / "config.json").write_text(json.dumps({**written, "quantization_config": how}))
    shutil.copy(next(CASES.glob("N20_*")) / "texts.jsonl", folder)
    for base in ("plain", "codes"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(CASES / "_bases/llama" / name, folder / base)
        text = f'kind = "causal-lm"\nbase = "{base}"\ndata = "texts.jsonl"\ntext = "text"\n'
        (folder / f"{base}.toml").write_text(text)
    recipe = Recipe("lora", steps=8, batch_size=4, learning_rate=0.02)
    train(tasks.from_name(str(folder / "plain.toml")), recipe)[0].save(folder / "a")
    return folder


def fresh(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "codes", dtype=torch.float32)


@needs_packages
def test_scores_are_peft_s_and_those_of_the_weights_that_the_codes_stand_for(folder):
    from peft import PeftModel

    plain, codes = (tasks.from_name(str(folder / f"{name}.toml")) for name in ("plain", "codes"))
    adapter = Adapter.load(folder / "a")
    alone, worn = (row["loss"] for row in Evaluate().run([adapter], codes).rows())
    assert [alone, worn] == pytest.approx([row["loss"] for row in Evaluate().run([adapter], plain).rows()], abs=1e-4)
    assert abs(worn - alone) > 0.01
    assert worn == pytest.approx(codes.score(PeftModel.from_pretrained(fresh(folder), folder / "a"), "test").mean_loss)
    found = Shapley(players="layer", worth="loss", estimator="exact").run([adapter], codes)
    assert sum(row["value"] for row in found.rows()) == pytest.approx(alone - worn, abs=1e-5)


@needs_packages
def test_a_base_in_codes_scores_as_before_once_an_adapter_is_taken_off(folder):
    task, model = tasks.from_name(str(folder / "codes.toml")), fresh(folder)
    alone = task.score(model, "test").loss
    with attach(model, Adapter.load(folder / "a")) as attached:
        assert task.score(attached.model, "test").loss != pytest.approx(alone, abs=1e-3)
    assert task.score(model, "test").loss == pytest.approx(alone, abs=1e-6)
