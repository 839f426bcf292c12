"""A step of a curve's training against a step of the same model without a curve: `make bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis.lines.curves.control_points import ControlTraining, Training
from lora_lab.tasks.task import Task
from lora_lab.training.trainer import training_mode

STEPS = 40


def steps_of_a_curve(ends: Sequence[Adapter], task: Task, space: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Steps of a control point; and as many of what its model is given, taken as parameters of their own."""
    training = ControlTraining(ends, Training("bezier", space, STEPS, 3e-3, 16, None, 1, 0), task, torch.device("cpu"))
    model = training._models.attached.model
    live = training._points.live(training._models.attached, training._start)
    of_curve = torch.optim.Adam(training._points.leaves, lr=3e-3, fused=True)
    with training_mode(model):
        training._step(model, live, of_curve, 0)  # which gives all of them their shapes
    bare = torch.optim.Adam(live, lr=0.0, fused=True)

    def curve() -> None:
        with training_mode(model):
            for step in range(STEPS):
                training._step(model, live, of_curve, step)

    def alone() -> None:
        with training_mode(model):
            for step in range(STEPS):
                bare.zero_grad()
                model(**training._batch(step)).loss.backward()
                torch.nn.utils.clip_grad_norm_(live, 1.0)
                bare.step()

    return curve, alone
