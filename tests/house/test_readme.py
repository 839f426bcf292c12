"""What the README says, done."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from lora_lab import cli
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.coto import CoToCallback

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
(LINES,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
TRAINER, TRL = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)


def test_the_ten_lines_of_python_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = LINES.replace("steps=100", "steps=6")
    assert code != LINES
    assert len([line for line in LINES.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "line.pdf"}


def test_the_callback_and_the_context_manager_run_as_shown(tmp_path):
    task = Digits("relabel")
    torch.manual_seed(0)
    model = get_peft_model(task.build_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    inputs = task.split("validation").inputs
    data = [{name: tensor[i] for name, tensor in inputs.items()} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    names = {"Trainer": Trainer, "peft_model": model, "args": args, "data": data, "steps": 3}
    exec(compile(TRAINER, "training.md", "exec"), names)
    names["trainer"].train()
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_callback_runs_in_trl_as_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own
        from trl import SFTConfig, SFTTrainer

        config = LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "?": 4}, unk_token="?"))
        words.pre_tokenizer = Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
        options = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
        names = {
            "SFTTrainer": SFTTrainer,
            "LoraConfig": LoraConfig,
            "CoToCallback": CoToCallback,
            "model": LlamaForCausalLM(config),
            "args": SFTConfig(output_dir=str(tmp_path), max_steps=3, **options),
            "texts": Dataset.from_dict({"text": ["a b a b"] * 8}),
            "tokenizer": tokenizer,
        }
        exec(compile(TRL, "training.md", "exec"), names)
    (callback,) = [c for c in names["trainer"].callback_handler.callbacks if isinstance(c, CoToCallback)]
    assert [step for step, _, _ in callback.log] == [0, 1, 2]
    assert callback.log[-1][2].all()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_and_every_page_that_is_named_is_there(page):
    for path in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not path.startswith("http"):
            assert (page.parent / path).exists(), path
            assert not path.endswith(".png") or (page.parent / path).stat().st_size > 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_the_program_takes(page):
    text = re.sub(r"\\\n\s*", "", page.read_text())  # a line that goes on in the next
    for line in re.findall(r"^    (lora-lab [^\n]*)$", text, flags=re.M):
        words = shlex.split(line, comments=True)[1:]
        if not {"--help", "--install-completion"} & {*words} and "…" not in line:
            cli.check(words)  # OptionError names what is wrong


def test_the_uses_that_always_work_are_named():
    for command in ("lora-lab interpolate a.safetensors b.safetensors", "lora-lab shapley --samples 200"):
        assert command in README
    assert len(README.splitlines()) <= 100


def test_the_file_tree_names_every_module():
    tree, package = (ROOT / "CONTRIBUTING.md").read_text(), ROOT / "lora_lab"
    for path in package.iterdir():
        assert path.name in tree or path.name.startswith(("__", "py.")), path.name
