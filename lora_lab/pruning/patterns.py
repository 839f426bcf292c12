"""Which modules of an adapter to keep: the patterns of structured pruning, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.keys import natural_key
from lora_lab.adapters.groups import Place, Players, locate, players
from lora_lab.errors import OptionError, shorten, unknown
from lora_lab.registry import Registry

TYPES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q_lin", "to_q", "wq", "q"),
    "k": ("k_proj", "key", "k_lin", "to_k", "wk", "k"),
    "v": ("v_proj", "value", "v_lin", "to_v", "wv", "v"),
    "o": ("o_proj", "out_proj", "out_lin", "attention.output.dense", "to_out", "wo", "o"),
    "up": ("up_proj", "fc1", "lin1", "intermediate.dense", "wi", "w3", "wi_1"),
    "down": ("down_proj", "fc2", "lin2", "output.dense", "w2"),
    "gate": ("gate_proj", "w1", "wi_0"),
}
"""Short name → what models call such a module."""


@dataclass(frozen=True)
class Choice:
    """What a pattern chooses from."""

    adapter: Adapter
    players: Players
    """For patterns that count: top-norm:K and its kind keep K of these."""
    seed: int = 0
    values: Callable[[str | None], Mapping[str, float]] | None = None
    """(estimator of Shapley values, None: the default) → every player's value, where it can be computed."""

    @property
    def places(self) -> dict[str, Place]:
        """Where each module is."""
        return locate(sorted(self.adapter.sites, key=natural_key))


@dataclass(frozen=True)
class Keep:
    """A pattern of modules to keep."""

    choose: Callable[[Choice, str], Collection[str]]
    """(choice, what stands after the colon) → modules to keep."""
    argument: str = ""
    """What stands after the colon, where something does."""
    valued: bool = False
    """Whether it chooses by values that are computed on a task."""
    estimator: str | None = None
    """What computes them (see games.estimators); None: what does by default."""
    about: str = ""
    """Which modules it keeps, in a few words."""


def keep(choice: Choice, spec: str) -> list[str]:
    """The modules that a pattern such as "even", "type:q,k" or "top-norm:3" keeps, in natural order.

    Layers are counted within their encoder; modules outside of layers are kept by the patterns of layers. Raises
    OptionError for an unknown pattern, a number beyond that of the players, a type that is not there.
    """
    name, _, argument = spec.partition(":")
    if name not in KEEPS:
        raise unknown("pattern", name, [f"{n}:{k.argument}" if k.argument else n for n, k in KEEPS.items()])
    wants = KEEPS[name].argument
    if bool(argument) != bool(wants):
        raise OptionError(f"pattern {spec!r}: {f'{name}:{wants} is needed' if wants else f'{name} takes no argument'}")
    kept = KEEPS[name].choose(choice, argument)
    if not kept:
        raise OptionError(f"pattern {spec!r} keeps no module of {choice.adapter.label}")
    return sorted(kept, key=natural_key)


def fixed(choice: Choice) -> dict[str, list[str]]:
    """The patterns that need no choice: all, both parities, the thirds, and every type of module that is there."""
    places = choice.places.values()
    layers = {place.layer for place in places if place.layer is not None}
    types = sorted({str(place.type) for place in places}, key=_type_order)
    specs = ["all"]
    if len({layer % 2 for layer in layers}) == 2:
        specs += ["even", "odd"]
    if len(layers) >= 3:
        specs += ["low", "middle", "high"]
    if len(types) > 1:
        specs += [f"type:{name}" for name in types]
    return {spec: keep(choice, spec) for spec in specs}


def _type_order(name: str) -> tuple[int, str]:
    """In the order of TYPES, unknown ones last."""
    known = list(TYPES.values())
    return next((i for i, names in enumerate(known) if name in names), len(known)), name


def _by_layer(wanted: Callable[[int, Sequence[int]], bool]) -> Callable[[Choice, str], Collection[str]]:
    """Modules whose layer is wanted, told the layer and all layers of its encoder."""

    def chosen(choice: Choice, argument: str) -> list[str]:
        places = choice.places
        layers: dict[str | None, set[int]] = {}
        for place in places.values():
            if place.layer is not None:
                layers.setdefault(place.encoder, set()).add(place.layer)
        return [
            name
            for name, place in places.items()
            if place.layer is None or wanted(place.layer, sorted(layers[place.encoder]))
        ]

    return chosen


def _third(which: int) -> Callable[[int, Sequence[int]], bool]:
    return lambda layer, layers: layer in np.array_split(np.array(layers), 3)[which]


