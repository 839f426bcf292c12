"""What a training run is made of: method, tuner, and every number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from transformers.training_args import OptimizerNames

from lora_lab.errors import OptionError, unknown
from lora_lab.tasks.task import Task
from lora_lab.training.schedule import Schedule


@dataclass(frozen=True)
class Method:
    """What a training method does to the adapters."""

    about: str
    law: str | None = None
    """The law of the masks (see schedule.LAWS); None for no masks."""
    dropout: bool = False
    """Dropout inside the adapters, at the recipe's rate."""
    progressive: bool = False
    """The dropout rate falls to 0 along the schedule's ramp."""
    p0: float = 0.1
    survival_scaled: bool = False
    """Every ΔW of the trained adapter is multiplied by the survival rate of its group."""


METHODS: dict[str, Method] = {
    "lora": Method("plain training, every adapter always on"),
    "coto": Method("CoTo: each block on with a probability that grows to 1", law="uniform"),
    "coto-h": Method("CoTo-H: high blocks dropped more", law="high"),
    "coto-l": Method("CoTo-L: low blocks dropped more", law="low"),
    "dropout": Method("dropout inside the adapters", dropout=True),
    "progressive-dropout": Method("dropout inside the adapters, its rate falling to 0", dropout=True, progressive=True),
    "stochastic-depth": Method("blocks dropped at a constant rate that grows with depth", law="depth", p0=0.5),
    "stochastic-depth-scaled": Method(
        "the same, its updates then times their blocks' survival rates, as Huang et al. 2016 score it",
        law="depth",
        p0=0.5,
        survival_scaled=True,
    ),
}
"""Training methods by name."""


@dataclass(frozen=True)
class Recipe:
    """All that a training run is made of; equal recipes give equal adapters (on one machine and device).

    None takes the task's own default. `seed` orders the data and draws the masks, `init_seed` the adapter's
    initial weights (the seed's value by default). `peft` names the tuner (see TUNERS), `peft_config` overrides
    fields of its configuration. `groups` is "block", "module", or {name: regular expression}.
    """

    method: str = "coto"
    seed: int = 0
    init_seed: int | None = None
    peft: str = "lora"
    peft_config: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    alpha: float | None = None
    target_modules: str | Sequence[str] | None = None
    learning_rate: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    checkpointing: bool = False
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch_fused"
    """One of transformers' names, as TrainingArguments.optim."""
    lora_plus: float | None = None
    """LoRA+: the learning rate of B is so many times that of A (Hayou et al. 2024, arXiv:2402.12354)."""
    bf16: bool = False
    """Train in bfloat16 mixed precision; the adapter's own weights stay float32."""
    dropout: float = 0.25
    ramp: str = "linear"
    p0: float | None = None
    stage: float = 0.75
    groups: str | Mapping[str, str] = "block"
    save_every: int | None = None
    """Keep a Trainer checkpoint every so many steps."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if self.peft not in tuners():
            raise unknown("tuner", self.peft, tuners())
        for name in ("rank", "steps", "batch_size", "accumulate", "save_every", "learning_rate", "alpha", "lora_plus"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name.replace('_', ' ')} is {value}; it must be above 0")
        for name in ("seed", "init_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**32:
                raise OptionError(f"{name.replace('_', ' ')} is {value}; it must be from 0 to {2**32 - 1}")
        if self.optimizer not in [option.value for option in OptimizerNames]:
            raise unknown("optimizer", self.optimizer, [option.value for option in OptimizerNames])
        for name in ("warmup", "dropout", "stage"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} is {getattr(self, name)}; a share between 0 and 1 is needed")
        _ = self.schedule

    @property
    def schedule(self) -> Schedule:
        """The CoTo schedule of the method; for methods without masks only its ramp is used."""
        method = METHODS[self.method]
        return Schedule(self.ramp, method.p0 if self.p0 is None else self.p0, self.stage, method.law or "uniform")

    def for_task(self, task: Task) -> Recipe:
        """The recipe with the task's defaults filled in."""
        ranked = tuners()[self.peft].ranked
        rank = self.rank or (task.rank if ranked else None)
        return dataclasses.replace(
            self,
            init_seed=self.seed if self.init_seed is None else self.init_seed,
            rank=rank,
            alpha=2 * rank if self.alpha is None and ranked and rank else self.alpha,
            target_modules=task.targets(self.target_modules),
            learning_rate=self.learning_rate or task.learning_rate,
            steps=self.steps or task.steps,
            batch_size=self.batch_size or task.train_batch_size,
            p0=self.schedule.p0,
        )


@dataclass(frozen=True)
class Tuner:
    """A PEFT tuner as `--peft` names it."""

    peft_type: str
    preset: Mapping[str, Any] = field(default_factory=dict)
    ranked: bool = False
    """Whether r is the rank of the update, so that one default fits."""


@cache
def tuners() -> dict[str, Tuner]:
    """Every tuner that can be trained: LoRA and its variants, then all of PEFT's that adapt modules by name."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = {
        "lora": Tuner("LORA", {}, True),
        "rslora": Tuner("LORA", {"use_rslora": True}, True),
        "dora": Tuner("LORA", {"use_dora": True}, True),
        "pissa": Tuner("LORA", {"init_lora_weights": "pissa"}, True),
        "olora": Tuner("LORA", {"init_lora_weights": "olora"}, True),
    }
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(kind).rpartition(".")[2]
        if name not in _UNTRAINABLE and "target_modules" in config.__dataclass_fields__:
            found.setdefault(name.lower(), Tuner(name, {}, name in ("LOHA", "LOKR", "HIRA", "DELORA")))
    return found


# AdaLoRA needs a budget allocator in the loop; SHiRA and UniLoRA keep parameters outside of what PEFT saves by
# module; the others are no adapters of single modules.
_UNTRAINABLE = frozenset(
    {"ADALORA", "SHIRA", "UNILORA", "POLY", "XLORA", "TRAINABLE_TOKENS", "SHADOW", "OSF", "ADAPTION_PROMPT"}
)
