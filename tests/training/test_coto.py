import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import HiraConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lora_lab.adapters.groups import block, group
from lora_lab.adapters.models.attached import layers
from lora_lab.errors import OptionError, TunerError
from lora_lab.training.coto import CoToCallback, Switches
from lora_lab.training.schedule import Schedule

CASES = Path(__file__).parents[1] / "cases"


def llama(config=None, blocks=2, targets=("q_proj", "v_proj"), seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=blocks,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    return get_peft_model(model, config or LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


class Tokens(torch.utils.data.Dataset):
    def __init__(self, n=10):
        self.ids = torch.randint(0, 32, (n, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(model, folder, *callbacks, n=10, bs=2, ga=2, **options):
    options = {"num_train_epochs": 3, "save_strategy": "no", "logging_strategy": "no", **options}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=bs,
        gradient_accumulation_steps=ga,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        learning_rate=1e-2,
        **options,
    )
    made = Trainer(
        model=model, args=arguments, train_dataset=Tokens(n), eval_dataset=Tokens(4), callbacks=list(callbacks)
    )
    return made


class Watch(TrainerCallback):
    """Which layers computed their branch in each forward pass of the model, and whether it was training."""

    def __init__(self, model):
        self.passes = []
        self._now = set()
        for name, layer in layers(model).items():
            branch = next(iter(layer.lora_A.values()))
            branch.register_forward_hook(lambda *_, name=name: self._now.add(name))
        model.register_forward_hook(self._done)

    def _done(self, model, args, output):
        self.passes.append((model.training, frozenset(self._now)))
        self._now = set()


class Stop(TrainerCallback):
    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.error:
                raise self.error
            control.should_training_stop = True


def all_on(model):
    return not any(layer.disable_adapters for layer in layers(model).values())


@pytest.mark.parametrize("row", json.loads((CASES / "T01_max_steps_minus_one/expected.json").read_text())["table"])
def test_the_schedule_runs_over_the_trainers_own_number_of_steps(row, tmp_path):
    callback = CoToCallback()
    options = {"max_steps": row["max_steps"]} if "max_steps" in row else {}
    run = trainer(
        llama(), tmp_path, callback, n=row["n"], bs=row["bs"], ga=row["ga"], num_train_epochs=row["epochs"], **options
    )
    run.train()
    assert [step for step, _, _ in callback.log] == list(range(row["steps"]))
    assert [p for _, p, _ in callback.log] == [Schedule().probability(t, row["steps"]) for t in range(row["steps"])]


def test_one_mask_serves_all_batches_of_an_optimiser_step(tmp_path):
    model, callback = llama(), CoToCallback(seed=1)
    watch = Watch(model)
    trainer(model, tmp_path, callback).train()
    expected = json.loads((CASES / "T02_gradient_accumulation_mask/expected.json").read_text())
    assert len(callback.log) == expected["draws"]
    assert len(watch.passes) == expected["micro_batches"]
    batches_of_step = [2, 2, 1] * 3
    passes = iter(watch.passes)
    for (_, _, mask), count in zip(callback.log, batches_of_step, strict=True):
        on = {name for on, names in zip(mask, callback.groups.values(), strict=True) if on for name in names}
        assert [next(passes)[1] for _ in range(count)] == [on] * count


def test_evaluation_during_training_uses_every_adapter(tmp_path):
    model = llama()
    watch = Watch(model)
    run = trainer(model, tmp_path, CoToCallback(Schedule(p0=0)), eval_strategy="steps", eval_steps=1)
    run.train()
    evaluations = [on for training, on in watch.passes if not training]
    assert len(evaluations) >= 9
    assert {len(on) for on in evaluations} == {4}
    assert {len(on) for training, on in watch.passes if training} == {2, 4}
    assert run.evaluate()["eval_loss"] == run.evaluate()["eval_loss"]


def test_a_forward_pass_in_evaluation_mode_within_a_step_uses_every_adapter():
    model = llama()
    ids = Tokens().ids[:2]
    full = model.eval()(input_ids=ids).logits
    with Switches(model) as switches:
        switches.set([False, True])
        assert torch.equal(model.eval()(input_ids=ids).logits, full)
        assert not torch.equal(model.train()(input_ids=ids).logits, full)


@pytest.mark.parametrize("error", [None, RuntimeError("stopped")])
def test_nothing_stays_switched_off_after_an_early_stop_or_an_exception(tmp_path, error):
    model = llama()
    run = trainer(model, tmp_path, CoToCallback(Schedule(p0=0)), Stop(2, error))
    if error:
        with pytest.raises(RuntimeError, match="stopped"):
            run.train()
    else:
        run.train()
    assert all_on(model)
    assert run.evaluate()["eval_loss"] == run.evaluate()["eval_loss"]


def test_p0_of_zero_returns_at_once(tmp_path):
    callback = CoToCallback(Schedule(p0=0))
    trainer(llama(), tmp_path, callback).train()
    assert callback.log[0][2].sum() == 1


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], {"q_proj", "v_proj"}, r".*\.(q_proj|v_proj)"], ids=["list", "set", "regex"]
)
def test_exactly_the_peft_layers_are_found(targets):
    assert sum(len(names) for names in Switches(llama(targets=targets)).groups.values()) == 4