def _type(choice: Choice, argument: str) -> list[str]:
    places = choice.places
    there = list(dict.fromkeys(str(place.type) for place in places.values()))
    kept: list[str] = []
    for part in argument.split(","):
        names = {part, *TYPES.get(part, ())}
        found = [name for name, place in places.items() if place.type in names]
        # self- and cross-attention have modules of one last name, told apart by their path
        found = found or [name for name in places if name.rpartition(".")[2] in names]
        if not found:
            raise OptionError(f"no module of type {part!r} in {choice.adapter.label}; there are: {shorten(there, 12)}")
        kept += found
    return kept


def _top_norm(choice: Choice, argument: str) -> list[str]:
    updates = choice.adapter.updates
    norms = {
        player: math.sqrt(sum(updates[name].norm() ** 2 for name, _ in units))
        for player, units in choice.players.units.items()
    }
    return _largest(choice, argument, norms)


def _top_valued(pattern: str, estimator: str | None, about: str, *, by_size: bool = False) -> Keep:
    """The largest values of a task; those of a slope by their size, whichever way it goes."""

    def chosen(choice: Choice, argument: str) -> list[str]:
        _count(choice, argument)
        if choice.values is None:
            raise OptionError(f"{pattern} needs a task to compute its values on")
        values = choice.values(estimator)
        return _largest(choice, argument, {name: abs(x) for name, x in values.items()} if by_size else values)

    return Keep(chosen, "K", valued=True, estimator=estimator, about=about)


def _random(choice: Choice, argument: str) -> list[str]:
    order = np.random.default_rng(choice.seed).permutation(len(choice.players))
    chosen = [choice.players.names[i] for i in order[: _count(choice, argument)]]
    return _modules(choice, chosen)


def _largest(choice: Choice, argument: str, values: Mapping[str, float]) -> list[str]:
    ranked = sorted(values, key=lambda player: -values[player])  # stable: equal values stay in order
    return _modules(choice, ranked[: _count(choice, argument)])


def _count(choice: Choice, argument: str) -> int:
    if not argument.isdigit() or not 1 <= int(argument) <= len(choice.players):
        raise OptionError(
            f"{argument} of {len(choice.players)} players ({choice.players.kind}) cannot be kept; "
            f"1 to {len(choice.players)} can"
        )
    return int(argument)


def _modules(choice: Choice, chosen: Collection[str]) -> list[str]:
    """The modules of these players, and those of no player."""
    switched = {name for player in chosen for name, _ in choice.players.units[player]}
    return [*switched, *choice.players.left_out]


_even = _by_layer(lambda layer, layers: layer % 2 == 0)

KEEPS = Registry(
    "pattern",
    "lora_lab.keeps",
    Keep,
    {
        "all": Keep(lambda choice, argument: list(choice.adapter.sites), about="every module"),
        "every-other": Keep(_even, about="layers 0, 2, 4 …, as even does"),
        "even": Keep(_even, about="layers 0, 2, 4 …"),
        "odd": Keep(_by_layer(lambda layer, layers: layer % 2 == 1), about="layers 1, 3, 5 …"),
        "low": Keep(_by_layer(_third(0)), about="the lowest third of the layers"),
        "middle": Keep(_by_layer(_third(1)), about="the middle third of the layers"),
        "high": Keep(_by_layer(_third(2)), about="the highest third of the layers"),
        "type": Keep(_type, "NAME,…", about="modules of these types in all layers: q, k, v, o, up, down, gate …"),
        "top-norm": Keep(_top_norm, "K", about="the K players of the largest ‖ΔW‖"),
        "top-shapley": _top_valued("top-shapley", None, "the K of the largest Shapley values"),
        "top-gates": _top_valued("top-gates", "gates", "the K of the largest Aumann–Shapley values, from gradients"),
        "top-taylor": _top_valued(
            "top-taylor", "taylor", "the K of the largest |∂worth/∂gate| (Molchanov et al. 2017)", by_size=True
        ),
        "top-drop": _top_valued("top-drop", "drop", "the K with the largest share of Σ ‖ΔW x‖² (arXiv:2402.07721)"),
        "random": Keep(_random, "K", about="K players drawn by the seed"),
    },
)
"""Patterns by name."""


def choice_of(adapter: Adapter, *, by: str | Mapping[str, str] = "layer", seed: int = 0) -> Choice:
    """A choice among an adapter's players; single ranks cannot be kept by pattern."""
    divided = players(adapter, by)
    if any(rank is not None for units in divided.units.values() for _, rank in units):
        raise OptionError("patterns keep whole modules; ranks are cut by a rank or an energy")
    return Choice(adapter, divided, seed)
