"""Fused checkpoints give what PEFT's own merge, or the adapted model, gives."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from making_checkpoints import QV, TEXT, class_of, in_peft, load_base, merged, train, write_base
from making_processes import finished, started
from peft_models import quiet_embeddings, randomised
from safetensors.torch import load_file, save_file

from lora_lab import files
from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.lowrank import LowRank
from lora_lab.adapters.renames import renamed
from lora_lab.errors import FileError, LoraLabWarning, MismatchError, OptionError, TunerError
from lora_lab.files import LazyTensors
from lora_lab.files.resuming import place_of
from lora_lab.fusing.fuse import FuseOptions, Fusion
from lora_lab.fusing.verify import verify


def fusion(base, adapters, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLabWarning)  # of embeddings that are saved whole, and bases of two names
        return Fusion(base, [Adapter.load(adapter) for adapter in adapters], FuseOptions(**options))


def fused(base, adapters, path, *, force=False, **options):
    return fusion(base, adapters, **options).write(path, force=force)


def assert_fused(name, folder, wanted):
    """The folder holds these parameters, and transformers finds every one of them."""
    model, told = class_of(name).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(told.values())
    got = model.state_dict()
    assert set(got) == set(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=1e-12 if tensor.dtype == torch.float64 else 1e-5)


# every tuner, on every kind of layer

LORA = {
    "llama": peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=[*QV, "embed_tokens", "lm_head"], rank_pattern={"v_proj": 3}, use_rslora=True
    ),
    "gpt2": peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "bert": peft.LoraConfig(
        r=2, target_modules=["query", "dense"], exclude_modules=["classifier"], task_type="SEQ_CLS", bias="all"
    ),
    "vit": peft.LoraConfig(r=2, target_modules=["q_proj", "projection"], modules_to_save=["classifier"]),
    "clip": peft.LoraConfig(r=2, target_modules=["q_proj", "visual_projection", "patch_embedding", "token_embedding"]),
    "halves": peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]),
    "experts": peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
}
OTHERS = {
    "ADALORA": lambda: peft.AdaLoraConfig(total_step=10, init_r=3, target_modules=QV),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "C3A": lambda: peft.C3AConfig(block_size=4, target_modules=QV),
    "DELORA": lambda: peft.DeloraConfig(r=2, target_modules=QV),
    "DORA": lambda: peft.LoraConfig(r=2, target_modules=[*QV, "embed_tokens"], use_dora=True),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=9, target_modules=QV),
    "GRALORA": lambda: peft.GraloraConfig(r=4, target_modules=QV),
    "HIRA": lambda: peft.HiraConfig(r=2, target_modules=QV),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=QV),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LOHA": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=QV),
    "LOKR": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=QV),
    "MISS": lambda: peft.MissConfig(r=2, target_modules=QV),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "OSF": lambda: peft.OSFConfig(target_modules=QV),
    "RANDLORA": lambda: peft.RandLoraConfig(r=2, target_modules=QV),
    "SHIRA": lambda: peft.ShiraConfig(r=2, target_modules=QV),
    "TOKENS": lambda: peft.LoraConfig(r=2, target_modules=QV, trainable_token_indices=[1, 5]),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    "FROD": lambda: peft.FrodConfig(target_modules=["q_proj", "v_proj"]),
    "FROD with its projections": lambda: peft.FrodConfig(target_modules=["q_proj", "up_proj"], save_projection=True),
    "UNILORA": lambda: peft.UniLoraConfig(r=2, theta_d_length=30, target_modules=["v_proj", "q_proj"]),
    "UNILORA with its indices": lambda: peft.UniLoraConfig(
        r=2, theta_d_length=30, target_modules=["q_proj", "down_proj"], save_indices=True
    ),
    "VBLORA": lambda: peft.VBLoRAConfig(vector_length=4, num_vectors=8, target_modules=QV),
    "VERA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "VERA without its matrices": lambda: peft.VeraConfig(
        r=2, target_modules=["q_proj", "o_proj"], save_projection=False
    ),
    "WAVEFT": lambda: peft.WaveFTConfig(n_frequency=9, target_modules=QV),
}
ELSEWHERE = [
    ("gpt2", lambda: peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True)),
    ("gpt2", lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    ("gpt2", lambda: peft.FrodConfig(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)),
    (
        "gpt2",
        lambda: peft.UniLoraConfig(
            r=2, theta_d_length=30, target_modules=["mlp.c_proj", "c_attn"], fan_in_fan_out=True
        ),
    ),
    ("bert", lambda: peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", lora_bias=True)),
    ("bert", lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["query"], task_type="SEQ_CLS")),
    ("vit", lambda: peft.LoraConfig(r=2, target_modules=["projection"], use_dora=True)),
    ("halves", lambda: peft.LoraConfig(r=2, target_modules=["gate_proj"], use_dora=True)),
    ("vit", lambda: peft.LoHaConfig(r=2, target_modules=["projection"])),
    ("vit", lambda: peft.LoKrConfig(r=2, target_modules=["projection", "q_proj"])),
    ("vit", lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["projection"])),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    made = {}

    def base(name):
        if name not in made:
            made[name] = write_base(name, folder / name)
        return made[name]

    return base


@pytest.mark.parametrize("name", LORA)
def test_lora_is_fused_as_peft_merges_it(bases, tmp_path, name):
    adapter = train(name, bases(name), tmp_path / "a", LORA[name])
    told = fused(bases(name), [adapter], tmp_path / "out", max_shard_size=6e-6)
    assert_fused(name, tmp_path / "out", merged(name, bases(name), adapter))
    assert told.error < 1e-15
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tuner", OTHERS)
def test_every_tuner_that_peft_merges_is_fused_as_peft_merges_it(bases, tmp_path, tuner):
    adapter = train("llama", bases("llama"), tmp_path / "a", OTHERS[tuner])
    wanted, base = merged("llama", bases("llama"), adapter), load_base("llama", bases("llama")).state_dict()
    assert any(not torch.equal(wanted[key], base[key]) for key in base)
    fused(bases("llama"), [adapter], tmp_path / "out")
    assert_fused("llama", tmp_path / "out", wanted)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_begins_with_a_decomposition_of_the_weight_is_taken_from_the_weight(tmp_path, init):
    base = write_base("llama", tmp_path / "base", torch.float32)  # PEFT knows no other here
    adapter = train("llama", base, tmp_path / "a", peft.LoraConfig(r=2, target_modules=QV, init_lora_weights=init))
    fused(base, [adapter], tmp_path / "out")
    assert_fused("llama", tmp_path / "out", merged("llama", base, adapter))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "config"), ELSEWHERE, ids=range(len(ELSEWHERE)))
def test_other_tuners_are_right_on_other_layers(bases, tmp_path, name, config):
    adapter = train(name, bases(name), tmp_path / "a", config)
    fused(bases(name), [adapter], tmp_path / "out")
    assert_fused(name, tmp_path / "out", merged(name, bases(name), adapter))


@pytest.mark.filterwarnings("ignore")
def test_what_is_decomposed_is_decomposed_in_the_bases_dtype(tmp_path):
    base = write_base("llama", tmp_path / "base", torch.bfloat16)
    adapter = train("llama", base, tmp_path / "a", OTHERS["FROD"])
    fused(base, [adapter], tmp_path / "out")
    wanted = merged("llama", base, adapter)
    assert all(torch.equal(t, wanted[key]) for key, t in load_file(tmp_path / "out" / "model.safetensors").items())


@pytest.mark.filterwarnings("ignore")
def test_modules_that_are_named_by_their_order_alone_need_a_model(bases, tmp_path):
    adapter = train("llama", bases("llama"), tmp_path / "a", OTHERS["UNILORA"])
    with pytest.raises(TunerError, match="UNILORA names its modules by their order in the model"):
        fused(bases("llama") / "model.safetensors", [adapter], tmp_path / "out")


@pytest.mark.parametrize("said", [True, False])
def test_the_layer_says_how_its_weight_is_stored_not_the_file(bases, tmp_path, said):
    adapter = train("gpt2", bases("gpt2"), tmp_path / "a", LORA["gpt2"])  # attn.c_proj is square
    wanted = merged("gpt2", bases("gpt2"), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": said}))
    fused(bases("gpt2"), [adapter], tmp_path / "out")
    assert_fused("gpt2", tmp_path / "out", wanted)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "no PROMPT_TUNING|names no module",
        ),
        (lambda: peft.LilyConfig(r=2, target_modules=QV), "LILY mixes its matrices by what the input is"),
        (
            lambda: peft.LoraConfig(r=2, target_modules=QV, alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
            "acts after its invocation tokens alone",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_weights_to_fuse_is_refused_by_name(bases, tmp_path, config, text):
    adapter = train("llama", bases("llama"), tmp_path / "a", config)
    with pytest.raises((TunerError, ValueError), match=text):
        fused(bases("llama"), [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# several adapters


def test_coefficients_are_of_the_sum_of_updates(bases, tmp_path):
    base, plain = bases("llama"), peft.LoraConfig(r=2, target_modules=QV)
    paths = [
        train("llama", base, tmp_path / "a", plain, 1),
        train("llama", base, tmp_path / "b", peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]), 2),
        train("llama", base, tmp_path / "c", OTHERS["DORA"], 3),
    ]
    whole = load_base("llama", base).state_dict()
    parts = [merged("llama", base, path) for path in paths]
    wanted = {
        key: tensor + sum(c * (part[key] - tensor) for c, part in zip((1, -0.5, 2), parts, strict=True))
        for key, tensor in whole.items()
    }
    fused(base, paths, tmp_path / "out", coefficients=(1.0, -0.5, 2.0))
    assert_fused("llama", tmp_path / "out", wanted)


def test_heads_in_which_adapters_differ_need_a_word(bases, tmp_path):
    paths = [train("bert", bases("bert"), tmp_path / str(i), LORA["bert"], i) for i in (1, 2)]
    with pytest.raises(MismatchError, match="between the adapters; `heads` average or first says what becomes of it"):
        fused(bases("bert"), paths, tmp_path / "out")
    fused(bases("bert"), paths, tmp_path / "out", heads="first")
    got = load_file(tmp_path / "out" / "model.safetensors")["classifier.weight"]
    assert torch.equal(got, merged("bert", bases("bert"), paths[0])["classifier.weight"])
    with pytest.raises(OptionError, match="keep-own"):
        FuseOptions(heads="keep-own")


@pytest.mark.parametrize("config", [{"trainable_token_indices": [1, 3]}, {"modules_to_save": ["lm_head"]}])
def test_what_cannot_be_chosen_here_is_not_offered(bases, tmp_path, config):
    paths = [
        train("llama", bases("llama"), tmp_path / str(i), peft.LoraConfig(r=2, target_modules=QV, **config), i)
        for i in (1, 2)
    ]
    with pytest.raises(MismatchError, match="`heads` average or first says what becomes of"):
        fusion(bases("llama"), paths)


def test_the_names_that_adapters_have_for_a_base_that_is_given_say_nothing(bases, tmp_path):
    loaded = []
    for i, name in enumerate(("here", "there")):
        train("llama", bases("llama"), tmp_path / name, peft.LoraConfig(r=2, target_modules=QV), i)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": name}))
        loaded.append(Adapter.load(tmp_path / name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fusion(bases("llama"), loaded).write(tmp_path / "out")
        assert verify(bases("llama"), loaded, tmp_path / "out").right


# tied embeddings: what the adapted model computes

TIED = {
    "LoRA on the input": (peft.LoraConfig(r=2, target_modules=["embed_tokens"]), False),
    "LoRA on the output": (peft.LoraConfig(r=2, target_modules=["lm_head"]), False),
    "LoRA on both": (peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]), False),
    "DoRA on the input": (peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True), False),
    "a trained input": (peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["embed_tokens"]), False),
    "a trained output": (peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["lm_head"]), False),
    "both trained as one": (
        peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True,
    ),
    "trained tokens": (peft.LoraConfig(r=2, target_modules=QV, trainable_token_indices=[1, 2]), True),
    "neither": (peft.LoraConfig(r=2, target_modules=QV), True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_are_what_they_are_with_the_adapter_at_work(bases, tmp_path, case):
    config, stay_tied = TIED[case]
    adapter = train("tied", bases("tied"), tmp_path / "a", config)
    ids = torch.arange(12)[None]
    told = fused(bases("tied"), [adapter], tmp_path / "out")
    model, missing = class_of("tied").from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(missing.values())
    with torch.no_grad():
        wanted = in_peft("tied", bases("tied"), adapter)(input_ids=ids).logits
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, wanted, rtol=0, atol=1e-12)
    assert model.config.tie_word_embeddings is stay_tied
    assert ("are one tensor in the base, and two from here on" in " ".join(told.notes)) is not stay_tied


# heads and names


def test_a_head_that_the_base_has_not_comes_with_its_class(bases, tmp_path):
    cls = transformers.BertModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls(cls.config_class(**TEXT)).double().save_pretrained(tmp_path / "base")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, dtype="auto"
    )
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = randomised(peft.get_peft_model(whole, config))
    model.save_pretrained(tmp_path / "a")
    told = fused(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    assert any("classifier.weight [5, 16] is new" in note for note in told.notes)
    again, missing = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(missing.values())
    assert again.config.architectures == ["BertForSequenceClassification"]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "more",
    [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens", "lm_head"]}],
    ids=["trained", "LoRA"],
)
def test_more_tokens_than_the_base_has_are_told_in_the_configuration(tmp_path, dtype, more):
    base = write_base("llama", tmp_path / "base", dtype)
    model = load_base("llama", base).double()
    model.resize_token_embeddings(43, mean_resizing=False)
    model = randomised(peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": QV, **more})))
    with quiet_embeddings(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "a")
    told = fused(base, [tmp_path / "a"], tmp_path / "out")
    assert "lm_head.weight has 43 rows, 40 in the base" in told.notes
    again = load_base("llama", tmp_path / "out")
    assert again.config.vocab_size == 43
    assert again.dtype == dtype
    ids = torch.tensor([[1, 41, 42]])
    with torch.no_grad():
        got, wanted = again.double()(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.2)


def test_trained_tokens_that_the_base_has_not_are_refused(bases, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=QV, trainable_token_indices=[1, 5])
    adapter = train("llama", bases("llama"), tmp_path / "a", config)
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**said, "trainable_token_indices": [1, 40]}))
    with pytest.raises(MismatchError, match=r"trains the tokens 40, and model\.embed_tokens\.weight has 40 rows"):
        fused(bases("llama"), [adapter], tmp_path / "out")


def test_a_base_without_a_configuration_goes_by_names_and_shapes(bases, tmp_path):
    adapter = train("llama", bases("llama"), tmp_path / "a", LORA["llama"])
    fused(bases("llama") / "model.safetensors", [adapter], tmp_path / "out")
    wanted = merged("llama", bases("llama"), adapter)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(got[key], wanted[key], rtol=0, atol=1e-12) for key in wanted)
    assert sorted(os.listdir(tmp_path / "out")) == ["fuse.json", "model.safetensors"]


def test_the_files_beside_the_weights_come_along_and_the_card_of_the_base_does_not(bases, tmp_path):
    base = write_base("llama", tmp_path / "base")
    for name in ("tokenizer.json", "README.md", "pytorch_model.bin", ".hidden", "LICENSE"):
        (base / name).write_text(name)
    (base / "chat_template.jinja").symlink_to("/etc/hostname")
    adapter = train("llama", bases("llama"), tmp_path / "a", LORA["llama"])
    fused(base, [adapter], tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        *("LICENSE", "config.json", "fuse.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    ]
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_one_rounding_is_told(bases, tmp_path, dtype):
    base = write_base("llama", tmp_path / "base", dtype)
    adapter = train("llama", bases("llama"), tmp_path / "a", peft.LoraConfig(r=2, target_modules=QV))
    told = fused(base, [adapter], tmp_path / "out")
    before, got = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    updates = {f"{name}.weight": u.delta().double() for name, u in Adapter.load(adapter).updates.items()}
    lost = norm = 0.0
    for key, tensor in before.items():
        exact = tensor.double() + updates.get(key, 0)
        assert got[key].dtype == dtype
        assert torch.equal(got[key], exact.to(dtype)) or (got[key].double() - exact).abs().max() < 2e-2
        lost += float((got[key].double() - exact).square().sum())
    norm = sum(float(update.square().sum()) for update in updates.values())
    assert told.error == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    assert 1e-5 < told.error < 1e-2


def test_what_the_dtype_cannot_hold_is_refused(bases, tmp_path):
    base = write_base("llama", tmp_path / "base", torch.float16)
    adapter = train("llama", bases("llama"), tmp_path / "a", peft.LoraConfig(r=2, target_modules=QV, lora_alpha=1e7))
    with pytest.raises(MismatchError, match=r"q_proj\.weight: the sum has entries that float16 cannot hold"):
        fused(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantised_bases_are_refused_by_name(bases, tmp_path):
    adapter = train("llama", bases("llama"), tmp_path / "a", peft.LoraConfig(r=2, target_modules=QV))
    base = write_base("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    said = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(said))
    with pytest.raises(MismatchError, match=r"base: its weights are quantised \(bitsandbytes\)"):
        fused(base, [adapter], tmp_path / "out")
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(16, 16).to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match=r"q_proj\.weight is float8_e4m3fn in the base: quantised weights"):
        fused(base, [adapter], tmp_path / "out")
    packed = {"layers.0.q_proj.qweight": torch.ones(4, 2, dtype=torch.int32), "layers.0.q_proj.scales": torch.ones(1)}
    save_file(packed, tmp_path / "packed.safetensors")
    updates = {"layers.0.q_proj": LowRank(torch.ones(1, 4), torch.ones(12, 1))}
    with pytest.raises(MismatchError, match=r"q_proj\.qweight is int32 in the base: quantised weights"):
        Fusion(tmp_path / "packed.safetensors", [from_updates(updates, like=Adapter({}, {}, {}, {}, "a"), source="a")])


# what does not fit


def test_modules_that_the_base_lacks_are_named_with_the_closest(bases, tmp_path):
    adapter = train("llama", bases("llama"), tmp_path / "a", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key.replace("q_proj", "q_prj"): t for key, t in tensors.items()}, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_prj"]}))
    with pytest.raises(MismatchError, match=r"no module .*q_prj.* the closest one is model\.layers\.0\..*q_proj"):
        fused(bases("llama"), [adapter], tmp_path / "out")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [("unet.model", "unet="), ("", "=model"), ("model.language_model", "model.language_model=model")],
)
def test_modules_under_other_first_names_are_told_with_the_renaming(bases, tmp_path, theirs, said):
    adapter = train("llama", bases("llama"), tmp_path / "a", peft.LoraConfig(r=2, target_modules=QV))
    other, base = renamed(Adapter.load(adapter), "model", theirs), bases("llama") / "model.safetensors"
    with pytest.raises(MismatchError, match=rf"`rename` {said} makes them the base's"):
        Fusion(base, [other])
    Fusion(base, [renamed(other, *said.split("="))])


def test_experts_that_were_modules_are_found_where_the_checkpoint_has_them(bases, tmp_path):
    weights = {key: LazyTensors(bases("experts") / "model.safetensors")[key] for key in EXPERTS}
    updates = {
        key.removesuffix(".weight"): LowRank(torch.randn(2, t.shape[1]).double(), torch.randn(t.shape[0], 2).double())
        for key, t in weights.items()
    }
    like = Adapter({}, {}, {}, {}, "a")
    Fusion(bases("experts"), [from_updates(updates, like=like, source="a")]).write(tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (bases("experts"), tmp_path / "out"))
    for key, tensor in before.items():
        wanted = tensor + updates[key.removesuffix(".weight")].delta() if key in EXPERTS else tensor
        torch.testing.assert_close(after[key], wanted, rtol=0, atol=1e-12)


EXPERTS = [f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight" for i, j in ((0, 1), (2, 2))]


@pytest.mark.parametrize(("there", "asked"), [("qkv_proj", "q_proj"), ("q_proj", "qkv_proj")])
def test_parts_of_a_fused_weight_and_a_fused_one_of_parts_are_refused_by_name(tmp_path, there, asked):
    save_file(
        {f"layers.{i}.self_attn.{there}.weight": torch.ones(12, 4) for i in (0, 1)}, tmp_path / "base.safetensors"
    )
    updates = {f"layers.{i}.self_attn.{asked}": LowRank(torch.ones(1, 4), torch.ones(12, 1)) for i in (0, 1)}
    adapter = from_updates(updates, like=Adapter({}, {}, {}, {}, "a"), source="a")
    with pytest.raises(MismatchError, match=rf"no module layers\.0\.self_attn\.{asked}.*closest one is .*{there}"):
        Fusion(tmp_path / "base.safetensors", [adapter])


def test_a_base_of_other_shapes_is_one_line(bases, tmp_path):
    adapter = train("llama", bases("llama"), tmp_path / "a", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    base = write_base("llama", tmp_path / "base", hidden_size=8, intermediate_size=12)
    with pytest.raises(MismatchError, match=r"ΔW of .*q_proj is \[16, 16\], and its weight in the base \[8, 8\]"):
        fused(base, [adapter], tmp_path / "out")


def test_an_output_that_is_there_or_is_an_input_is_not_touched(bases, tmp_path):
    base, adapter = write_base("llama", tmp_path / "base"), tmp_path / "a"
    train("llama", base, adapter, LORA["llama"])
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    for path in (base, adapter, tmp_path):
        with pytest.raises(FileError, match=r"one of the inputs|exists already|holds more"):
            fusion(base, [adapter]).write(path, force=True, inputs=[adapter])
    assert before == {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    fused(base, [adapter], tmp_path / "out")
    with pytest.raises(FileError, match="out: exists already"):
        fused(base, [adapter], tmp_path / "out")
    fused(base, [adapter], tmp_path / "out", force=True)
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(FileError, match=r"out: holds more than the checkpoint that was written there \(mine\.txt\)"):
        fused(base, [adapter], tmp_path / "out", force=True)


# resuming


@pytest.fixture
def work(bases, tmp_path):
    adapter = train("llama", bases("llama"), tmp_path / "a", LORA["llama"])
    fused(bases("llama"), [adapter], tmp_path / "whole", max_shard_size=6e-6)
    return bases("llama"), adapter


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "fuse.json"}


def test_a_full_disk_keeps_what_is_done_and_the_next_run_goes_on(work, tmp_path, monkeypatch):
    base, adapter = work
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match=r"No space left on device\); the \d files that are done are kept"):
            fused(base, [adapter], tmp_path / "out", max_shard_size=6e-6)
    assert not (tmp_path / "out").exists()
    told = fused(base, [adapter], tmp_path / "out", max_shard_size=6e-6)
    assert told.resumed > 0
    assert told.error == fused(base, [adapter], tmp_path / "third", max_shard_size=6e-6).error
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not place_of(tmp_path / "out").exists()


def test_no_space_is_told_before_anything_is_written(work, tmp_path, monkeypatch):
    base, adapter = work
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(FileError, match=r"out: 0\.0 GB are needed there, and 0\.0 GB are free"):
        fused(base, [adapter], tmp_path / "out")


def interrupted(base, adapter, path, after):
    """A run that ends when so many tensors are written."""

    class EndError(Exception):
        pass

    def stop(done, _):
        if done > after:
            raise EndError

    with pytest.raises(EndError):
        fusion(base, [adapter], max_shard_size=6e-6).write(path, progress=stop)


def of_the_base(monkeypatch):
    """The names of the base's tensors, as they are read from now on."""
    read, real = [], LazyTensors.__getitem__

    def reading(self, name):
        if not name.startswith("base_model."):  # the adapter's
            read.append(name)
        return real(self, name)

    monkeypatch.setattr(LazyTensors, "__getitem__", reading)
    return read


