"""What a training run is made of: method, tuner, and every number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from lora_lab.options import check_options, option
from lora_lab.registry import Later, Registry

if TYPE_CHECKING:
    from lora_lab.tasks.task import Task
    from lora_lab.training.schedule import Schedule


@dataclass(frozen=True)
class Method:
    """What a training method does to the adapters."""

    about: str
    law: str | None = None
    """The law of the masks (see schedule.MASK_LAWS); None for no masks."""
    dropout: bool = False
    """Dropout inside the adapters, at the recipe's rate."""
    progressive: bool = False
    """The dropout rate falls to 0 along the schedule's ramp."""
    p0: float = 0.1
    survival_scaled: bool = False
    """Every ΔW of the trained adapter is multiplied by the survival rate of its group."""


METHODS = Registry(
    "method",
    "lora_lab.methods",
    Method,
    {
        "lora": Method("plain training, every adapter always on"),
        "coto": Method("CoTo: each block on with a probability that grows to 1", law="uniform"),
        "coto-h": Method("CoTo-H: high blocks dropped more", law="high"),
        "coto-l": Method("CoTo-L: low blocks dropped more", law="low"),
        "dropout": Method("dropout inside the adapters", dropout=True),
        "progressive-dropout": Method(
            "dropout inside the adapters, its rate falling to 0", dropout=True, progressive=True
        ),
        "stochastic-depth": Method("blocks dropped at a constant rate that grows with depth", law="depth", p0=0.5),
        "stochastic-depth-scaled": Method(
            "the same, its updates then times their blocks' survival rates, as Huang et al. 2016 score it",
            law="depth",
            p0=0.5,
            survival_scaled=True,
        ),
    },
)
"""Training methods by name."""


def _optimizers() -> list[str]:
    from transformers.training_args import OptimizerNames

    return [name.value for name in OptimizerNames]


def _tuner_names() -> list[str]:
    return list(tuners())


@dataclass(frozen=True)
class Recipe:
    """All that a training run is made of; equal recipes give equal adapters (on one machine and device).

    None takes the task's own default. `seed` orders the data and draws the masks, `init_seed` the adapter's initial
    weights (the seed's value by default). `peft` names the tuner (see `tuners`; by default the `peft_type` of
    `peft_config`, else lora), `peft_config` overrides fields of its configuration. `groups` is "block", "module", or
    {name: regular expression}. `lora_plus` is by Hayou et al. 2024, arXiv:2402.12354. With `bf16` the adapter's own
    weights stay float32.
    """

    method: str = option(
        "coto",
        "NAMES. scaled: trained, each block's update is multiplied by its survival rate, as the paper scores it.",
        choices=lambda: METHODS,
    )
    seed: int = option(0, "Orders the data and draws the masks.", least=0, most=2**32 - 1)
    init_seed: int | None = option(
        None,
        "Draws the adapter's initial A; by default the seed, so that a recipe stays one number: adapters of one seed "
        "share A over all tasks, those of several seeds do not. Shared A changes which merges do well (compare-merges "
        "tells): give each task an init seed of its own for adapters as unrelated as those of strangers.",
        least=0,
        most=2**32 - 1,
    )
    peft: str | None = option(
        None,
        "Tuner: lora, rslora, dora, pissa, hira, loha, lokr, oft …; by default that of the configuration, else lora.",
        choices=_tuner_names,
        title="tuner",
    )
    peft_config: Mapping[str, Any] = option({}, "Fields of PEFT's configuration; they win over other options.", flag="")
    rank: int | None = option(None, "r, the rank of every module's BA; by default the task's.", above=0, several=True)
    alpha: float | None = option(
        None, "lora_alpha: BA is multiplied by alpha / r; by default twice the rank.", above=0, several=True
    )
    target_modules: str | Sequence[str] | None = option(
        None, "Names with commas, a regular expression, or all-linear; by default the task's."
    )
    learning_rate: float | None = option(
        None, "Peak learning rate; by default the task's.", flag="lr", above=0, several=True
    )
    lora_plus: float | None = option(
        None, "LoRA+: the learning rate of B is so many times that of A; by default the same.", above=0, several=True
    )
    steps: int | None = option(None, "Optimiser steps; by default the task's.", above=0, several=True)
    batch_size: int | None = option(
        None, "Examples per batch, of all processes together; by default the task's.", above=0, several=True
    )
    accumulate: int = option(1, "Batches per optimiser step.", above=0)
    checkpointing: bool = option(False, "Recompute activations to save memory.")
    warmup: float = option(
        0.06, "Share of the steps over which the learning rate rises.", least=0, most=1, several=True
    )
    weight_decay: float = option(0.0, "AdamW's weight decay.", least=0, several=True)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", least=0, several=True)
    bf16: bool = option(False, "Train in bfloat16 mixed precision.")
    optimizer: str = option(
        "adamw_torch_fused", "A name of transformers' TrainingArguments.optim.", choices=_optimizers
    )
    dropout: float = option(
        0.25, "Rate of dropout, or the one that progressive-dropout begins with.", least=0, most=1, several=True
    )
    ramp: str = option("linear", "Shape of p(t): NAMES.", choices=Later("lora_lab.training.schedule", "RAMPS"))
    p0: float | None = option(
        None,
        "p at the first step, by default 0.1; for stochastic-depth the last block's survival rate, by default 0.5.",
        least=0,
        most=1,
        several=True,
    )
    stage: float = option(0.75, "Share of the steps after which every adapter is on.", least=0, most=1, several=True)
    groups: str | Mapping[str, str] = option(
        "block", "What is switched together: block, module, or NAME=REGEX (repeatable).", flag="group"
    )
    save_every: int | None = option(
        None, "Keep a Trainer checkpoint every so many steps, where a killed run goes on; by default none.", above=0
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def schedule(self) -> Schedule:
        """The CoTo schedule of the method; for methods without masks only its ramp is used."""
        from lora_lab.training.schedule import Schedule

        method = METHODS[self.method]
        return Schedule(self.ramp, method.p0 if self.p0 is None else self.p0, self.stage, method.law or "uniform")

    @property
    def tuner(self) -> str:
        """The tuner's name: the one asked for, or that of the configuration, or lora."""
        return self.peft or str(self.peft_config.get("peft_type") or "lora").lower()

    def for_task(self, task: Task) -> Recipe:
        """The recipe with the task's defaults filled in."""
        if self.peft is None:
            return dataclasses.replace(self, peft=self.tuner).for_task(task)
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
    """A PEFT tuner as `Recipe.peft` names it."""

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
