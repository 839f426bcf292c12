"""transformers' Trainer as the trainings here use it: its settings, its batches, its log, and the model's mode."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_lab.errors import DivergedError, OptionError
from lora_lab.tasks.splits import trimmed
from lora_lab.tasks.task import Split, resolve_device
from lora_lab.training.coto import CoToCallback
from lora_lab.training.recipe import Recipe

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def processes() -> int:
    """How many processes train together, as torchrun and accelerate say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def arguments(recipe: Recipe, folder: Path, device: torch.device | None, report_to: str) -> Any:
    """The recipe as TrainingArguments; OptionError for a batch that the processes cannot share."""
    assert recipe.steps is not None and recipe.batch_size is not None  # noqa: PT018
    if recipe.batch_size % processes():
        raise OptionError(f"a batch of {recipe.batch_size} cannot be shared out evenly among {processes()} processes")
    # The rate is constant until the masks end and then falls: the phase that trains all adapters needs a rate.
    decay = max(1, round((1 - recipe.stage) * recipe.steps))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // processes(),
        gradient_accumulation_steps=recipe.accumulate,
        # the reentrant way needs an input that has a gradient, which a frozen base's embeddings give none
        **{_CHECKPOINTING: recipe.checkpointing, f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": decay, "decay_type": "linear"},
        warmup_steps=min(round(recipe.warmup * recipe.steps), recipe.steps - decay),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or recipe.steps,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=(device or resolve_device()).type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=report_to,
        run_name=f"{recipe.method}-s{recipe.seed}",
        disable_tqdm=True,
        bf16=recipe.bf16,
        ddp_find_unused_parameters=True if processes() > 1 else None,  # adapters that are off have no gradient
    )


class LeanTrainer(Trainer):  # type: ignore[misc]
    """The Trainer without two walks over all modules at every step, which cost a small model as much as its maths."""

    lora_plus: float | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """With LoRA+, parameter groups for A and B with learning rates of their own."""
        known: Any = getattr(self, "optimizer", None)
        if self.lora_plus is None or known is not None:
            return super().create_optimizer(*args, **kwargs)
        from peft.optimizers import create_loraplus_optimizer

        cls, options = self.get_optimizer_cls_and_kwargs(self.args)
        model = self.accelerator.unwrap_model(self.model)
        self.optimizer = create_loraplus_optimizer(
            model, cls, loraplus_lr_ratio=self.lora_plus, loraplus_weight_decay=self.args.weight_decay, **options
        )
        return self.optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)


@contextlib.contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """The whole model in training mode, the frozen base too, as under a plain Trainer.

    So the base's own dropout is active, and its blocks recompute their activations where they are told to. Only
    running statistics of the frozen base stand still: no adapter carries them, and with others than the base has it
    would be scored on another model than it was trained on.

    Small models are spared two walks over all modules a step: train() in training mode, zero_grad() of the frozen.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    still = [module for name, module in model.named_modules() if _keeps_statistics(module) and not _is_saved(name)]
    switch = model.train

    def train(mode: bool = True) -> nn.Module:
        if model.training != mode:
            switch(mode)
            for module in still:
                module.eval()
        return model

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    model.eval()  # PEFT leaves its own modules in training mode, and the base in the mode it was in
    own = {"train": train, "zero_grad": zero_grad}
    vars(model).update(own)
    try:
        model.train()
        yield
    finally:
        for name in own:
            del vars(model)[name]


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None


def _is_saved(name: str) -> bool:
    """Whether a module is trained and written as a whole, its statistics with it (PEFT's modules_to_save)."""
    return "modules_to_save" in name.split(".")


# transformers has renamed the option
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


class Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Examples that are tensors already: a batch is one indexing, not a list to collate."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self._split.inputs.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return trimmed({name: tensor[indices] for name, tensor in self._split.inputs.items()})


def as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What Batches gives is a batch already."""
    return batch


class Log(TrainerCallback):  # type: ignore[misc]
    """Loss and learning rate of every step, and word of progress."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._logged: dict[int, tuple[float | None, float | None]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over what a resumed run had logged."""
        self._logged = {
            entry["step"]: (entry["loss"], entry["learning_rate"]) for entry in state.log_history if "loss" in entry
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the step's loss; stop where it is no number."""
        if logs and "loss" in logs:
            self._logged[state.global_step] = (logs["loss"], logs.get("learning_rate"))
            if not np.isfinite(logs["loss"]):
                raise DivergedError(
                    f"training diverged: loss {logs['loss']} at step {state.global_step}; lower the learning rate"
                )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report progress."""
        if self._progress:
            self._progress(state.global_step, state.max_steps)

    def columns(self, callbacks: Sequence[TrainerCallback], recipe: Recipe) -> dict[str, list[Any]]:
        """The table of the run: one row an optimiser step."""
        coto = next((c for c in callbacks if isinstance(c, CoToCallback)), None)
        steps = range(recipe.steps or 0)
        return {
            "step": list(steps),
            "p": [coto.log[t][1] if coto else 1.0 for t in steps],
            "mask": ["".join("01"[int(on)] for on in coto.log[t][2]) if coto else None for t in steps],
            "loss": [self._logged.get(t + 1, (None, None))[0] for t in steps],
            "learning_rate": [self._logged.get(t + 1, (None, None))[1] for t in steps],
        }
