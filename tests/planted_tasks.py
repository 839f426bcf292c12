"""Tiny tasks whose losses can be written down, and random adapters of them, for merges that look at data."""

from types import SimpleNamespace

import torch
from making_adapters import PREFIX, lora, write
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters.adapter import Adapter
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.tasks.task import Split, Targets, Task

# kind → layer of 3 outputs, shape of its input without the examples, trailing shapes of A and B
LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,), (4,), ()),
    "tokens": (lambda: nn.Linear(4, 3), (5, 4), (4,), ()),
    "gpt2": (lambda: Conv1D(3, 4), (5, 4), (4,), ()),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 9), (2, 3), (1,)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(0, 1)), (2, 4, 5), (2, 2, 3), (1, 1)),
}
KINDS = list(LAYERS)
LAYER = "net.lin"


class Net(nn.Module):
    """One layer, its outputs averaged over all places."""

    def __init__(self, layer, *, twice=False):
        super().__init__()
        self.convolution = isinstance(layer, nn.Conv1d | nn.Conv2d)
        self.net = nn.ModuleDict({"lin": layer})
        self.twice = twice

    def forward(self, x):
        out = self.net["lin"](x)
        if self.twice:
            out = out + self.net["lin"](x)
        if out.ndim > 2:
            out = out.flatten(2).mean(-1) if self.convolution else out.mean(1)
        return SimpleNamespace(logits=out)


class Tiny(Task):
    """Random inputs, seen by one random layer; labels are those of the layer plus `planted`, unless shuffled."""

    about, base, labels, batch_size = "a test", "tiny", 3, 32

    def __init__(self, kind="linear", seed=0, *, examples=24, x=None, planted=None, shuffle=False, twice=False):
        self.kind, self.seed, self.examples, self.x = kind, seed, examples, x
        self.planted, self.shuffle, self.twice = planted, shuffle, twice
        self.name = f"{kind}-{seed}"

    @property
    def record(self):
        return {"name": self.name}

    def build_model(self):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = Net(LAYERS[self.kind][0](), twice=self.twice)
        return model.requires_grad_(False).eval()

    def _load(self, split):
        assert split != "test", "the test split was read"
        generator = torch.Generator().manual_seed(2 * self.seed + (split == "train"))
        x = torch.randn(self.examples, *LAYERS[self.kind][1], generator=generator) if self.x is None else self.x
        model = self.build_model()
        if self.planted is not None:
            model.net["lin"].weight += self.planted
        y = model(x).logits.argmax(-1)
        return Split({"x": x, "labels": y[torch.randperm(len(y), generator=generator)] if self.shuffle else y})


class Two(Tiny):
    """Two layers, one after the other."""

    def build_model(self):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = nn.Module()
            model.one, model.two = nn.Linear(4, 6), nn.Linear(6, 3)
        model.forward = lambda x: SimpleNamespace(logits=model.two(model.one(x).tanh()))
        return model.requires_grad_(False).eval()

    def _load(self, split):
        return Split({"x": super()._load(split).inputs["x"], "labels": torch.arange(self.examples) % 3})


class Texts(Tiny):
    """Four places a text, whose next "tokens" (three kinds) are told from the place before; some are no targets."""

    classifies = False

    def build_model(self):
        model = super().build_model()
        model.forward = lambda x: SimpleNamespace(logits=model.net["lin"](x))
        return model

    def _load(self, split):
        generator = torch.Generator().manual_seed(50 + self.seed + (split == "train"))
        x = torch.randn(self.examples, 4, *LAYERS["linear"][1], generator=generator)
        labels = torch.randint(3, x.shape[:2], generator=generator)
        labels[:, 1], labels[::2, 3] = -100, -100
        return Split({"x": x, "labels": labels})

    def targets_of(self, logits, batch):
        labels = batch["labels"][:, 1:]
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none")
        return Targets(loss.reshape(labels.shape), loss.reshape(labels.shape), labels != -100)

    def choices(self, logits, batch):
        return logits[:, :-1][batch["labels"][:, 1:] != -100].float()

    def _check_labels(self, name, split):
        """Targets may be anything."""


def two_layers(folder, seed, names):
    """A random adapter of some of the two layers."""
    tensors = {}
    for i, name in enumerate(names):
        rows, columns = {"one": (6, 4), "two": (3, 6)}[name]
        tensors |= lora(name, rows=rows, columns=columns, seed=10 * seed + i)
    return Adapter.load(write(folder / f"two-{seed}", tensors, target_modules=names))


def adapter_for(folder, kind, seed, *, scale=1.0):
    """A random adapter of rank 2 of the layer."""
    generator = torch.Generator().manual_seed(100 + seed)
    _, _, columns, ones = LAYERS[kind]
    tensors = {
        f"{PREFIX}{LAYER}.lora_A.weight": scale * torch.randn(2, *columns, generator=generator),
        f"{PREFIX}{LAYER}.lora_B.weight": torch.randn(3, 2, *ones, generator=generator),
    }
    path = write(folder / f"{kind}-{seed}", tensors, fan_in_fan_out=kind == "gpt2", target_modules=["lin"])
    return Adapter.load(path)


def deltas_of(sources):
    return [update.delta() for update in sources.updates_of(LAYER)]


QUICK = {
    "fisher": {},
    "regmean": {},
    "lorahub": {"evaluations": 15},
    "adamerging": {"steps": 15},
    "nsc": {"steps": 15},
    "cat-learned": {"steps": 15},
    "ziplora": {"steps": 15},
}


def quick(sources, method, **options):
    return merged(sources, method, **QUICK[method], **options)


def merged(sources, method, **options):
    return merge(sources, method, options=options).adapter.updates[LAYER].delta()


def close(found, wanted, tolerance=1e-4):
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def texts(folder, **options):
    adapters = [adapter_for(folder, "linear", seed) for seed in (0, 1)]
    return Sources(adapters, tasks=[Texts("linear", seed, **options) for seed in (0, 1)])


def coefficients_of(sources, found):
    """c with Σ cᵢ ΔWᵢ = found."""
    columns = torch.stack([delta.flatten().double() for delta in deltas_of(sources)], dim=1)
    solution = torch.linalg.lstsq(columns, found.flatten().double()[:, None]).solution[:, 0]
    close(columns @ solution, found.flatten())
    return solution.tolist()
