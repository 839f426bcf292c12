"""What layers see of a task's training data: the inputs of each, and how p(y|x) hangs on its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.models.attached import Attached, put_on
from lora_lab.errors import TunerError
from lora_lab.merging.validation.task_models import MergeModels
from lora_lab.tasks.kinds.language.chat import NO_TARGET
from lora_lab.tasks.task import Task


def _worn_by_source(models: MergeModels, index: int) -> tuple[nn.Module, Attached]:
    model = models.tasks[index].model_on(models.device)
    return model, put_on(model, models.sources.adapters[index])


def information(models: MergeModels, index: int, examples: int, seed: int) -> dict[str, Tensor]:
    """Module → diagonal Fisher information [rows, columns] of its weight, in the layout in which it is stored."""
    sources, task = models.sources, models.tasks[index]
    model, _ = _worn_by_source(models, index)
    data = task.split("train").subset(examples, seed)
    sums = {name: torch.zeros(shape[0], shape[1:].numel()) for name, shape in sources.shapes.items()}
    generator = torch.Generator().manual_seed(seed)
    with watched(model, sources.modules, gradients=True) as seen:
        size = min(32, task.batch_size) if task.rows_are_examples else 1
        for batch in data.batches(size):
            inputs = {name: tensor.to(sources.device) for name, tensor in batch.items()}
            seen.clear()
            logs = task.choices(task.logits(model, inputs), inputs).log_softmax(-1)
            answers = _answers(task, logs, generator)
            for k, (answer, chance) in enumerate(answers):
                _backward(answer, seen, keep=k + 1 < len(answers))
                for name, (layer, x, g, _) in seen.items():
                    rows, gradients = tokens(layer, x.detach(), g)
                    if not task.rows_are_examples:  # of one example
                        rows, gradients = (t.reshape(1, -1, t.shape[-1]) for t in (rows, gradients))
                    gradient = torch.einsum("nti,nto->noi", rows, gradients).float().square()
                    weights = torch.ones(len(gradient), device=gradient.device) if chance is None else chance
                    squares = torch.einsum("n,noi->oi", weights, gradient).cpu()
                    sums[name] += squares.T if _transposed(layer) else squares
    return {name: total / len(data) for name, total in sums.items()}


def _answers(task: Task, logs: Tensor, generator: torch.Generator) -> list[tuple[Tensor, Tensor | None]]:
    """Summed log p of what is answered, with its chance for each example: every label, or one draw of all tokens."""
    if task.classifies:
        return [(logs[:, label].sum(), logs[:, label].detach().exp()) for label in range(logs.shape[-1])]
    drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
    return [(logs.gather(1, drawn).sum(), None)]


def _backward(loss: Tensor, seen: Mapping[str, list[Any]], *, keep: bool) -> None:
    outputs = [entry[3] for entry in seen.values()]
    gradients = torch.autograd.grad(loss, outputs, retain_graph=keep, allow_unused=True)
    for entry, gradient in zip(seen.values(), gradients, strict=True):
        entry[2] = torch.zeros_like(entry[3]) if gradient is None else gradient


def grams(models: MergeModels, index: int, examples: int, seed: int, *, mean: bool) -> dict[str, tuple[Tensor, bool]]:
    """Module → XᵀX of its inputs [in, in] (float64), and whether the model stores its weight as [in, out].

    X has a row for every input that is no padding; with `mean`, XᵀX is divided by their number, so that it hangs
    neither on how long texts are nor on how many there are.
    """
    sources, task = models.sources, models.tasks[index]
    model, _ = _worn_by_source(models, index)
    data = task.split("train").subset(examples, seed)
    sums: dict[str, tuple[Tensor, bool]] = {}
    counts: dict[str, int] = {}
    model.eval()
    with watched(model, sources.modules, gradients=False) as seen, torch.inference_mode():
        for batch in data.batches(task.batch_size):
            seen.clear()
            inputs = {name: tensor.to(sources.device) for name, tensor in batch.items() if name != "labels"}
            task.logits(model, inputs)
            masks = masks_of(model, inputs)
            for name, (layer, x, _, _) in seen.items():
                rows = unpadded(tokens(layer, x, None)[0], masks).double().cpu()
                before = sums[name][0] if name in sums else 0.0
                sums[name] = before + rows.T @ rows, _transposed(layer)
                counts[name] = counts.get(name, 0) + len(rows)
    return {name: (G / (max(1, counts[name]) if mean else 1), turned) for name, (G, turned) in sums.items()}


def masks_of(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Masks [texts, places] of what is no padding: of the batch, and of texts that the model brings itself."""
    masks = [buffer.bool() for name, buffer in model.named_buffers() if name.endswith("attention_mask")]
    if "attention_mask" in batch:
        mask = batch["attention_mask"].bool()
        there = mask.any(-1).flatten()  # windows of a text that a shorter one lacks are not run
        if "targets" in batch:  # an option without a target only fills the row up
            mask = mask & (batch["targets"] != NO_TARGET).any(-1, keepdim=True)
        masks.insert(0, mask.flatten(0, -2)[there])
    return masks


def unpadded(rows: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Inputs [examples, places, in], or [examples · places, 1, in], as [inputs, in] without padding."""
    flat = rows.flatten(0, 1)
    for mask in masks:
        if rows.shape[:2] in (mask.shape, (mask.numel(), 1)):
            return flat[mask.flatten()]
    return flat


@contextmanager
def watched(model: nn.Module, names: Sequence[str], *, gradients: bool) -> Iterator[dict[str, list[Any]]]:
    """While it lasts, module → [base layer, last input, None, last output], filled by every forward pass."""
    seen: dict[str, list[Any]] = {}
    handles = []

    def watch(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name in seen:
                raise TunerError(f"{name} is used several times in one pass; its inputs cannot be told apart")
            if gradients and not output.requires_grad:
                output = output.detach().requires_grad_()
            seen[name] = [_base_layer(module), args[0], None, output]
            return output

        return hook

    for name in names:
        layer = model.get_submodule(name)
        base = _base_layer(layer)
        if isinstance(base, nn.Embedding):
            raise TunerError(
                f"{name} is an embedding; only the inputs of linear layers and convolutions can be looked at"
            )
        handles.append(layer.register_forward_hook(watch(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _base_layer(layer: Any) -> nn.Module:
    base: nn.Module = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return base


def tokens(layer: nn.Module, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """Inputs [examples, places, in] and gradients of the outputs [examples, places, out] of a layer."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise TunerError("the inputs of plain convolutions only are known (one group, zeros around)")
        flat = isinstance(layer, nn.Conv1d)  # as a convolution of one row
        kernel, dilation, stride = (
            (1, *size) if flat else size for size in (layer.kernel_size, layer.dilation, layer.stride)
        )
        padding = (0, *layer.padding) if flat else layer.padding
        x = nn.functional.unfold(x[:, :, None] if flat else x, kernel, dilation, padding, stride).transpose(1, 2)
        return x, torch.empty(0) if g is None else g.flatten(2).transpose(1, 2)
    x = x.reshape(len(x), -1, x.shape[-1])
    return x, torch.empty(0) if g is None else g.reshape(len(g), -1, g.shape[-1])


def _transposed(layer: nn.Module) -> bool:
    """Whether the weight is stored as [in, out] (GPT-2's Conv1D)."""
    return type(layer).__name__ == "Conv1D"
