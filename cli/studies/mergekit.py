"""Merges written in mergekit's words, as the options of `merge` that give the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lab.errors import OptionError, unknown

_METHODS = {
    "task_arithmetic": "task-arithmetic",
    "linear": "average",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare-ties",
    "della": "della",
    "breadcrumbs": "breadcrumbs",
}
"""mergekit's names of methods → ours."""
_NORMALISED = {"linear": True, "ties": True, "della": True}
"""Its methods that divide by the weights unless `normalize` is false; the others do where it is true."""
_DENSE = ("ties", "dare_linear", "dare_ties", "della", "breadcrumbs")
"""Those that thin; where no density is given, nothing goes."""
_KEYS = ("merge_method", "models", "parameters", "base_model", "dtype", "out_dtype", "output")
_EPSILON = 0.15
"""mergekit's default for della: half of the window."""


def options_of(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of `merge`; OptionError, naming the key, for what has no counterpart with the same numbers.

    Source: mergekit's merge_methods/generalized_task_arithmetic.py, registry.py and sparsify.py.
    """
    only(content, _KEYS, where)
    adapters, weights, parameters = _models(content, where)
    theirs = str(content["merge_method"])
    if theirs not in _METHODS:
        raise unknown(f"merge_method in {where}", theirs, list(_METHODS))
    step: dict[str, Any] = {"adapters": adapters, "method": _method(theirs, parameters, weights, where)}
    step["weights"] = ",".join(map(str, weights))
    if "lambda" in parameters:
        step["coefficient"] = parameters.pop("lambda")
    if theirs in _DENSE:
        _thinning(theirs, parameters)
    if parameters:
        step["set"] = parameters
    dtype = content.get("out_dtype") or content.get("dtype")
    if dtype is not None:
        step["dtype"] = dtype
    return {**step, "output": content.get("output", "merged")}


def only(given: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    """OptionError for a key that is not known."""
    odd = next((key for key in given if key not in known), None)
    if odd is not None:
        raise unknown(f"key in {where}", str(odd), list(known))


def _models(content: Mapping[str, Any], where: str) -> tuple[list[str], list[int | float], dict[str, Any]]:
    """The adapters, their weights, and the parameters that are common to all."""
    models = content.get("models")
    if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("model"), str) for m in models):
        raise OptionError(f"{where}: 'models' must list the adapters, each as model: PATH")
    adapters, weights = [], []
    own: dict[str, Any] = {}
    for entry in models:
        only(entry, ("model", "parameters"), where)
        _, plus, adapter = entry["model"].rpartition("+")  # mergekit writes BASE+ADAPTER
        adapters.append(adapter if plus else entry["model"])
        parameters = _mapping(entry.get("parameters"), where)
        weight = parameters.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise OptionError(f"{where}: a weight is a number here; a file of weights by module can be given to merge")
        weights.append(weight)
        for name, value in parameters.items():
            own.setdefault(name, []).append(value)
    common = _mapping(content.get("parameters"), where)
    for name, values in own.items():
        if len(set(map(str, values))) > 1 or len(values) < len(models):
            raise OptionError(f"{where}: {name} is not the same for all models; one value for all is needed here")
        common[name] = values[0]
    return adapters, weights, common


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise OptionError(f"{where}: 'parameters' is a mapping of names to values")
    return dict(given or {})


def _method(theirs: str, parameters: dict[str, Any], weights: list[int | float], where: str) -> str:
    """Our method, with regard to `normalize`, which is taken out of the parameters."""
    normalised = parameters.pop("normalize", _NORMALISED.get(theirs, False))
    if not isinstance(normalised, bool):
        raise OptionError(f"{where}: normalize is true or false")
    if theirs in ("linear", "task_arithmetic"):
        return "average" if normalised else "task-arithmetic"
    ours, means = _METHODS[theirs], theirs in ("ties", "dare_ties", "della")
    if means != normalised:
        raise OptionError(f"{where}: {theirs} has normalize {str(means).lower()} here, and no other way")
    if means and min(weights) < 0:
        raise OptionError(f"{where}: of a weight below 0, {theirs} divides by its size here, and mergekit by itself")
    return ours


def _thinning(theirs: str, parameters: dict[str, Any]) -> None:
    """The parameters of a method that thins, with mergekit's defaults."""
    density = parameters.setdefault("density", 1.0)
    if theirs == "ties":
        parameters["scope"] = "module"
    elif theirs == "breadcrumbs" and density == 1:
        parameters["gamma"] = 0.0
    elif theirs == "della":
        epsilon = parameters.pop("epsilon", _EPSILON)
        parameters["window"] = 0.0 if density == 1 else 2 * epsilon if isinstance(epsilon, float | int) else epsilon
