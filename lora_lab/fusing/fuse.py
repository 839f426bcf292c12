"""A base with adapters in it as a checkpoint of its own, written tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lab import files
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import labels_of
from lora_lab.adapters.models.bases import same_base
from lora_lab.brief import Brief
from lora_lab.errors import FileError, MismatchError, OptionError, shorten
from lora_lab.files.ownership import FUSED, METADATA
from lora_lab.files.resuming import Shards, resumed
from lora_lab.fusing.adding import Rounding, add, same_bits
from lora_lab.fusing.changes import HEADS, Changes
from lora_lab.fusing.checkpoints.companions import adapted, copied, require_space
from lora_lab.fusing.checkpoints.layout import Group, Layout
from lora_lab.fusing.checkpoints.skeleton import skeleton
from lora_lab.options import check_options, option
from lora_lab.results.result import fingerprint, finite, versions

RECORD = "fuse.json"
"""The file that tells how a checkpoint was made, and which files belong to it."""
_BYTES_A_SECOND = 150e6
"""Of a base that is read, changed and written, on one core and a plain disk."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FuseOptions:
    """How adapters are fused into a base; OptionError for what cannot be."""

    coefficients: tuple[float, ...] = option((), "One an adapter (1,0.5), by which its ΔW is multiplied; by default 1.")
    heads: str | None = option(
        None,
        "Heads and other whole tensors in which the adapters differ: NAMES.",
        choices=lambda: HEADS,
        title="way with heads",
    )
    max_shard_size: float = option(5.0, "Gigabytes (10⁹ bytes) that a file has at most.", above=0)

    def __post_init__(self) -> None:
        check_options(self)
        if not all(map(math.isfinite, self.coefficients)):
            raise OptionError(f"coefficients are {list(self.coefficients)}; finite numbers are needed")


@dataclass(frozen=True, repr=False)
class Fused(Brief):
    """A checkpoint that was written, and how it came to be."""

    path: Path
    parameters: int
    """That were changed."""
    error: float
    """‖stored − (W + ΔW)‖ / ‖ΔW‖ over all parameters: what rounding to the base's dtype takes away."""
    errors: Mapping[str, float]
    """Parameter → the same for it."""
    notes: Sequence[str]
    """What is otherwise than in the base, in words."""
    bytes: int
    files: Sequence[str]
    resumed: int
    """Files that an earlier run had finished."""


