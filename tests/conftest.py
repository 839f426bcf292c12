"""What all tests share: no network, one thread a worker, tiny random base models."""

import gc
import os
import shutil
import sys
import tempfile

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # nothing is left in the user's own, and nothing found there
os.environ["XDG_CONFIG_HOME"] = os.environ["XDG_CACHE_HOME"]  # nor in the user's settings, where the key lies
os.environ["HF_DATASETS_CACHE"] = os.environ["XDG_CACHE_HOME"]
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import nn

torch.set_num_threads(1)

# No deadline: the first call into torch is slow. The same examples in every run: a failure is everybody's.
settings.register_profile("lora-lab", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("lora-lab")


def pytest_configure(config: pytest.Config) -> None:
    """Let pass what PEFT 0.21 itself calls in transformers 5 whenever a model is wrapped."""
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def pytest_unconfigure() -> None:
    """Remove the caches."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_runtest_setup() -> None:
    """Keep what is imported out of the garbage collector, whose every whole turn (one a training) looks at all of it.

    As often as there is more of it; what the tests before have left is collected first.
    """
    global _imported
    if len(sys.modules) != _imported:
        gc.collect()
        gc.freeze()
        _imported = len(sys.modules)


_imported = 0


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            num_labels=3,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


_BASES = {"bert": _bert, "gpt2": _gpt2, "llama": _llama}


@pytest.fixture
def base_model() -> Callable[[str], nn.Module]:
    """Name (bert, gpt2, llama) → a tiny random model in float64, in eval mode; always the same weights."""

    def make(name: str) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return _BASES[name]().double().eval()

    return make


@pytest.fixture(scope="module")
def few_digits():
    """The digit tasks with 80 digits to validate and 100 to test by, for 297 and 500, in this process alone.

    It gives what reads all of them.
    """
    from lora_lab.tasks.kinds import digits

    every, few = digits.images, {"validation": 80, "test": 100}
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(digits, "images", lambda split: tuple(part[: few.get(split)] for part in every(split)))
        yield every


@pytest.fixture(scope="module")
def forked_workers():
    """Workers of this machine are forked from a process that has loaded torch already, which takes each seconds."""
    from making_processes import server

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("lora_lab.scoring.sharing.local._CONTEXT", server())
        yield


@pytest.fixture(scope="module")
def quick_figures():
    """Figures are composed as ever, but their files hold only what they were drawn from, and no drawing."""
    from matplotlib.figure import Figure

    frames = {
        "pdf": (b"%PDF-1.4", "/{} ({})", b"%%EOF"),
        "png": (b"\x89PNG\r\n\x1a\n", "{}\0{}", b"IEND\xaeB`\x82"),
    }

    def savefig(self, file, *, format, metadata):  # noqa: A002
        first, entry, last = frames[format]
        file.write(first + "".join(entry.format(*each) for each in metadata.items()).encode().ljust(6000) + last)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(Figure, "savefig", savefig)
        changed.setattr(Figure, "draw_without_rendering", lambda self: None)
        yield


@pytest.fixture
def lora_lab(monkeypatch, capsys, tmp_path):
    """The installed command: arguments → (exit code, standard output, standard error), in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    from lora_lab.cli import main

    def run(*arguments):
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run
