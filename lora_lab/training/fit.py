"""Adapters trained on a task with transformers' Trainer, with CoTo and the methods it is compared to."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.converting import require_writable
from lora_lab.adapters.formats.peft import peft_format
from lora_lab.adapters.groups import group
from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.adapters.models.attached import base_config, layers
from lora_lab.errors import LoraLabError, LoraLabWarning, OptionError, TunerError, unknown
from lora_lab.files.trust import Origin
from lora_lab.hub import quiet_transformers
from lora_lab.results.result import Result, fingerprint, finite, provenance
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.examples import examples_of
from lora_lab.tasks.task import Task
from lora_lab.training import survival
from lora_lab.training.checkpoints import StampCheckpoints, last_checkpoint
from lora_lab.training.coto import CoToCallback, DropoutRamp
from lora_lab.training.recipe import METHODS, Recipe, tuners
from lora_lab.training.schedule import MASK_LAWS
from lora_lab.training.trainer import Batches, LeanTrainer, Log, Progress, arguments, as_it_is, training_mode


def train(
    task: Task,
    recipe: Recipe,
    *,
    device: torch.device | None = None,
    checkpoints: Path | None = None,
    report_to: str = "none",
    progress: Progress | None = None,
    written_as: str | None = None,
) -> tuple[Adapter, Result]:
    """Train one adapter; it comes with its record, and with the log of the run (p, mask, loss, rate of each step).

    `checkpoints` is a folder for Trainer checkpoints (with `recipe.save_every`); a killed run of the same recipe
    goes on from the last one there, with the masks and results of an uninterrupted run. `report_to` names what the
    Trainer logs to (tensorboard, wandb …). Started by torchrun, all processes train one adapter together: a batch of
    the recipe is shared out among them, and all draw the same masks. Global random state is left as it was. An adapter
    that the format `written_as` could not carry is refused before it is trained.
    """
    recipe = recipe.for_task(task)
    began, data = time.perf_counter(), data_of(task)
    record = {"task": task.record, "method": recipe.method, "seed": recipe.seed, "recipe": recipe_record(recipe)}
    base = {"base_model_name_or_path": task.base, "inference_mode": True}
    log, scaled = Log(progress), METHODS[recipe.method].survival_scaled
    with _isolated_randomness(), _quiet(), contextlib.ExitStack() as stack:
        model = _with_adapter(task, recipe)
        initial = _principal_part(model)
        record |= {"base_config": base_config(model)}
        as_trained = record | ({"method": survival.UNSCALED} if scaled else {})
        if scaled and (initial or _read(model).why_not_additive):
            raise TunerError(f"{recipe.method}: {recipe.tuner} has no ΔW = scale · B A that survival rates could scale")
        if written_as is not None:
            require_writable(_extract(model, record, base, initial), written_as)
        callbacks = _callbacks(recipe, as_trained, base)
        keep = checkpoints if recipe.save_every else None
        with warnings.catch_warnings():
            warnings.simplefilter("always", LoraLabWarning)
            resume = last_checkpoint(keep, record, data) if keep else None
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args = arguments(recipe, folder, device, report_to)
        cpu_s = _optimise(model, task, recipe, args, [*callbacks, log], resume)
        record |= _survival(callbacks, recipe)
        adapter = _extract(model, record, base, initial)
    if scaled:
        adapter = survival.scaled(dataclasses.replace(adapter, record=record | {"method": as_trained["method"]}))
    metrics = {"validation": _validated(task, adapter, device)}
    adapter = dataclasses.replace(adapter, record={**record, "metrics": metrics}, origin=Origin(own=True))
    summary = {**metrics, "cpu_s": round(cpu_s, 3), "steps": recipe.steps}
    return adapter, Result(
        "train",
        log.columns(callbacks, recipe),
        {"record": record, "groups": group(list(adapter.sites), recipe.groups)},
        finite(summary),
        provenance(elapsed_s=time.perf_counter() - began, seeds=[recipe.seed], device=str(args.device), data=data),
    )


def _validated(task: Task, adapter: Adapter, device: torch.device | None) -> dict[str, Any]:
    """The task's metrics on the validation split, the main one first, and how many examples it has."""
    scores = score(task, adapter, "validation", device=device, keep_logits=task.needs_logits)
    found = task.columns(scores, task.split("validation"))
    return {**{name: metric.value(found) for name, metric in task.usual.items()}, "examples": len(scores)}


def initial(task: Task, recipe: Recipe) -> Adapter:
    """The adapter that a training by this recipe begins with."""
    with _isolated_randomness(), _quiet():
        return _read(_with_adapter(task, recipe.for_task(task)))


