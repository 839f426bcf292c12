"""Configurations, layers and outputs by which what PEFT computes is compared with what is computed here."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

LORA = {
    "bert": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["query", "value", "dense"],
        "exclude_modules": ["classifier"],
        "rank_pattern": {"layer.0.attention.self.query": 1, "value": 4},
        "alpha_pattern": {"layer.1.attention.self.value": 9},
        "use_rslora": True,
        "task_type": "SEQ_CLS",  # trains the classifier in full
    },
    "gpt2": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["c_attn", "c_proj"],
        "rank_pattern": {"h.1.attn.c_attn": 4},
        "alpha_pattern": {"mlp.c_proj": 1},
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
    },
    "llama": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 3, "down_proj": 1},
        "task_type": "CAUSAL_LM",
    },
}


@contextlib.contextmanager
def quiet_embeddings() -> Iterator[None]:
    """PEFT tells in every save that it adds the embedding that is adapted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        yield


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The PEFT model with everything that is trained moved away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


class Layers(nn.Module):
    """One of each kind of layer that LoRA knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.conv1 = nn.Conv1d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 5, (3, 1), padding=(1, 0))
        self.point = nn.Conv2d(5, 5, 1)
        self.conv3 = nn.Conv3d(5, 4, 1)
        self.linear = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embedding(ids).mT)
        x = self.point(self.conv2(x[..., None]))
        return self.linear(self.conv3(x[..., None]).flatten(2).mT)
