"""Bases in 4 and 8 bit: scored as they are, and nothing that needs their weights guesses them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.attached import attach
from lora_lab.analysis.questions import Evaluate, Shapley
from lora_lab.errors import LoraLabError, MismatchError, TaskError
from lora_lab.fusing.fuse import Fusion
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

CASES = Path(__file__).parents[1] / "cases"
SHAPE = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TASK = 'kind = "causal-lm"\nbase = "{}"\ndata = "texts.jsonl"\ntext = "text"\n'
NAMES = ("plain", "b4", "b8")
needs_bitsandbytes = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:bitsandbytes")


def with_words(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CASES / "_bases/llama" / name, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One base in float32, in 4 bit (nf4) and in 8 bit, as bitsandbytes keeps it, a task on each, and its adapter."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("quantised")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=2)).save_pretrained(folder / "plain")
    how = {
        "b4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "b8": BitsAndBytesConfig(load_in_8bit=True),
    }
    for name, config in how.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config, dtype=torch.float32)
        model.save_pretrained(folder / name)
    shutil.copy(next(CASES.glob("N20_*")) / "texts.jsonl", folder)
    for name in NAMES:
        with_words(folder / name)
        (folder / f"{name}.toml").write_text(TASK.format(name))
    adapter, _ = train(
        tasks.from_name(str(folder / "plain.toml")), Recipe("lora", steps=8, batch_size=4, learning_rate=0.02)
    )
    adapter.save(folder / "a")
    return folder


def named(folder, name):
    return tasks.from_name(str(folder / f"{name}.toml"))


@needs_bitsandbytes
def test_scores_are_those_of_the_quantised_base_as_peft_has_them(folder):
    from peft import PeftModel

    adapter, losses = Adapter.load(folder / "a"), {}
    for name in NAMES:
        task = named(folder, name)
        losses[name] = [row["loss"] for row in Evaluate().run([adapter], task).rows()]
        alone = task.score(fresh(folder / name), "test").mean_loss
        # of a new model: PEFT wraps wrongly what bitsandbytes has packed for its CPU kernel
        worn = task.score(PeftModel.from_pretrained(fresh(folder / name), str(folder / "a")), "test").mean_loss
        assert losses[name] == pytest.approx([alone, worn], abs=1e-6)
        assert abs(losses[name][1] - losses[name][0]) > 0.01
    assert abs(losses["b4"][1] - losses["plain"][1]) > 1e-5
    assert len({named(folder, name).base_digest for name in NAMES}) == 3  # stored scores are told apart


def fresh(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@needs_bitsandbytes
@pytest.mark.parametrize("name", NAMES)
def test_a_base_scores_as_before_once_an_adapter_is_taken_off(folder, name):
    task, model = named(folder, name), fresh(folder / name)
    with attach(model, Adapter.load(folder / "a")) as attached:
        worn = task.score(attached.model, "test").loss
    alone = task.score(model, "test").loss
    assert alone == pytest.approx(task.score(fresh(folder / name), "test").loss, abs=1e-6)
    with attach(model, Adapter.load(folder / "a")) as attached:
        assert task.score(attached.model, "test").loss == pytest.approx(worn, abs=1e-6)


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["b4", "b8"])
def test_shared_prefixes_give_what_passes_of_their_own_give(folder, name):
    adapter, task = Adapter.load(folder / "a"), named(folder, name)
    found = Shapley(players="layer", worth="loss", estimator="exact").run([adapter], task)
    whole, nothing = (row["loss"] for row in list(Evaluate().run([adapter], task).rows())[::-1])
    assert sum(row["value"] for row in found.rows()) == pytest.approx(nothing - whole, abs=1e-5)


@needs_bitsandbytes
def test_what_needs_the_weights_refuses_codes_by_name(folder):
    adapter = Adapter.load(folder / "a")
    with pytest.raises(LoraLabError, match="quantised") as caught:
        Fusion(folder / "b4", [adapter])
    assert "\n" not in str(caught.value)
    dora = replace(adapter, config={**adapter.config, "use_dora": True})
    for name in ("b4", "b8"):
        with pytest.raises(MismatchError, match=r"q_proj is quantised \(Linear\w+bit\w*\), and ΔW cannot be had"):
            merge(Sources([dora], base=named(folder, name).build_model))


@needs_bitsandbytes
def test_n29_a_base_that_asks_for_codes_and_holds_none_is_refused(folder):
    task = tasks.from_name(str(next(CASES.glob("N29_*")) / "lm.toml"))
    with pytest.raises(TaskError, match=r"asks for bitsandbytes, and model.layers.0.*is stored unquantised") as caught:
        task.build_model()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "package"),
    [({"quant_method": "gptq", "bits": 4}, "optimum"), ({"quant_method": "awq", "bits": 4}, "gptqmodel")],
)
def test_without_its_package_a_base_is_refused_by_what_to_install(tmp_path, method, package):
    if __import__("importlib.util").util.find_spec(package):
        pytest.skip(f"{package} is installed")
    base = asking(tmp_path, method)
    with pytest.raises(TaskError, match=f"pip install {package}") as caught:
        base.build_model()
    assert "hub id" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_a_way_of_quantising_that_nobody_knows_is_not_passed_over(tmp_path):
    with pytest.raises(
        TaskError, match="is quantised by 'nonsense', of which this version of transformers knows nothing"
    ):
        asking(tmp_path, {"quant_method": "nonsense"}).build_model()


def asking(folder, method):
    """A task on a base whose configuration asks for a way of quantising."""
    shutil.copytree(CASES / "_bases/llama", folder / "base")
    path = folder / "base/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": method}))
    shutil.copy(next(CASES.glob("N20_*")) / "texts.jsonl", folder)
    (folder / "base.toml").write_text(TASK.format("base"))
    return tasks.from_name(str(folder / "base.toml"))
