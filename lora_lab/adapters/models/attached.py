"""Adapters on a model: put on once, re-weighted in place, and taken off without a trace."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.formats.peft.matching import first_match
from lora_lab.adapters.formats.peft.peft_config import missing_saved, parameter_sites, tuner_of
from lora_lab.adapters.models.bases import NO_MATTER
from lora_lab.adapters.models.codes import is_quantised, require_weights, weight_shape
from lora_lab.errors import AdapterError, LoraLabWarning, MismatchError, TunerError, shorten
from lora_lab.files import in_memory
from lora_lab.results.result import fingerprint

NAME = "default"
"""The name under which PEFT keeps our one adapter."""


_RANK_AXES = (("lora_A", 0), ("lora_B", 1), ("lora_embedding_A", 0), ("lora_embedding_B", 1))


class Attached:
    """A base model that wears an adapter; `set` changes the weights in place, no module is made again.

    Made by `attach`. `model` is the base model itself: call it, score it.
    """

    def __init__(self, model: nn.Module, tuner: nn.Module) -> None:
        self.model = model
        self.layers = layers(model)
        self._tensors = {
            "base_model." + _without_name(name): tensor
            for name, tensor in (
                *tuner.named_parameters(remove_duplicate=False),
                *tuner.named_buffers(remove_duplicate=False),
            )
        }
        self._shapes = {key: tensor.shape for key, tensor in self._tensors.items()}
        self._replaced: dict[str, Tensor] = {}

    def set(self, adapter: Adapter) -> None:
        """Give the model this adapter's weights: the same tuner, and no module that is not attached.

        Attached modules that the adapter leaves out are bypassed. Ranks may differ from the attached ones.
        """
        extra = sorted(set(adapter.sites) - set(self.layers))
        if extra:
            raise MismatchError(f"{adapter.source}: adapts modules that are not attached: {shorten(extra)}")
        self._check(adapter)
        for name, layer in self.layers.items():
            site = adapter.sites.get(name)
            layer._disable_adapters = site is None
            if site is not None and site.scale is not None:
                layer.scaling[NAME] = site.scale
        for key in [key for key in self._replaced if key not in adapter.tensors]:
            self._tensors[key].data = self._replaced.pop(key)
        owned = {key for site in adapter.sites.values() for key in site.keys.values()}
        for key, tensor in adapter.tensors.items():
            if key not in owned:  # a head or another whole tensor, which the next adapter may lack
                self._replaced.setdefault(key, self._tensors[key].data)
            self._tensors[key].data = self._placed(in_memory(tensor), self._tensors[key], own=key in owned)

    def live(self, keys: Sequence[str]) -> list[Tensor]:
        """The model's own tensors by an adapter's keys, for gradients; `set` puts other data into them."""
        return [self._tensors[key] for key in keys]

    def _check(self, adapter: Adapter) -> None:
        """MismatchError for a tensor without a place in the model, or of another shape; only ranks may differ."""
        owned = {key for site in adapter.sites.values() for key in site.keys.values()}
        for key, tensor in adapter.tensors.items():
            short = key.removeprefix(PREFIX)
            if key not in self._tensors:
                raise MismatchError(f"{adapter.source}: {short} has no place in the model")
            shape = self._shapes[key]
            odd = [i for i, (a, b) in enumerate(zip(tensor.shape, shape, strict=False)) if a != b]
            if key in owned and len(odd) == 1:  # the rank's axis, which for LoRA is known
                axis = next((axis for part, axis in _RANK_AXES if part in short.split(".")), odd[0])
                odd = [] if odd[0] == axis else odd
            if odd or tensor.ndim != len(shape):
                raise MismatchError(
                    f"{adapter.source}: {short} is {list(tensor.shape)}, its place in the model {list(shape)}"
                )

    @staticmethod
    def _placed(tensor: Tensor, place: Tensor, *, own: bool) -> Tensor:
        """On the model's device; adapter tensors in float32 or wider, as PEFT has them, heads in its dtype."""
        if not tensor.is_floating_point() or not place.is_floating_point():
            return tensor.to(place.device)
        dtype = torch.promote_types(place.dtype, torch.float32) if own else place.dtype
        return tensor.to(place.device, dtype)


