"""Whether a base has what adapters change: modules by these names, weights that can be added to, places for heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lora_lab.adapters.formats.keys import odd_content
from lora_lab.errors import MismatchError, nearest, shorten
from lora_lab.fusing.checkpoints.layout import Layout

CODES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
"""Dtypes of eight bits, whose weights have scales apart."""


def is_coded(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype are codes of weights that were quantised."""
    return not dtype.is_floating_point or dtype in CODES


def require_modules(layout: Layout, modules: Sequence[str], source: str) -> None:
    """MismatchError for modules that the base has not, with the closest ones, or whose weights are quantised."""
    missing = [module for module in modules if not layout.parameters_of(module)]
    if missing:
        raise MismatchError(f"{source}: the base has no module {shorten(missing)}{_closest(missing, layout.owners)}")
    for module in modules:
        names = layout.parameters_of(module)
        odd = [name for name in names if is_coded(layout.dtype(name))] or list(filter(odd_content, names))
        if odd:
            kind = str(layout.dtype(odd[0])).removeprefix("torch.")
            raise MismatchError(
                f"{odd[0]} is {kind} in the base: quantised weights, to whose codes nothing can be added; the model "
                "that it was made from is needed"
            )


def require_places(layout: Layout, wholes: Mapping[str, Tensor], source: str) -> None:
    """MismatchError for whole tensors that the model has no place for, or one of another width."""
    model = layout.model
    places = set(model.state_dict()) if model is not None else None
    for name, tensor in wholes.items():
        shape = layout.shape(name)
        if shape is None and places is not None and name not in places:
            raise MismatchError(f"{source}: {name} has no place in {type(model).__name__}")
        if shape is not None and shape[1:] != tuple(tensor.shape[1:]):
            raise MismatchError(f"{source}: {name} is {list(tensor.shape)}, and {list(shape)} in the base")


def require_rows(layout: Layout, trained: Mapping[str, Sequence[int]], source: str) -> None:
    """MismatchError for trained tokens that the base has no row for."""
    for name, tokens in trained.items():
        rows = (layout.shape(name) or (0,))[0]
        if beyond := [token for token in tokens if not 0 <= token < rows]:
            raise MismatchError(
                f"{source}: trains the tokens {shorten(beyond)}, and {name} has {rows} rows in the base"
            )


def _closest(missing: Sequence[str], there: Sequence[str]) -> str:
    """What to do about modules that the base has under other names, or what is nearest to them."""
    if way := _renaming(missing, set(there)):
        return f"; `rename` {way[0]}={way[1]} makes them the base's"
    close = nearest(missing[0], sorted(there))
    return f"; the closest one is {close}" if close else ""


def _renaming(missing: Sequence[str], there: Collection[str]) -> tuple[str, str] | None:
    """First parts (old, new) of the names that are missing with which all of them would be there."""
    parts = missing[0].split(".")
    for count in range(len(parts)):
        old, rest = ".".join(parts[:count]), ".".join(parts[count:])
        for new in sorted({name[: -len(rest)].rstrip(".") for name in there if f".{name}".endswith(f".{rest}")}):
            head = f"{new}." if new else ""
            if all(
                f".{name}".startswith(f".{old}") and head + name[len(old) :].lstrip(".") in there for name in missing
            ):
                return old, new
    return None
