"""CoTo training: adapters switched on at random, ever more of them as training goes on (arXiv:2506.05713).

In a Trainer, one line: ``Trainer(…, callbacks=[CoToCallback()])``. In a loop of your own:

    with Switches(model) as switches:
        for step in range(steps):
            switches.draw(Schedule(), step, steps, seed=0)
            …  # forward, backward, optimizer.step(), optimizer.zero_grad()
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback

from lora_lab.adapters.groups import group
from lora_lab.adapters.models.attached import layers
from lora_lab.errors import LoraLabWarning, OptionError, TunerError, shorten
from lora_lab.training.recipe import METHODS
from lora_lab.training.schedule import Mask, Schedule
from lora_lab.training.signing import sign_saves


class Switches:
    """A switch for every group of PEFT layers of a model, whatever the tuner.

    A layer that is off returns its base layer's output while the model trains: its branch is not computed and
    its parameters get no gradient (None, so that AdamW leaves them alone). In evaluation mode every layer is on.
    Leaving the context switches everything on.

    `groups`: "block" (one switch a transformer block), "module" (one a layer), or {name: regular expression},
    searched in the module's name, of which exactly one must match each layer.

    Under DistributedDataParallel, whose processes must all draw the same masks, every parameter has to get a gradient:
    those of a layer that is off get zeros, which are taken away again before the optimiser steps. So
    find_unused_parameters is not needed, with gradient checkpointing (re-entrant or not) or without.
    """

    def __init__(self, model: nn.Module, groups: str | Mapping[str, str] = "block") -> None:
        found = layers(model)
        if not found:
            raise TunerError("the model has no PEFT layers to switch; add an adapter to it first")
        self.groups = group(list(found), groups)
        self._bypasses = [[_Bypass(found[name]) for name in names] for names in self.groups.values()]
        self._mask = [True] * len(self.groups)
        self._hook: Any = None

    def __enter__(self) -> Switches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.all_on()

    def set(self, mask: Sequence[bool] | Mask) -> None:
        """Switch the groups, in the order of `groups`, until the next call."""
        if len(mask) != len(self._mask):
            raise OptionError(f"a mask of {len(mask)} for {len(self._mask)} groups")
        for i, on in enumerate(mask):
            if bool(on) != self._mask[i]:
                self._mask[i] = bool(on)
                for bypass in self._bypasses[i]:
                    bypass.switch(on=bool(on))
        some_off = not all(self._mask)
        if some_off and self._hook is None and _distributed():
            self._hook = register_optimizer_step_pre_hook(self._forget)
        elif not some_off and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _forget(self, *_: Any) -> None:
        """Before an optimiser's step: no gradient for the layers that are off, as there is none in one process."""
        for i, on in enumerate(self._mask):
            for parameter in (p for bypass in self._bypasses[i] if not on for p in bypass.parameters):
                parameter.grad = None

    def draw(self, schedule: Schedule, step: int, steps: int, *, seed: int) -> Mask:
        """Set and return the schedule's mask of this optimiser step; draw once a step, not once a batch."""
        mask = schedule.mask(step, steps, len(self._mask), seed)
        self.set(mask)
        return mask

    def all_on(self) -> None:
        """Switch every group on, and leave nothing on the layers."""
        self.set([True] * len(self._mask))


class _Bypass:
    """Stands in for the forward of a layer that is off; layers that are on cost nothing.

    PEFT's own flag is up only while the layer runs and only in training mode, so that neither an evaluation nor an
    exception finds it set, and a checkpoint's recomputation does.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer
        self._forward: Any = None
        self._own: Any = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the adapter that are trained."""
        named = self._layer.named_parameters()
        return [p for name, p in named if p.requires_grad and not name.startswith("base_layer.")]

    def switch(self, *, on: bool) -> None:
        """Take the place of the layer's forward, or give it back."""
        if not on:
            self._own, self._forward = vars(self._layer).get("forward"), self._layer.forward
            vars(self._layer)["forward"] = self
        elif self._own is None:
            vars(self._layer).pop("forward", None)
        else:
            vars(self._layer)["forward"] = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._layer.training:
            return self._forward(*args, **kwargs)
        self._layer._disable_adapters = True
        try:
            output = self._forward(*args, **kwargs)
        finally:
            self._layer._disable_adapters = False
        if _distributed():  # a gradient of zeros for each: 0 · its first entry
            for parameter in self.parameters:
                output = _plus(output, parameter[(0,) * parameter.ndim] * 0)
        return output


def _distributed() -> bool:
    """Whether gradients are shared with other processes."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def _plus(output: Any, term: Tensor) -> Any:
    """The output, or of several tensors the first, with a number added."""
    if isinstance(output, tuple):
        return _plus(output[0], term), *output[1:]
    return output + term.to(output.dtype)


_FIRST_STEPS = 10
"""After so many it is looked at whether anything moves."""


def _fingerprint(model: nn.Module, names: Sequence[str]) -> float:
    """A number that changes with the weights B of the layers; of tuners without a lora_B, with all of the adapter's."""
    found = layers(model)
    named = [(name, p) for each in names for name, p in found[each].named_parameters() if "base_layer" not in name]
    chosen = [p for name, p in named if "lora_B" in name] or [p for _, p in named]
    return float(sum((p.detach().double() * _weights(p)).sum() for p in chosen))