def _optimise(
    model: nn.Module, task: Task, recipe: Recipe, args: Any, callbacks: Sequence[TrainerCallback], resume: Path | None
) -> float:
    """Run the Trainer over the model, from the checkpoint `resume` on if there is one; CPU seconds."""
    task.check_trainable(model)
    try:
        trainer = LeanTrainer(
            model=model,
            args=args,
            train_dataset=Batches(task.training_split()),
            data_collator=as_it_is,
            callbacks=[*callbacks],
            compute_loss_func=task.step_loss,
        )
    except (RuntimeError, ValueError) as error:  # a logger that is not installed or not known
        if args.report_to in ([], ["none"]):
            raise
        raise OptionError(f"`report_to` {', '.join(args.report_to)}: {_first_line(error)}") from error
    trainer.lora_plus = recipe.lora_plus
    # whether the model divides by the number of targets in a step, as it is told, or the Trainer by that of batches
    trainer.model_accepts_loss_kwargs = task.counts_targets and task.step_loss is None
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    began = time.process_time()
    try:
        with training_mode(model):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except ImportError as error:
        raise OptionError(f"optimizer {recipe.optimizer}: {_first_line(error)}") from error
    except ValueError as error:
        if recipe.checkpointing and "checkpointing" in str(error):
            raise OptionError(f"checkpointing: {_first_line(error)}") from error
        raise
    return time.process_time() - began


def data_of(task: Task) -> str:
    """A hash of all that a training on the task hangs on besides the recipe: its base and its examples."""
    return fingerprint([examples_of(task, split) for split in ("train", "validation")])


def _with_adapter(task: Task, recipe: Recipe) -> Any:
    """The task's model with a fresh adapter, initialised from `init_seed`."""
    from peft import get_peft_model

    torch.manual_seed(recipe.init_seed or 0)
    model = task.build_model()
    config = _peft_config(recipe)
    heads = task.heads(model)
    if task.trains_head:
        config.modules_to_save = [*(config.modules_to_save or []), *heads]
    if config.target_modules == "all-linear":  # PEFT's own reading would adapt all of a head but its last layer
        config.target_modules = _linear(model, heads)
    _refuse_unmatched(model, config)
    try:
        model = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError, ImportError, re.error) as error:
        raise TunerError(f"PEFT cannot put a {recipe.tuner} adapter on {task.name}: {_first_line(error)}") from error
    if recipe.lora_plus and not any("lora_B" in name for name, _ in model.named_parameters()):
        raise OptionError(f"{recipe.tuner} has no B that LoRA+ could give a rate of its own; leave `lora_plus` out")
    if not layers(model):
        raise TunerError(f"{recipe.tuner} has no layers that can be trained one by one")
    return model


def _refuse_unmatched(model: nn.Module, config: Any) -> None:
    """OptionError for a name in lists of the configuration that the base lacks: PEFT passes over it without a word."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for field, there in (("target_modules", modules), ("modules_to_save", modules), ("target_parameters", parameters)):
        wanted = getattr(config, field, None)
        for name in [] if wanted is None or isinstance(wanted, str) else sorted(wanted):
            if not any(f".{each}".endswith(f".{name}") for each in there):
                kind = "parameter" if there is parameters else "module"
                raise OptionError(f"{field} names {name!r}, and the base has no such {kind}; leave it out")


def _linear(model: nn.Module, heads: Sequence[str]) -> set[str]:
    """Names of all linear modules outside of the heads."""
    from transformers.pytorch_utils import Conv1D

    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name for name in linear if not any(f"{name}.".startswith(f"{head}.") for head in heads)}


def _peft_config(recipe: Recipe) -> Any:
    """PEFT's configuration for the recipe; OptionError where the tuner lacks what is asked for."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    tuner, method = tuners()[recipe.tuner], METHODS[recipe.method]
    cls = next(c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if str(k).rpartition(".")[2] == tuner.peft_type)
    fields = cls.__dataclass_fields__
    options: dict[str, Any] = {"target_modules": recipe.target_modules, **tuner.preset}
    if recipe.rank is not None:
        if "r" not in fields:
            raise OptionError(f"{recipe.tuner} has no rank; leave `rank` out")
        options["r"] = recipe.rank
        if "oft_block_size" in fields:
            options["oft_block_size"] = 0  # OFT takes a number of blocks or their size, not both
    if recipe.alpha is not None:
        name = next((n for n in ("lora_alpha", "alpha", f"{recipe.tuner}_alpha") if n in fields), None)
        if name:
            options[name] = recipe.alpha
        elif not tuner.ranked:
            raise OptionError(f"{recipe.tuner} has no alpha; leave `alpha` out")
    if method.dropout:
        name = next((n for n in (f"{tuner.peft_type.lower()}_dropout", "module_dropout") if n in fields), None)
        if name is None or (method.progressive and name == "module_dropout"):
            raise TunerError(f"{recipe.tuner} has no dropout inside that {recipe.method} could set")
        options[name] = recipe.dropout
    said = recipe.peft_config.get("peft_type")
    if said and str(said).upper() != tuner.peft_type:
        raise OptionError(f"the configuration is for {said}, the tuner asked for is {recipe.tuner}")
    wrong = sorted(set(recipe.peft_config) - set(fields))
    if wrong:
        raise unknown(f"field of {cls.__name__}", wrong[0], sorted(fields))
    given = {key: value for key, value in recipe.peft_config.items() if key not in _NOT_SETTINGS}
    try:
        return cls(**{**options, **given})
    except (TypeError, ValueError) as error:
        raise OptionError(f"PEFT refuses this {recipe.tuner} configuration: {_first_line(error)}") from error


