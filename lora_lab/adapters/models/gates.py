"""Gates on an attached adapter: numbers by which the updates of its parts are multiplied, with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.groups import Unit
from lora_lab.adapters.models.attached import NAME, Attached
from lora_lab.errors import TunerError


class Gates:
    """Gates of some players, [examples, players], in the forward passes of one model; see `gated`."""

    def __init__(self, players: int) -> None:
        self.players = players
        self._values = torch.ones(1, players + 1)
        self.apart = True
        """Whether every example's gates have met that example alone so far, so that a gradient is one example's."""

    def set(self, values: Tensor) -> None:
        """For the next pass: [examples, players]."""
        self._values = torch.cat([values, torch.ones_like(values[:, :1])], 1)

    def multiply(self, output: Tensor, players: Sequence[int], axis: int) -> Tensor:
        """`output` times the gates of these players, one of them or one a place of the axis; number `players` is a 1.

        Rows that are not the examples (experts, windows, options) get the mean of all examples' gates, so that the
        sum of the gradients stays right where all are equal, though not what each example has of it.
        """
        one = len(players) == 1  # a slice, whose gradient costs less than that of a selection
        values = self._values[:, players[0] : players[0] + 1] if one else self._values[:, list(players)]
        if len(output) != len(values):
            self.apart = self.apart and len(values) == 1
            values = values.mean(0, keepdim=True)
        shape = [len(values), *[1] * (output.ndim - 1)]
        shape[axis] = len(players)
        return output * values.reshape(shape).to(output)


@contextlib.contextmanager
def gated(attached: Attached, players: Sequence[Sequence[Unit]]) -> Iterator[Gates]:
    """Gates on the units of every player while the context lasts; other units stay as they are.

    A gate of 0 is what switching off is, one of 1 changes nothing, and between them the module gives
    base(x) + g · (adapted(x) − base(x)). Plain LoRA is multiplied where its branch ends (a single rank where it has
    gone through A), so that no difference is taken; for all others the base runs a second time. TunerError names a
    module that has no place for a gate.
    """
    gates = Gates(len(players))
    places: dict[str, dict[int | None, int]] = {}
    for player, units in enumerate(players):
        for name, rank in units:
            places.setdefault(name, {})[rank] = player
    with contextlib.ExitStack() as stack:
        for name, place in places.items():
            handle = _hook(gates, name, attached.layers[name], place)
            stack.callback(handle.remove)
        yield gates


@contextlib.contextmanager
def measured(attached: Attached, players: Sequence[Sequence[Unit]]) -> Iterator[Tensor]:
    """Σ_x ‖ΔW x‖² of every player, [players], counted over all passes while the context lasts.

    Of plain LoRA it is what its branch adds to its layer; of others, what the layer gives beyond its base.
    """
    total = torch.zeros(len(players), dtype=torch.float64)
    with contextlib.ExitStack() as stack:
        for player, units in enumerate(players):
            for name, rank in units:
                handle = _meter(attached.layers[name], name, rank, total, player)
                stack.callback(handle.remove)
        yield total


def _meter(layer: Any, name: str, rank: int | None, total: Tensor, player: int) -> Any:
    if not _is_plain(layer):
        if rank is not None:
            raise TunerError(f"{name}: its single ranks cannot be measured (those of plain LoRA can)")

        def beyond(layer: Any, args: Any, kwargs: Any, adapted: Any) -> None:
            total[player] += float((adapted - _base_of(layer, args, kwargs)).double().square().sum())

        return layer.register_forward_hook(beyond, with_kwargs=True)
    A, B, scale = layer.lora_A[NAME], layer.lora_B[NAME], layer.scaling[NAME]
    if rank is None:

        def whole(_: Any, __: Any, out: Tensor) -> None:
            total[player] += scale**2 * float(out.double().square().sum())

        return B.register_forward_hook(whole)
    axis = 1 if isinstance(A, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1

    def one(_: Any, __: Any, out: Tensor) -> None:  # ‖s b_k (a_k·x)‖² = s² ‖b_k‖² (a_k·x)²
        column = float(B.weight[:, rank].double().square().sum())
        total[player] += scale**2 * column * float(out.select(axis, rank).double().square().sum())

    return A.register_forward_hook(one)


def _hook(gates: Gates, name: str, layer: Any, place: Mapping[int | None, int]) -> Any:
    if NAME not in getattr(layer, "scaling", {}):
        raise TunerError(f"{name}: its tuner has no scale, so a gate means nothing there")
    plain = _is_plain(layer)
    if None in place:
        player = place[None]
        if plain:
            return layer.lora_B[NAME].register_forward_hook(lambda _, __, out: gates.multiply(out, [player], -1))
        return layer.register_forward_hook(_between(gates, name, player), with_kwargs=True)
    if not plain or layer.lora_B[NAME].bias is not None:
        raise TunerError(f"{name}: its single ranks have no gates (plain LoRA without a bias has); its module has one")
    A = layer.lora_A[NAME]
    ranks = [place.get(rank, gates.players) for rank in range(len(A.weight))]
    axis = 1 if isinstance(A, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1
    return A.register_forward_hook(lambda _, __, out: gates.multiply(out, ranks, axis))


def _is_plain(layer: Any) -> bool:
    """Whether its update is scale · B(A(x)), each of the two a module that is called: no DoRA, no embedding."""
    from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper

    if not isinstance(layer, LoraLayer) or isinstance(layer, MultiheadAttention | ParamWrapper):
        return False
    return NAME in layer.lora_A and NAME not in layer.lora_variant and isinstance(layer.lora_A, nn.ModuleDict)


def _between(gates: Gates, name: str, player: int) -> Callable[..., Tensor]:
    """A hook that gives base(x) + g · (adapted(x) − base(x))."""

    def hook(layer: Any, args: Any, kwargs: Any, adapted: Any) -> Tensor:
        base = _base_of(layer, args, kwargs)
        if not isinstance(adapted, Tensor):
            raise TunerError(f"{name}: gives a {type(adapted).__name__}, where a gate needs one tensor")
        between: Tensor = base + gates.multiply(adapted - base, [player], -1)
        return between

    return hook


def _base_of(layer: Any, args: Any, kwargs: Any) -> Any:
    """What a layer gives without its adapter."""
    layer._disable_adapters = True
    try:
        return layer.forward(*args, **kwargs)
    finally:
        layer._disable_adapters = False