def test_what_is_done_is_not_done_again(work, tmp_path, monkeypatch):
    base, adapter = work
    interrupted(base, adapter, tmp_path / "out", 12)
    read = of_the_base(monkeypatch)
    told = fused(base, [adapter], tmp_path / "out", max_shard_size=6e-6)
    assert told.resumed >= 2
    assert 0 < len(set(read)) < len(files.open_checkpoint(base)) - 4
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("other", ["adapter", "options", "damage"])
def test_shards_of_another_question_or_damaged_ones_are_made_anew(work, tmp_path, other):
    base, adapter = work
    interrupted(base, adapter, tmp_path / "out", 12)
    options = {"max_shard_size": 6e-6}
    if other == "adapter":
        adapter = train("llama", base, tmp_path / "b", LORA["llama"], seed=5)
    elif other == "options":
        options["coefficients"] = (2.0,)
    else:
        shard = sorted((place_of(tmp_path / "out") / "checkpoint").glob("*.safetensors"))[0]
        os.truncate(shard, shard.stat().st_size - 1)
    fused(base, [adapter], tmp_path / "out", **options)
    fused(base, [adapter], tmp_path / "again", **options)
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_a_run_that_is_killed_outright_is_gone_on_with(work, tmp_path, monkeypatch):
    base, adapter = work
    options = ("fuse", base, adapter, "-o", "out", "--max-shard-size", "0.000006")
    killed = started(tmp_path, *options, fatal=("fusing.fuse", "copied"))  # when all shards are there
    finished(killed, tmp_path, -signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    read = of_the_base(monkeypatch)
    told = fused(base, [adapter], tmp_path / "out", max_shard_size=6e-6)
    assert told.resumed == len(list((tmp_path / "out").glob("*.safetensors")))
    # to see whether what the adapter has saved of them is a copy
    assert set(read) <= {"model.embed_tokens.weight", "lm_head.weight"}
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out", "whole", "out.txt", "err.txt"}


def test_unfinished_shards_in_a_folder_that_others_may_write_are_not_trusted(work, tmp_path):
    base, adapter = work
    interrupted(base, adapter, tmp_path / "out", 12)
    place_of(tmp_path / "out").chmod(0o777)
    with pytest.raises(FileError, match=r"\.out\.unfinished: .*not a folder of yours alone"):
        fused(base, [adapter], tmp_path / "out", max_shard_size=6e-6)


# memory

MEASURE = """
import json, resource, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.lowrank import LowRank
from lora_lab.adapters.renames import renamed
from lora_lab.fusing.fuse import Fusion
torch.set_num_threads(1)
fusion = Fusion(Path(sys.argv[1]), [Adapter.load(sys.argv[2])])
torch.ones(256, 256) @ torch.ones(256, 256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fusion.write(Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes of ru_maxrss are Linux's")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A base of 24 weights of 4 MB: more than three of them at a time would show."""
    assert resource
    weights = {f"layers.{i}.proj.weight": torch.randn(1024, 2048).bfloat16() for i in range(24)}
    save_file(weights, tmp_path / "base.safetensors")
    tensors = {}
    for i in range(24):
        tensors[f"base_model.model.layers.{i}.proj.lora_A.weight"] = torch.randn(4, 2048)
        tensors[f"base_model.model.layers.{i}.proj.lora_B.weight"] = torch.randn(1024, 4)
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    paths = [tmp_path / name for name in ("base.safetensors", "a", "out")]
    code = [sys.executable, "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(code, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    size = 1024 * 2048 * 2 / 1024  # kB of one weight; blocks of float32 take 4 MB each
    assert int(done.stdout.split()[-1]) < 3 * size + 8 * 4096 < 24 * size