# What a saved configuration says of the adapter that it came with, not of the one to be trained.
_NOT_SETTINGS = frozenset(
    {"peft_type", "peft_version", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"}
)


def _callbacks(recipe: Recipe, record: Mapping[str, Any], base: Mapping[str, Any]) -> list[TrainerCallback]:
    method = METHODS[recipe.method]
    callbacks: list[TrainerCallback] = []
    if method.law:
        callbacks.append(CoToCallback(recipe.schedule, groups=recipe.groups, seed=recipe.seed))
    if method.progressive:
        callbacks.append(DropoutRamp(recipe.dropout, recipe.schedule))
    if recipe.save_every:
        callbacks.append(StampCheckpoints(record, base))
    return callbacks


def _survival(callbacks: Sequence[TrainerCallback], recipe: Recipe) -> dict[str, Any]:
    """What the record says of stochastic depth: how often each group was on."""
    coto = next((callback for callback in callbacks if isinstance(callback, CoToCallback)), None)
    if coto is None or MASK_LAWS[coto.schedule.law].chances is None:
        return {}
    return {"survival": survival.rates(coto.schedule, list(coto.groups))}


def _principal_part(model: nn.Module) -> dict[str, LowRank] | None:
    """What PiSSA and its like took out of the base weights, as updates; None for every other initialisation."""
    adapter = _read(model)
    reason = peft_format.why_not_additive(adapter.config, adapter.sites.values()) or ""
    if "init_lora_weights" not in reason:
        return None
    with torch.no_grad():
        return {
            name: peft_format.update(site, {k: t.clone() for k, t in adapter.tensors.items()}, adapter.config)
            for name, site in adapter.sites.items()
        }


def _extract(
    model: nn.Module, record: Mapping[str, Any], base: Mapping[str, Any], initial: Mapping[str, LowRank] | None
) -> Adapter:
    """The trained adapter; for PiSSA and its like as plain LoRA on the untouched base, exact at twice the rank."""
    adapter = _read(model)
    source = f"{record['method']}-s{record['seed']}"
    adapter = dataclasses.replace(adapter, record=record, source=source, config={**adapter.config, **base})
    if initial is None:
        return adapter
    trained = {name: peft_format.update(site, adapter.tensors, adapter.config) for name, site in adapter.sites.items()}
    change = {name: combine([trained[name], initial[name]], [1.0, -1.0]) for name in trained}
    return adapter.with_updates(change, source=adapter.source)


def _read(model: Any) -> Adapter:
    from peft.utils import get_peft_model_state_dict

    config = finite(model.peft_config["default"].to_dict())
    state = {key: tensor.detach().cpu().clone() for key, tensor in get_peft_model_state_dict(model).items()}
    parsed = peft_format.parse(state, config, "the trained adapter")
    if parsed.problems:
        raise LoraLabError("; ".join(parsed.problems[:3]))
    return Adapter(parsed.tensors, config, parsed.sites)


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """A recipe in JSON types, without what the record has beside it."""
    record: dict[str, Any] = finite(dataclasses.asdict(recipe))
    return {key: value for key, value in record.items() if key not in ("method", "seed")}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def _isolated_randomness() -> Iterator[None]:
    """The Trainer seeds the global generators; afterwards they are as they were."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the Trainer's and PEFT's own log lines and warnings."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