@contextlib.contextmanager
def attach(model: nn.Module, adapter: Adapter, *others: Adapter) -> Iterator[Attached]:
    """Put adapters' modules on `model`, weighted as `adapter`; on leaving, the model is bit for bit as it was.

    `others` only add modules, so that `Attached.set` can take any of them later. Every PEFT tuner with layers
    works. Raises MismatchError where modules or shapes do not fit the model, naming them.
    """
    with restored(model, copy_weights=_changes_base(adapter)):
        yield put_on(model, adapter, *others)


def put_on(model: nn.Module, adapter: Adapter, *others: Adapter) -> Attached:
    """Like `attach`, for good: for a model that is nobody else's."""
    attached = Attached(model, inject(model, adapter, *others))
    if not attached.layers:
        raise TunerError(f"{adapter.source}: {adapter.tuner} has no layers that can be switched off one by one")
    attached.set(adapter)
    model.eval()
    return attached


def inject(model: nn.Module, adapter: Adapter, *others: Adapter) -> nn.Module:
    """Wrap the adapted modules in PEFT's layers (in place), without loading any weights; PEFT's tuner is returned."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    _check_fit(model, adapter, *others)
    settings = peft_config(adapter, *others)
    if settings.is_prompt_learning or settings.is_adaption_prompt:
        raise TunerError(f"{adapter.source}: {adapter.tuner} has no layers that can be switched off one by one")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT comments on its own initialisation, which is overwritten
        try:
            tuner: nn.Module = PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](model, {NAME: settings}, NAME)
        except (
            ValueError,
            TypeError,
            KeyError,
            NotImplementedError,
            AttributeError,
            RuntimeError,
            IndexError,
            ImportError,
            re.error,
        ) as error:
            raise MismatchError(f"{adapter.source}: PEFT cannot put it on this model: {error}") from error
    return tuner


_LOADS = (
    "adapters",
    "shadow_model",
    "tokenizer_name_or_path",
    "prompt_tuning_init_state_dict_path",
    "megatron_config",
)
"""Fields by which PEFT loads other adapters, models and tokenizers, or imports a module that a field names."""


def peft_config(adapter: Adapter, *others: Adapter) -> Any:
    """PEFT's configuration object that adapts exactly the modules of these adapters and no others."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    by_name = {str(kind).rpartition(".")[2].upper(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    cls = by_name.get(adapter.tuner)
    if cls is None:
        raise TunerError(f"{adapter.source}: the installed PEFT knows no tuner {adapter.tuner}")
    fields = {key: value for key, value in adapter.config.items() if key in cls.__dataclass_fields__}
    for key in _LOADS:
        if fields.get(key) and fields[key] != "mirror":  # of the base itself
            raise TunerError(f"{adapter.source}: its configuration has PEFT load more than its file ({key})")
    names = sorted({name for other in (adapter, *others) for name in other.sites})
    fields |= _exact_names(fields, adapter, names)
    if adapter.tuner == "LORA":
        fields["lora_dropout"] = 0.0
        if not _changes_base(adapter):
            fields["init_lora_weights"] = True
    fields["inference_mode"] = True
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{adapter.source}: PEFT refuses its configuration: {error}") from error


_SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def _exact_names(config: Mapping[str, Any], adapter: Adapter, names: Sequence[str]) -> dict[str, Any]:
    """The fields that name modules, with these modules' names alone: the file's own patterns never reach PEFT."""
    exact: dict[str, Any] = {field: None for field in _SELECTING if config.get(field) is not None}
    if "target_modules" in config or adapter.tuner == "LORA":
        parameters = parameter_sites(config, names)
        modules = [name for name in names if name not in parameters]
        # PEFT must be given some modules, unless it is given parameters
        exact["target_modules"] = _one_of(modules) if modules or not parameters else None
    for field, value in config.items():
        if field.endswith("_pattern") and field not in _SELECTING and isinstance(value, Mapping):
            exact[field] = _by_value(first_match(value, names)) if value and adapter.tuner != "ADALORA" else value
    saved = config.get("modules_to_save")
    if saved and not isinstance(saved, str):
        held = [key.removeprefix(PREFIX) for key in adapter.others]
        missing = missing_saved({"modules_to_save": saved}, held) if held else list(saved)
        plain = [name for name in saved if name not in missing and re.fullmatch(r"[\w.-]+", name)]
        exact["modules_to_save"] = plain or None
    return exact


def _one_of(names: Sequence[str]) -> str:
    return f"^({'|'.join(map(re.escape, names))})$"


def _by_value(values: Mapping[str, Any]) -> dict[str, Any]:
    """One key a value, since PEFT tries every key on every module."""
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return {_one_of(sorted(keys)): value for value, keys in names.items()}


def base_config(model: nn.Module) -> dict[str, str] | None:
    """A short hash of the base's configuration, and the version of transformers that read it; None where it has none.

    Names, versions, labels and quantisation do not count; defaults do, and these can change from version to version.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, dict):
        return None
    kept = {k: v for k, v in config.items() if not k.startswith(("_", "transformers", "torch_dtype", "dtype"))}
    digest = fingerprint({k: v for k, v in kept.items() if k not in NO_MATTER})
    return {"hash": digest, "transformers": version("transformers")}


def layers(model: nn.Module) -> dict[str, Any]:
    """Module name in the base model → PEFT layer, found by type, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not name.endswith(".token_adapter")  # trained tokens are no site
    }


@contextlib.contextmanager
def restored(model: nn.Module, *, copy_weights: bool = False) -> Iterator[None]:
    """Leave `model` bit for bit as it was: modules, weights (codes as they act), requires_grad, modes and attributes.

    Weights changed in place are put back only with `copy_weights`, which costs their size.
    """
    modules = list(model.modules())
    children = [dict(module._modules) for module in modules]
    parameters = [dict(module._parameters) for module in modules]
    attributes = [set(vars(module)) for module in modules]
    modes = [module.training for module in modules]
    # codes stay as the forward leaves them: bitsandbytes packs them anew for its kernels, with their scales
    packed = [is_quantised(module) for module in modules]
    weights = [
        (p, p.data, p.data.clone() if copy_weights else None, p.requires_grad)
        for p in model.parameters()
        if p.is_floating_point()
    ]
    try:
        yield
    finally:
        kept = zip(modules, children, parameters, attributes, modes, packed, strict=True)
        for module, names, own, known, mode, codes in kept:
            module._modules.clear()
            module._modules.update(names)
            module._parameters.clear()
            module._parameters.update(own)
            for extra in set() if codes else set(vars(module)) - known:
                delattr(module, extra)
            module.training = mode
        for parameter, data, copy, requires_grad in weights:
            parameter.data = data
            if copy is not None:
                data.copy_(copy)
            parameter.requires_grad_(requires_grad)


