"""Players: named groups of an adapter's modules that are switched together."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.keys import natural_key
from lora_lab.errors import OptionError, TunerError, shorten, unknown
from lora_lab.registry import Registry

_NESTED_LISTS = ("blocks", "attentions", "resnets", "transformer_blocks")

Unit = tuple[str, int | None]
"""A module, or one rank-1 component of it."""


@dataclass(frozen=True)
class Place:
    """Where a player's modules are; a part is None where they are not in one such place."""

    encoder: str | None = None
    type: str | None = None
    layer: int | None = None


@dataclass(frozen=True)
class Players:
    """Disjoint groups of units. Modules that belong to no player are on in every coalition."""

    kind: str
    units: Mapping[str, tuple[Unit, ...]]
    """Player → what it switches, in natural order of the paths."""
    places: Mapping[str, Place] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Modules of the adapter that no player switches."""

    def __len__(self) -> int:
        return len(self.units)

    @property
    def names(self) -> list[str]:
        """The players in order."""
        return list(self.units)


def players(adapter: Adapter, by: str | Mapping[str, str] = "layer") -> Players:
    """The players of an adapter, by a name in PLAYERS or by {name: regular expression}.

    A layer is a transformer block; a type is a module's name within its block (query, fc1 …); `type-layer` joins
    the encoders of a model that has several, `encoder-type-layer` keeps them apart. A regular expression is searched
    in module names; modules that none matches stay on. Raises OptionError for an unknown set, an expression that
    matches nothing, or players that overlap; TunerError where there are no rank-1 components.
    """
    names = sorted(adapter.sites, key=natural_key)
    if not names:
        raise OptionError(f"{adapter.source or 'adapter'}: adapts no module, so there is no player")
    if not isinstance(by, str):
        return _by_pattern(names, by)
    if by not in PLAYERS:
        raise unknown("set of players", by, [*PLAYERS, "NAME=REGEX"])
    return PLAYERS[by](adapter, names)


def by_label(
    kind: str, label: Callable[[str, Place, str], str], about: str = ""
) -> Callable[[Adapter, Sequence[str]], Players]:
    """Players of whole modules by a label of each: function (module, its place, its block) → player.

    `about` says what a player is, and becomes the docstring of what comes out.
    """

    def divide(adapter: Adapter, names: Sequence[str]) -> Players:
        places, block_of = locate(names), blocks(names)
        units: dict[str, tuple[Unit, ...]] = {}
        for name in names:
            player = label(name, places[name], block_of[name])
            units[player] = (*units.get(player, ()), (name, None))
        common = {player: _common([places[name] for name, _ in switched]) for player, switched in units.items()}
        return Players(kind, units, common)

    divide.__doc__ = about
    return divide


def _type_layer(name: str, place: Place, block: str) -> str:
    return f"{place.type}.{place.layer}" if place.layer is not None else str(place.type)


def locate(names: Sequence[str]) -> dict[str, Place]:
    """Encoder, type and layer of every module, from the paths alone.

    A model with one list of blocks has one encoder, ''. The layer counts within the encoder. A type is the last
    part of the path in the block, or all of that path where blocks hold several modules of one last part (BERT's
    three `dense`). Modules outside of blocks have no layer, and their path is their type.
    """
    blocks_of = blocks(names)
    inside = {name: name.removeprefix(blocks_of[name]).removeprefix(".") for name in names}
    lists = list(dict.fromkeys(blocks_of[name].rpartition(".")[0] for name in names if inside[name]))
    short = _distinct(lists)
    by_last: dict[str, set[str]] = {}
    for path in inside.values():
        by_last.setdefault(path.rpartition(".")[2], set()).add(path)
    places = {}
    for name in names:
        path = inside[name]
        if not path:
            places[name] = Place("", name, None)
            continue
        last = path.rpartition(".")[2]
        in_list, _, index = blocks_of[name].rpartition(".")
        places[name] = Place(short[in_list], last if len(by_last[last]) == 1 else path, int(index))
    return places


def blocks(names: Sequence[str]) -> dict[str, str]:
    """The block of every module of one model.

    As `block` has it, save that an index at the very front (a model in an nn.Sequential) is no block where blocks lie
    deeper: 0.auto_model.pooler.dense beside 0.auto_model.encoder.layer.0.output.dense stands for itself.
    """
    labels = {name: block(name) for name in names}
    ends = {name: end if first.isdigit() else "" for name in names for first, _, end in [name.partition(".")]}
    if not any(ends[name] and not label.isdigit() for name, label in labels.items()):
        return labels
    return {name: name.removesuffix(end) + block(end) if end else labels[name] for name, end in ends.items()}


def block(name: str) -> str:
    """The transformer block of a module: its path up to the block's index, or the module itself outside of any.

    The index is that of the first list whose name says that it holds blocks (layers, h, blocks …): model.layers.3.mlp
    → model.layers.3, and 0.auto_model.encoder.layer.3.output → 0.auto_model.encoder.layer.3; without such a name the
    first index. Where lists of blocks are nested (Swin stages, U-Nets) it is the inner index:
    encoder.layers.1.blocks.0.attn → encoder.layers.1.blocks.0. Experts and the parts of a block (T5's
    block.0.layer.1) stay within their block.
    """
    parts = name.split(".")
    indices = [i for i, part in enumerate(parts) if part.isdigit()]
    if not indices:
        return name
    named = (i for i in indices if i and _BLOCK_LIST.search(parts[i - 1]) and i + 1 < len(parts))
    at = next(named, indices[0])
    while (step := _to_inner(parts, at)) is not None:
        at += step
    return ".".join(parts[: at + 1])


_BLOCK_LIST = re.compile(r"(^|_)(layers?|blocks?|resblocks|h|stages?|levels?|groups?)$")
"""What lists of blocks are called."""
_STAGES = re.compile(r"(^|_)(stages|levels)$")
"""What lists are called whose elements are lists of blocks."""


def _to_inner(parts: Sequence[str], at: int) -> int | None:
    """How far beyond the index at `at` that of a list of blocks within its element is; None without such a list."""
    outer, rest = parts[at - 1] if at else "", parts[at + 1 :]
    if len(rest) > 1 and rest[0].isdigit() and outer.endswith(("block", "blocks")):
        return 1  # lists in a list: SegFormer's block.0.1, Funnel's blocks.0.1
    staged = bool(_STAGES.search(outer))
    if len(rest) > 1 and rest[1].isdigit() and (rest[0] in _NESTED_LISTS or (staged and _BLOCK_LIST.search(rest[0]))):
        return 2
    if len(rest) > 3 and rest[0] == "transformer" and _BLOCK_LIST.search(rest[1]) and rest[2].isdigit():
        return 3  # MobileViT's layers hold a transformer each
    return None


def group(names: Sequence[str], by: str | Mapping[str, str] = "block") -> dict[str, list[str]]:
    """Group name → module names, in the order in which the groups first appear; every module in exactly one."""
    groups: dict[str, list[str]] = {}
    if isinstance(by, str):
        if by not in ("block", "module"):
            raise OptionError(f"unknown grouping {by!r}; there are: block, module, or NAME=REGEX for each group")
        held = blocks(names)
        for name in names:
            groups.setdefault(held[name] if by == "block" else name, []).append(name)
        return groups
    fits = _matches(names, by)
    _refuse_empty("group", names, by, fits)
    for name in names:
        if len(fits[name]) != 1:
            matching = shorten(fits[name]) if fits[name] else "no group"
            raise OptionError(f"{name} matches {matching}; each module needs exactly one")
    return {label: [name for name in names if fits[name] == [label]] for label in by}


def _by_pattern(names: Sequence[str], by: Mapping[str, str]) -> Players:
    fits = _matches(names, by)
    _refuse_empty("player", names, by, fits)
    for name in names:
        if len(fits[name]) > 1:
            raise OptionError(
                f"players overlap: {name} matches {shorten(fits[name])}; each module belongs to one at most"
            )
    units = {label: tuple((name, None) for name in names if label in fits[name]) for label in by}
    places = locate(names)
    return Players(
        "regex",
        units,
        {label: _common([places[name] for name, _ in members]) for label, members in units.items()},
        tuple(name for name in names if not fits[name]),
    )


def _by_rank(adapter: Adapter, names: Sequence[str]) -> Players:
    """A rank-1 term bᵢaᵢᵀ of a module of plain LoRA."""
    if adapter.tuner != "LORA" or any(adapter.sites[name].kind == "parameter" for name in names):
        raise TunerError(f"{adapter.source}: {adapter.tuner} has no rank-1 components; `players` module can be asked")
    places = locate(names)
    units = {f"{name}#{r}": ((name, r),) for name in names for r in range(adapter.sites[name].rank or 0)}
    return Players("rank", units, {label: places[members[0][0]] for label, members in units.items()})


PLAYERS: Registry[Callable[[Adapter, Sequence[str]], Players]] = Registry(
    "set of players",
    "lora_lab.players",
    None,
    {
        "layer": by_label("layer", lambda name, place, block: block, "All modules of a layer (block)."),
        "module": by_label("module", lambda name, place, block: name, "A single module."),
        "type": by_label(
            "type", lambda name, place, block: str(place.type), "All modules of one type, such as q_proj."
        ),
        "type-layer": by_label("type-layer", _type_layer, "All modules of a type in the layers of one number."),
        "encoder-type-layer": by_label(
            "encoder-type-layer",
            lambda name, place, block: f"{place.encoder}.{_type_layer(name, place, block)}".removeprefix("."),
            "The same, each encoder of a model with several for itself.",
        ),
        "rank": _by_rank,
    },
)
"""Name of a set of players → function (adapter, its modules in natural order) → players."""


def _matches(names: Sequence[str], by: Mapping[str, str]) -> dict[str, list[str]]:
    try:
        patterns = {label: re.compile(pattern) for label, pattern in by.items()}
    except re.error as error:
        raise OptionError(f"not a regular expression: {error.pattern!r} ({error})") from error
    return {name: [label for label, pattern in patterns.items() if pattern.search(name)] for name in names}


def _refuse_empty(what: str, names: Sequence[str], by: Mapping[str, str], fits: Mapping[str, list[str]]) -> None:
    for label in by:
        if not any(label in labels for labels in fits.values()):
            raise OptionError(f"{what} {label!r} ({by[label]!r}) matches no module; there are: {shorten(names, 6)}")


def _common(places: Sequence[Place]) -> Place:
    """What all places share."""
    parts = {name: {getattr(place, name) for place in places} for name in ("encoder", "type", "layer")}
    return Place(**{name: values.pop() if len(values) == 1 else None for name, values in parts.items()})


def _distinct(paths: Sequence[str]) -> dict[str, str]:
    """Paths without the parts that all of them share, at the front and at the back."""
    if len(paths) == 1:
        return {paths[0]: ""}
    split = [path.split(".") for path in paths]
    front = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False)))
    ends = [parts[front:] for parts in split]
    while all(len(parts) > 1 for parts in ends) and len({parts[-1] for parts in ends}) == 1:
        ends = [parts[:-1] for parts in ends]
    return {path: ".".join(parts) for path, parts in zip(paths, ends, strict=True)}