def test_all_linear_finds_every_linear_but_the_head():
    assert sum(len(names) for names in Switches(llama(targets="all-linear")).groups.values()) == 14


def test_a_resumed_run_draws_the_masks_of_an_uninterrupted_one_and_ends_with_its_weights(tmp_path):
    expected = json.loads((CASES / "T07_resume_state/expected.json").read_text())
    steps, resume_at = expected["steps_total"], expected["resume_at"]
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": resume_at, "ga": 1, "seed": 3}
    whole_model, whole = llama(), CoToCallback(seed=5)
    trainer(whole_model, tmp_path / "whole", whole, **options).train()
    first = CoToCallback(seed=5)
    trainer(llama(), tmp_path / "cut", first, Stop(resume_at), **options).train()
    resumed_model, resumed = llama(seed=9), CoToCallback(seed=5)
    resumed_model.load_state_dict({**resumed_model.state_dict(), **llama().state_dict()})
    checkpoint = tmp_path / "cut" / f"checkpoint-{resume_at}"
    trainer(resumed_model, tmp_path / "cut", resumed, **options).train(resume_from_checkpoint=str(checkpoint))
    assert len(first.log) == resume_at
    assert len(resumed.log) == steps
    for (step, p, mask), (step2, p2, mask2) in zip(whole.log, resumed.log, strict=True):
        assert (step, p) == (step2, p2)
        assert (mask == mask2).all()
    for name, tensor in whole_model.state_dict().items():
        assert torch.equal(tensor, resumed_model.state_dict()[name]), name


def test_two_callbacks_keep_their_own_state(tmp_path):
    one, two = CoToCallback(seed=1), CoToCallback(seed=2)
    trainer(llama(), tmp_path, one).train()
    trainer(llama(), tmp_path, two).train()
    assert any((a[2] != b[2]).any() for a, b in zip(one.log, two.log, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_same_mask(reentrant):
    ids = Tokens().ids[:3]
    gradients = []
    for checkpointing in (False, True):
        model = llama(blocks=3).train()
        if checkpointing:
            model.enable_input_require_grads()
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # < 5.24
            enable({"use_reentrant": reentrant})
        with Switches(model) as switches:
            switches.set([True, False, True])
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert any(gradient is None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


def test_adamw_leaves_the_adapters_that_are_off_alone():
    model, ids = llama().train(), Tokens().ids[:3]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    with Switches(model) as switches:
        for mask in ([True, True], [True, False]):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            switches.set(mask)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {block(name.removeprefix("base_model.model.")) for name in moved} == {"model.layers.0"}


def test_an_adapter_that_is_off_gives_the_base_output_without_rescaling():
    model, ids = llama().train(), Tokens().ids[:3]
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    full = model(input_ids=ids).logits
    with Switches(model) as switches:
        switches.set([False, False])
        assert torch.equal(model(input_ids=ids).logits, base)
        switches.set([True, True])
        assert torch.equal(model(input_ids=ids).logits, full)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        HiraConfig(r=2, target_modules=["q_proj"], init_weights=False),
        LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
        LoKrConfig(r=2, target_modules=["q_proj"], init_weights=False),
        OFTConfig(oft_block_size=4, target_modules=["q_proj"], init_weights=False),
    ],
    ids=lambda config: "DORA" if getattr(config, "use_dora", False) else config.peft_type.name,
)
def test_every_tuner_is_switched_block_by_block(config):
    model, ids = llama(config).train(), Tokens().ids[:3]
    outputs = []
    with Switches(model) as switches:
        assert list(switches.groups) == ["model.layers.0", "model.layers.1"]
        for mask in ([False, False], [False, True], [True, False], [True, True]):
            switches.set(mask)
            outputs.append(model(input_ids=ids).logits)
    with model.disable_adapter():
        assert torch.equal(outputs[0], model(input_ids=ids).logits)
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j])


def test_leaving_the_context_leaves_nothing_on_the_layers():
    model = llama()
    before = {name: set(vars(layer)) for name, layer in layers(model).items()}
    with Switches(model) as switches:
        switches.draw(Schedule(p0=0), 0, 10, seed=0)
        assert any(set(vars(layer)) != before[name] for name, layer in layers(model).items())
    assert {name: set(vars(layer)) for name, layer in layers(model).items()} == before


