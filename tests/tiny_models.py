"""A tiny classification task and adapters for its two layers: what methods that look at data can be checked on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.lowrank import LowRank
from lora_lab.tasks.task import Split, Task


class Net(nn.Module):
    """Two layers and a head on vectors of six numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"fc": nn.Linear(6, 8)}), nn.ModuleDict({"fc": nn.Linear(8, 8), "up": nn.Linear(8, 5)})]
        )
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.layers[0]["fc"](x).tanh()
        x = self.layers[1]["fc"](x).tanh()
        return SimpleNamespace(logits=self.out(self.layers[1]["up"](x)))


SHAPES = {"layers.0.fc": (8, 6), "layers.1.fc": (8, 8), "layers.1.up": (5, 8)}


class Tiny(Task):
    """Random inputs and labels by seed on a net that is always the same; its test split must never be read."""

    about = "random labels of random vectors"
    base = "tiny"
    labels = 3

    def __init__(
        self, seed: int, net: Callable[[], nn.Module] = Net, shape: Sequence[int] = (6,), *, examples: int = 20
    ) -> None:
        self.seed, self.net, self.shape, self.examples = seed, net, shape, examples
        self.name = f"tiny/{seed}"

    @property
    def record(self) -> dict[str, Any]:
        return {"name": self.name}

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.net().requires_grad_(False).eval()

    def _load(self, split: str) -> Split:
        assert split != "test", "nothing may be chosen by the test split"
        generator = torch.Generator().manual_seed(self.seed + (1000 if split == "validation" else 0))
        x = torch.randn(self.examples, *self.shape, generator=generator)
        return Split({"x": x, "labels": torch.randint(self.labels, (self.examples,), generator=generator)})


def update(
    rank: int, shape: Sequence[int], seed: int, size: float = 0.3, dtype: torch.dtype = torch.float32
) -> LowRank:
    """A random ΔW of this shape."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, torch.Size(shape[1:]).numel(), generator=generator, dtype=torch.float64)
    B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return LowRank(A.to(dtype), (size * B).to(dtype), tuple(shape))


def updates(
    seed: int, shapes: Mapping[str, Sequence[int]] = SHAPES, ranks: Sequence[int] = (2, 3), **options: Any
) -> dict[str, LowRank]:
    """A random ΔW for every module, of ranks that take turns."""
    return {
        name: update(ranks[i % len(ranks)], shape, 100 * seed + i, **options)
        for i, (name, shape) in enumerate(shapes.items())
    }


def adapter(made: Mapping[str, LowRank], source: str = "a", **config: Any) -> Adapter:
    """An adapter with exactly these updates, in memory."""
    like = Adapter({}, {"base_model_name_or_path": "tiny", **config}, {}, {}, source)
    return from_updates(made, like=like, source=source)


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    """Module → ΔW in float64."""
    return {name: (u.B.double() @ u.A.double()).reshape(u.shape) for name, u in adapter.updates.items()}


def write_bert(
    place: Path, vocabulary: Path, words: Sequence[str], *, kind: str = "ForSequenceClassification", **config: Any
) -> None:
    """A random BERT classifier of two layers and two labels in the folder `place`, and a tokenizer of these words.

    `kind` is how its class is called after "Bert": ForTokenClassification, Model …
    """
    import transformers
    from transformers import BertConfig, BertTokenizerFast

    torch.manual_seed(0)
    shape = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "num_labels": 2,
    }
    getattr(transformers, f"Bert{kind}")(BertConfig(**{**shape, **config})).save_pretrained(place)
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(place)


LETTERS = "abcdefghijklmnopqrstuvwxyz.,"


def write_clip(place: Path, *, longest: int = 24) -> None:
    """A random CLIP of two blocks an encoder for images of 8 × 8 pixels, a tokenizer of letters, an image processor."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    vocab = [*LETTERS, *[f"{letter}</w>" for letter in LETTERS], "<|startoftext|>", "<|endoftext|>"]
    text = {**small, "vocab_size": len(vocab), "max_position_embeddings": longest, "eos_token_id": len(vocab) - 1}
    vision = {**small, "image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(place)
    CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[]).save_pretrained(place)
    size = {"height": 8, "width": 8}
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size).save_pretrained(place)