class Fusion:
    """A base and adapters, checked against each other; `write` makes the checkpoint.

    MismatchError where modules, shapes or base models do not fit, or where the base is quantised; TunerError for
    adapters that have no ΔW; FileError for a base that is no sound checkpoint. Nothing of the weights is read yet.
    """

    def __init__(self, base: Path, adapters: Sequence[Adapter], options: FuseOptions | None = None) -> None:
        if not adapters:
            raise OptionError("no adapter was given")
        self.options = options or FuseOptions()
        given = self.options.coefficients
        if given and len(given) != len(adapters):
            raise OptionError(f"{len(adapters)} adapters and {len(given)} coefficients; one an adapter is needed")
        self.base, self.adapters = base, list(adapters)
        same_base(self.adapters, given=True)
        self.layout = layout_of(base, self.adapters)
        self.changes = Changes(self.layout, self.adapters, given or None, self.options.heads)
        self.notes: list[str] = []
        self._changed = set(self.changes.parameters)
        self._apart = self._untied()
        self._resized = self._resizes()
        self.spec = self._spec()
        """Name → dtype and shape of every tensor that is written."""
        self.shards = files.shards(self.spec, int(self.options.max_shard_size * 1e9), _stem(self.layout))
        """File → names of its tensors."""

    @property
    def bytes(self) -> int:
        """Of the tensors that are written."""
        return sum(files.byte_size(*entry) for entry in self.spec.values())

    @property
    def seconds(self) -> float:
        """About as long as writing takes."""
        return self.bytes / _BYTES_A_SECOND

    def write(
        self,
        path: Path,
        *,
        force: bool = False,
        inputs: Sequence[Path] = (),
        device: torch.device | None = None,
        progress: Progress | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> Fused:
        """Write the folder: shards with their index, the base's other files, and a record of how it was made.

        `record` is put into it. The folder is whole or absent. What a run that was killed had finished is not done
        again by the next one.
        """
        files.refuse_existing(path, force=force, inputs=[self.base, *inputs])
        with resumed(path, self._key()) as shards:
            there = len(shards.done)
            left = [name for name in self.shards if name not in shards.done]
            require_space(path, sum(files.byte_size(*self.spec[t]) for name in left for t in self.shards[name]))
            total, done = len(self.spec), sum(len(self.shards[name]) for name in shards.done)
            for name in left:
                for _ in self._write_shard(shards, name, device):
                    done += 1
                    if progress:
                        progress(done, total)
            return self._finish(path, shards, there, record or {})

    def _write_shard(self, shards: Shards, name: str, device: torch.device | None) -> Iterator[str]:
        """Write one file, giving the name of each tensor that is done."""
        wanted = self.shards[name]
        told: dict[str, list[float]] = {}
        metadata = {"format": "pt", f"{METADATA}fused": ", ".join(labels_of(self.adapters))}
        spec = {tensor: self.spec[tensor] for tensor in wanted}
        try:
            with files.streamed_writer(shards.folder / name, spec, metadata) as write:
                for tensor, made in self._made(wanted, told, device):
                    write(tensor, made)
                    yield tensor
            shards.finish(name, {"norms": told})
        except FileError as error:
            kept = f"; the {len(shards.done)} files that are done are kept, and the same call goes on from there"
            raise FileError(f"{error}{kept if shards.done else ''}") from error

    def _made(
        self, wanted: Sequence[str], told: dict[str, list[float]], device: torch.device | None
    ) -> Iterator[tuple[str, Tensor]]:
        """These tensors as they are written, one after the other."""
        group_of = {tensor: group for group in self.layout.groups.values() for tensor in group.tensors}
        made: dict[str, Tensor] = {}
        for tensor in wanted:
            if tensor not in made:
                made = {}
                group = group_of.get(tensor)
                if group is None:
                    made[tensor] = self._new(tensor, told, device)
                else:
                    made = self._changed_group(group, told, device)
            yield tensor, made.pop(tensor)

    def _changed_group(
        self, group: Group, told: dict[str, list[float]], device: torch.device | None
    ) -> dict[str, Tensor]:
        tensors = {name: self.layout.checkpoint[name] for name in group.tensors}
        changed = [name for name in group.parameters if name in self._changed]
        if not changed:
            return tensors
        parameters = group.read(tensors)
        back = group.written(parameters)
        if not all(same_bits(back[name], tensors[name]) for name in tensors):
            raise MismatchError(f"{shorten(changed)}: no exact way back to the checkpoint's {shorten(tensors)}")
        for name in changed:
            parameters[name] = self._change(name, parameters[name], told, device)
        return group.written(parameters)

    def _change(
        self, name: str, base: Tensor | None, told: dict[str, list[float]], device: torch.device | None
    ) -> Tensor:
        change = self.changes.of(name)
        tensor = change.start(base).contiguous()
        if change.adds:
            rounding = add(tensor, change, name, device)
            told[name] = [rounding.norm, rounding.lost]
        return tensor

    def _new(self, name: str, told: dict[str, list[float]], device: torch.device | None) -> Tensor:
        """A tensor that the base has not: a head, or what is tied in the base and no longer."""
        base = self.layout.read(name) if name in self.layout.tied else None
        tensor = self._change(name, base, told, device) if name in self._changed else base
        assert tensor is not None
        return tensor.to(self.spec[name][0])

    def _finish(self, path: Path, shards: Shards, there: int, record: Mapping[str, Any]) -> Fused:
        """Put everything beside the shards that is not weights."""
        if len(self.shards) > 1:
            index = files.index_of(self.spec, self.shards)
            files.write_json(shards.folder / f"{_stem(self.layout)}.safetensors.index.json", index)
        names = [*self.shards, *copied(self.base, shards.folder, self._settings())]
        norms = {name: Rounding(*pair) for told in shards.done.values() for name, pair in told["norms"].items()}
        norm = math.sqrt(math.fsum(entry.norm**2 for entry in norms.values()))
        lost = math.sqrt(math.fsum(entry.lost**2 for entry in norms.values()))
        errors = {name: entry.share for name, entry in norms.items()}
        error = lost / norm if norm else 0.0
        names += [f"{_stem(self.layout)}.safetensors.index.json"] if len(self.shards) > 1 else []
        written = sorted([*names, RECORD])
        content = {
            "format": f"{FUSED} 1",  # first, since what is ours is known by it
            **record,
            "base": self.base.name,
            "adapters": labels_of(self.adapters),
            "coefficients": self.changes.coefficients,
            "heads": self.options.heads,
            "error": error,
            "notes": self.notes,
            "versions": versions(),
            "files": written,
        }
        files.write_json(shards.folder / RECORD, finite(content))
        changed = norms.keys() | self.changes.replaced
        return Fused(path, len(changed), error, errors, self.notes, self.bytes, written, there)

    def _settings(self) -> dict[str, Any] | None:
        """config.json where something in it is no longer so."""
        model = self.layout.model
        vocabulary = {rows for name, rows in self._resized.items() if self._is_embedding(name)}
        labels = {rows for name, rows in self._resized.items() if not self._is_embedding(name)}
        added = [name for name in self.changes.added if name not in self._apart]
        labels |= {self.spec[name][1][0] for name in added if len(self.spec[name][1]) == 2}
        known = getattr(getattr(model, "config", None), "num_labels", None)
        label_count = next(iter(labels - {known})) if len(labels - {known}) == 1 else None
        architecture = type(model).__name__ if model is not None and added else None
        return adapted(
            self.base,
            untied=bool(self._apart),
            vocabulary=next(iter(vocabulary), None),
            architecture=architecture,
            labels=label_count,
        )

    def _is_embedding(self, name: str) -> bool:
        model: Any = self.layout.model
        module = self.layout.modules.get(name.rpartition(".")[0])
        if module is None:
            return False
        return module is model.get_input_embeddings() or module is model.get_output_embeddings()

    def _untied(self) -> list[str]:
        """Parameters that the base ties to others and that become another tensor than these."""
        apart = []
        for names in self.layout.tied_sets:
            changed = [name for name in names if name in self._changed]
            if not changed or (len(changed) == len(names) and self.changes.alike(names)):
                continue
            apart += [name for name in names if name in self.layout.tied]
            # of a ΔW on one of them, PEFT's own merge would change both, and so be another model than the adapted one
            self.notes.append(
                f"{' and '.join(names)} are one tensor in the base, and two from here on, as they are with the adapter "
                "on the base (tie_word_embeddings is false)"
            )
        return apart

    def _resizes(self) -> dict[str, int]:
        """Parameter → its rows, where an adapter brings another number than the base has."""
        resized = {}
        for name in self.changes.parameters:
            shape, given = self.layout.shape(name), self.changes.whole_shape(name)
            if shape is not None and given is not None and shape != given:
                resized[name] = given[0]
                self.notes.append(f"{name} has {given[0]} rows, {shape[0]} in the base")
        embeddings = {rows for name, rows in resized.items() if self._is_embedding(name)}
        if len(embeddings) > 1:
            raise MismatchError(f"the adapters bring embeddings of {' and '.join(map(str, sorted(embeddings)))} rows")
        return resized

    def _spec(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        base = self.layout.checkpoint.spec
        owners = {tensor: group for group in self.layout.groups.values() for tensor in group.tensors}
        for first in base:
            for tensor in owners[first].tensors if first not in spec else ():
                name = owners[first].parameters[0]
                shape = (self._resized[name], *base[tensor][1][1:]) if name in self._resized else base[tensor][1]
                spec[tensor] = (base[tensor][0], shape)
        kinds = [dtype for dtype, _ in base.values() if dtype.is_floating_point]
        common = max(set(kinds), key=kinds.count) if kinds else torch.float32
        for name in dict.fromkeys([*self._apart, *self.changes.added]):
            new_shape = self.changes.whole_shape(name) or self.layout.shape(name)
            assert new_shape is not None
            home = self.layout.tied.get(name)
            spec[name] = (base[self.layout.groups[home].tensors[0]][0] if home else common, new_shape)
            if home is None:
                self.notes.append(f"{name} {list(new_shape)} is new: the base has no such tensor")
        return spec

    def _key(self) -> str:
        """What the shards of a run that was killed must have been made for."""
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.layout.checkpoint.paths]
        return fingerprint(
            {
                "base": states,
                "adapters": [_digest(adapter) for adapter in self.adapters],
                "options": vars(self.options),
                "version": versions(),
                "model": type(self.layout.model).__name__,
            }
        )


def layout_of(base: Path, adapters: Sequence[Adapter] = ()) -> Layout:
    """The parameters of a checkpoint, as the model that the adapters are for."""
    checkpoint = files.open_checkpoint(base)
    modules = {name.replace(".base_layer", "") for adapter in adapters for name in adapter.sites}
    types = [str(adapter.config["task_type"]) for adapter in adapters if adapter.config.get("task_type")]
    model = skeleton(base, modules, types)
    there = {name for name, _ in model.named_modules()} if model is not None else set()
    # experts one by one, as older models have them, and as their checkpoints still do
    by_name = not there.issuperset(modules) and all(f"{module}.weight" in checkpoint for module in modules)
    return Layout(checkpoint, None if by_name else model)


def _stem(layout: Layout) -> str:
    name = layout.checkpoint.paths[0].name
    return "diffusion_pytorch_model" if name.startswith("diffusion_pytorch_model") else "model"


def _digest(adapter: Adapter) -> str:
    """A hash of what an adapter does."""
    digest = hashlib.sha256(json.dumps(finite(adapter.config), sort_keys=True).encode())
    for key in sorted(adapter.tensors):
        tensor = adapter.tensors[key]
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