def test_a_copy_of_a_model_in_training_is_switched_like_its_original():
    model, ids = llama().train(), Tokens().ids[:3]
    with Switches(model) as switches:
        switches.set([True, False])
        twin = copy.deepcopy(model)
        expected = model(input_ids=ids).logits
        for parameter in model.parameters():
            parameter.data.zero_()
        assert torch.equal(twin(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("vit.encoder.layer.10.attention.attention.query", "vit.encoder.layer.10"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0"),
        ("text_model.encoder.layers.2.mlp.fc1", "text_model.encoder.layers.2"),
        ("model.layers.1.mlp.experts.7.w1", "model.layers.1"),
        ("swin.encoder.layers.1.blocks.0.attention.self.query", "swin.encoder.layers.1.blocks.0"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0",
        ),
        ("lm_head", "lm_head"),
        # behind the index of a model in an nn.Sequential or a list of models
        ("0.auto_model.encoder.layer.11.output.dense", "0.auto_model.encoder.layer.11"),
        ("0.model.layers.3.mlp.experts.7.w1", "0.model.layers.3"),
        ("1.encoder.block.3.layer.1.DenseReluDense.wi", "1.encoder.block.3"),
        ("model.0.layers.3.self_attn.q_proj", "model.0.layers.3"),
        ("experts.2.transformer.h.5.attn.c_attn", "experts.2.transformer.h.5"),
        ("2.linear", "2"),
        ("3.attn.q", "3"),
        # stages, and lists in a list
        ("convnext.encoder.stages.2.layers.8.pwconv1", "convnext.encoder.stages.2.layers.8"),
        ("stages.1.blocks.2.mlp.fc1", "stages.1.blocks.2"),
        ("resnet.encoder.stages.0.layers.1.layer.0.convolution", "resnet.encoder.stages.0.layers.1"),
        ("segformer.encoder.block.0.1.attention.self.query", "segformer.encoder.block.0.1"),
        ("funnel.encoder.blocks.2.0.ffn.linear_1", "funnel.encoder.blocks.2.0"),
        ("transformer.layers.4.1.net.3", "transformer.layers.4"),
        ("encoder.layer.2.transformer.layer.1.attention.attention.query", "encoder.layer.2.transformer.layer.1"),
        ("input_blocks.4.1.transformer_blocks.0.attn2.to_k", "input_blocks.4.1.transformer_blocks.0"),
        ("visual.transformer.resblocks.9.mlp.c_fc", "visual.transformer.resblocks.9"),
        ("transformer_blocks.3.attn.to_out.0", "transformer_blocks.3"),
        ("transformer_blocks.3.ff.net.0.proj", "transformer_blocks.3"),
        ("down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0"),
        ("down_blocks.1.downsamplers.0.conv", "down_blocks.1"),
        # no list of blocks: the first index
        ("transformer.attentions.3.q_lin", "transformer.attentions.3"),
        ("bbox_embed.0.layers.1", "bbox_embed.0"),
        ("classifier.1", "classifier.1"),
    ],
)
def test_a_module_belongs_to_its_transformer_block(name, expected):
    assert block(name) == expected


def test_groups_may_be_modules_or_regular_expressions():
    names = ["layers.0.q", "layers.0.v", "layers.1.q"]
    assert group(names, "module") == {name: [name] for name in names}
    assert group(names, {"queries": r"\.q$", "values": r"\.v$"}) == {
        "queries": ["layers.0.q", "layers.1.q"],
        "values": ["layers.0.v"],
    }


@pytest.mark.parametrize(
    ("by", "text"),
    [
        ("layer", "unknown grouping 'layer'"),
        ({"a": r"q$"}, r"layers.0.v matches no group"),
        ({"a": r"q$", "b": "layers"}, r"layers.0.q matches a, b"),
        ({"a": "layers", "b": "^x"}, r"group 'b' \('\^x'\) matches no module; there are: layers.0.q"),
        ({"a": "("}, "not a regular expression"),
    ],
)
def test_groups_that_do_not_fit_are_refused_by_name(by, text):
    with pytest.raises(OptionError, match=text):
        group(["layers.0.q", "layers.0.v"], by)


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(TunerError, match="no PEFT layers"):
        Switches(torch.nn.Linear(2, 2))


def test_a_mask_of_the_wrong_length_is_refused():
    with pytest.raises(OptionError, match="a mask of 3 for 2 groups"):
        Switches(llama()).set(np.ones(3, dtype=bool))