def _weights(parameter: Tensor) -> Tensor:
    """Different for each entry, so that changes do not cancel."""
    count = torch.arange(1, parameter.numel() + 1, dtype=torch.float64, device=parameter.device)
    return count.sqrt().view(parameter.shape)


class CoToCallback(TrainerCallback):  # type: ignore[misc]
    """CoTo for any transformers Trainer: one mask an optimiser step, everything on outside of training steps.

    Step and length come from the Trainer's own state, and the mask is a function of (seed, step): so gradient
    accumulation, gradient checkpointing and resuming give what one uninterrupted run gives, and all ranks agree.
    `log` holds (step, p, mask) of every step so far. What the Trainer, or `model.save_pretrained`, saves from then on
    has method, seed, schedule and masks in its record. A LoraLabWarning tells of groups that do not move.
    """

    def __init__(
        self, schedule: Schedule | None = None, *, groups: str | Mapping[str, str] = "block", seed: int = 0
    ) -> None:
        self.schedule = schedule or Schedule()
        self.seed = seed
        self.log: list[tuple[int, float, Mask]] = []
        self._grouping = groups
        self._switches: Switches | None = None
        self._still: dict[str, float] = {}
        self._began = self._steps = self._training_seed = 0

    @property
    def record(self) -> dict[str, Any]:
        """What the files of the adapter say of its training: masks as texts of 0 and 1, a letter a group."""
        method = next((name for name, each in METHODS.items() if each.law == self.schedule.law), self.schedule.law)
        masks = ["".join("01"[int(on)] for on in mask) for _, _, mask in self.log]
        return {
            "method": method,
            "seed": self._training_seed,
            "coto": {
                "schedule": vars(self.schedule),
                "groups": list(self.groups),
                "seed": self.seed,
                "steps": self._steps,
                "masks": masks,
            },
        }

    @property
    def groups(self) -> dict[str, list[str]]:
        """Group name → modules, known once training has begun."""
        return self._switches.groups if self._switches else {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Find the layers; what a resumed run has done before is put back into the log."""
        assert model is not None
        if self._switches:
            self._switches.all_on()
        self._switches = Switches(model, self._grouping)
        self._began, self._steps, self._training_seed = state.global_step, state.max_steps, args.seed
        self.log = [self._entry(step, state.max_steps) for step in range(state.global_step)]
        self._still = {name: _fingerprint(model, names) for name, names in self.groups.items()}
        sign_saves(model, self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the mask of this optimiser step."""
        if self._switches:
            entry = self._entry(state.global_step, state.max_steps)
            self._switches.set(entry[2])
            self.log.append(entry)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Everything on until the next step; once, a look at what has moved."""
        if self._switches:
            self._switches.all_on()
        if len(self.log) == self._began + _FIRST_STEPS and model is not None:
            self._tell_unmoved(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        if self._switches:
            self._switches.all_on()

    def _tell_unmoved(self, model: nn.Module) -> None:
        """A warning where the first steps have left groups as they were that were on in one of them.

        The very first does not count: its learning rate may be 0.
        """
        masks = [mask for _, _, mask in self.log[self._began + 1 :]]
        on = [name for k, name in enumerate(self.groups) if any(mask[k] for mask in masks)]
        unmoved = [name for name in on if _fingerprint(model, self.groups[name]) == self._still[name]]
        if unmoved:
            warnings.warn(
                f"after {_FIRST_STEPS} steps the adapters of {shorten(unmoved)} are as they were at first: are they "
                "trainable, and among the optimiser's parameters?",
                LoraLabWarning,
                stacklevel=2,
            )

    def _entry(self, step: int, steps: int) -> tuple[int, float, Mask]:
        mask = self.schedule.mask(step, steps, len(self.groups), self.seed)
        return step, self.schedule.probability(step, steps), mask


class DropoutRamp(TrainerCallback):  # type: ignore[misc]
    """Progressive dropout: the rate of every dropout inside the adapters falls from `rate` to 0 along the ramp."""

    def __init__(self, rate: float, schedule: Schedule | None = None) -> None:
        self.rate = rate
        self.schedule = schedule or Schedule()
        self._dropouts: list[nn.Dropout] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Find the dropouts of the PEFT layers, outside of the base layers."""
        assert model is not None
        self._dropouts = [
            module
            for layer in layers(model).values()
            for name, module in layer.named_modules()
            if isinstance(module, nn.Dropout) and not name.startswith("base_layer")
        ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set this step's rate."""
        rate = self.rate * (1 - self.schedule.progress(state.global_step, state.max_steps))
        for dropout in self._dropouts:
            dropout.p = rate