def weight_deltas(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Module → dense ΔW against `model`'s own weight, for every tuner that can be merged (DoRA, PiSSA, LoHa …).

    Exact up to the rounding of the model's dtype; in the layout of the stored weight.
    """
    require_weights(model, f"the base of {adapter.source}")
    before = {}
    deltas = {}
    for name in adapter.sites:
        module = _submodule(model, name, adapter)
        before[name] = module.get_parameter("weight").detach().clone()
    with attach(model, adapter) as attached, torch.no_grad():
        for name, layer in attached.layers.items():
            try:
                layer.merge(safe_merge=True)
            except (NotImplementedError, AttributeError, ValueError) as error:
                raise TunerError(f"{adapter.source}: {adapter.tuner} has no ΔW: {error}") from error
            deltas[name] = layer.get_base_layer().weight.detach().clone() - before[name]
            layer.get_base_layer().weight.data.copy_(before[name])
    return deltas


def load_peft(model: nn.Module, path: str | os.PathLike[str]) -> Any:
    """PEFT's PeftModel with this adapter on `model`: PEFT's own loader for all that `Adapter.load` reads.

    Most useful for a lone .safetensors file, which PEFT itself cannot take.
    """
    return wrapped(model, Adapter.load(path))


def wrapped(model: nn.Module, adapter: Adapter) -> Any:
    """PEFT's PeftModel with this adapter on `model`, its weights loaded as PEFT loads them."""
    from peft import PeftModel
    from peft.mapping_func import get_peft_model
    from peft.utils import set_peft_model_state_dict

    with torch.random.fork_rng():
        made: PeftModel = get_peft_model(model, peft_config(adapter))
    result = set_peft_model_state_dict(made, {key: in_memory(tensor) for key, tensor in adapter.tensors.items()})
    if result.unexpected_keys:
        raise MismatchError(f"{adapter.source}: PEFT has no place for {shorten(result.unexpected_keys)}")
    return made.eval()


def _changes_base(adapter: Adapter) -> bool:
    reason = adapter.why_not_additive or ""
    return "init_lora_weights" in reason or tuner_of(adapter.config) == "OSF"


def _check_fit(model: nn.Module, *adapters: Adapter) -> None:
    submodules = dict(model.named_modules())
    present = base_config(model)
    for adapter in adapters:
        trained_on = adapter.record.get("base_config")
        if isinstance(trained_on, dict) and present and trained_on.get("hash") != present["hash"]:
            difference = (
                f"{adapter.source}: trained on a base whose configuration has the hash {trained_on.get('hash')}; this "
                f"one's is {present['hash']} ({type(model).__name__})"
            )
            then, now = trained_on.get("transformers"), present["transformers"]
            if then == now:
                raise MismatchError(f"{difference}: another model, or another version of it")
            text = f"{difference}: read by transformers {then} and {now}, or another model"
            warnings.warn(text, LoraLabWarning, stacklevel=3)
        if adapter.config.get("layer_replication"):
            raise TunerError(
                f"{adapter.source}: layer_replication builds another model, which cannot be attached to this one"
            )
        missing = [name for name in adapter.sites if name not in submodules and not name.endswith(".base_layer")]
        experts = [name for name in missing if re.search(r"\.experts\.\d+\.", name)]
        if experts and any(module.endswith(".experts") and module in submodules for module in _above(experts)):
            raise MismatchError(
                f"{adapter.source}: trained on experts that were modules of their own ({shorten(experts)}), which "
                "newer versions of transformers have fused into one parameter; PEFT converts such an adapter when it "
                "loads it"
            )
        if missing:
            raise MismatchError(
                f"{adapter.source}: trained on another base model? this one has no module {shorten(missing)}"
            )
        if adapter.why_not_additive is None:
            for name, update in adapter.updates.items():
                shape = weight_shape(submodules[name])
                # PEFT sets fan_in_fan_out by the layer that it meets, whatever the file says
                if shape is not None and shape not in (update.shape, update.shape[::-1]):
                    raise MismatchError(f"{adapter.source}: {name} is {shape} in this model, its ΔW is {update.shape}")


def _above(names: Sequence[str]) -> set[str]:
    """The modules of experts, also under the names that newer models have for their blocks."""
    above = {re.sub(r"(\.experts)\.\d+\..*", r"\1", name) for name in names}
    return above | {name.replace(".block_sparse_moe.", ".mlp.") for name in above}


def _submodule(model: nn.Module, name: str, adapter: Adapter) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise MismatchError(f"{adapter.source}: the model has no module {name}") from error


def _without_name(name: str) -> str:
    """PEFT's key of a live parameter: without the adapter's name, and modules_to_save as in the file."""
    parts = name.split(".")
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]
    elif NAME in parts:
        parts.remove(NAME)
    joined = ".".join(parts)
    if "lora_magnitude_vector" in parts:
        joined = joined.removesuffix(".weight")
    return joined
