"""Where an adapter lies: in a folder, a lone file, a run's last checkpoint, or the hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from lora_lab.adapters.formats.diffusion.components import PARTS
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.errors import FileError, shorten
from lora_lab.files.disk import read_header
from lora_lab.files.kinds import SAFETENSORS, identified
from lora_lab.hub import stay_offline_without_network

_HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")


class Location:
    """Where the weights are, the folder that they were named by, in what form, and what there is to tell of it."""

    def __init__(self, weights: Path, folder: Path | None, form: str, notes: Iterable[str] = ()) -> None:
        self.weights, self.folder, self.format, self.notes = weights, folder, form, list(notes)
        self.safetensors = identified(weights) == SAFETENSORS
        """Whether it is read as a safetensors file, which its content says and not its name; else as a torch file."""
        self.components: dict[str, Location] = {}
        """Of a folder with an adapter for each component of a pipeline: where these are. The first is `weights`."""


_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapters.safetensors",
)
"""Names of weights in a folder: PEFT's, diffusers', MLX's."""
_WHOLE = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "model_index.json")
"""What the folders of whole models hold, those of pipelines among them."""


def locate(given: str | os.PathLike[str]) -> Location:
    """Where the adapter lies that is named by a folder, a file, or a hub id; FileError where there is none."""
    path = Path(given).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.name == "adapter_config.json":
            return _in_folder(path.parent)
        return Location(path, None, path.suffix.removeprefix(".") or "lone file")
    if _HUB_ID.match(str(given)) and path.suffix not in (".safetensors", ".bin"):
        return _on_hub(str(given))
    raise FileError(f"{given}: no such file or folder")


def _in_folder(folder: Path) -> Location:
    checkpoint = re.match(r"^checkpoint-(\d+)$", folder.name)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return Location(folder / name, folder, "trainer-checkpoint" if checkpoint else "peft")
    checkpoints = checkpoints_in(folder)
    if checkpoints:
        last = checkpoints[max(checkpoints)]
        location = _in_folder(last)
        location.notes.append(f"its last checkpoint is read: {last.name}")
        return location
    inside = [p.name for p in sorted(folder.iterdir()) if any((p / name).is_file() for name in _WEIGHTS)]
    if inside and all(name in PARTS and _of_peft(folder / name) for name in inside):
        parts = {name: _in_folder(folder / name) for name in inside}
        location = Location(parts[inside[0]].weights, folder, "peft")
        location.components = parts
        return location
    if inside:
        raise FileError(f"{folder}: no adapter itself, but holds some: {shorten(inside, 5)}; name one of them")
    others = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    adapters = [path for path in others if _is_adapter(path)] if len(others) > 1 else []
    if len(adapters) == 1:
        note = f"the one adapter among its {len(others)} safetensors files is read: {adapters[0].name}"
        return Location(adapters[0], folder, "lone file", [note])
    if any((folder / name).is_file() for name in _WHOLE):
        raise FileError(f"{folder}: a whole model, not an adapter ({' or '.join(_WEIGHTS[:2])} is needed)")
    if len(others) == 1:
        return Location(others[0], folder, "lone file", [f"the one safetensors file in it is read: {others[0].name}"])
    if others:
        raise FileError(
            f"{folder}: several safetensors files and none by an adapter's usual name: "
            f"{shorten((path.name for path in adapters or others), 5)}; name one of them"
        )
    raise FileError(
        f"{folder}: no {', no '.join(_WEIGHTS[:-1])} and no {_WEIGHTS[-1]} in this folder; an adapter's folder or file "
        "is needed"
    )


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Optimiser step → the folder checkpoint-STEP in a Trainer's output folder, of those that hold an adapter."""
    found = {
        int(inner.name[11:]): inner
        for inner in folder.glob("checkpoint-*")
        if inner.name[11:].isdecimal() and any((inner / name).is_file() for name in _WEIGHTS)
    }
    return dict(sorted(found.items()))


def _is_adapter(path: Path) -> bool:
    """Whether a file's keys are those of an adapter of some format; its tensors stay unread."""
    try:
        header, _ = read_header(path)
    except FileError:
        return False
    return any(_OF_ADAPTERS.search(key) for key in header)


_OF_ADAPTERS = re.compile(rf"^{re.escape(PREFIX)}|lora_|\.lora\.|hada_w|lokr_w|\.oft_|\.(alpha|diff|diff_b|on_input)$")
"""In the names of an adapter's tensors: PEFT's prefix, kohya's, diffusers' and LyCORIS' pieces."""


def _of_peft(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS[:2])


def _on_hub(name: str) -> Location:
    repo, _, revision = name.partition("@")
    offline = stay_offline_without_network()
    try:
        folder = _downloaded(name, repo, revision or None)
    except FileError:
        raise
    except Exception as error:  # the hub client raises many kinds; each means that it is not to be had
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        reason = "it cannot be connected to, and the cache has none" if offline else told
        raise FileError(
            f"{name}: no such file or folder here, and the Hugging Face hub gave none ({reason}); "
            "download it where there is a network and give the folder"
        ) from error
    location = _in_folder(folder)
    location.format = "hub"
    return location


def _downloaded(name: str, repo: str, revision: str | None) -> Path:
    """The folder with a repository's adapter: the files by their usual names, or else its one safetensors file."""
    from huggingface_hub import HfApi, snapshot_download

    names = ["adapter_config.json", *_WEIGHTS]
    patterns = [*names, *(f"{component}/{name}" for component in PARTS for name in names[:3])]
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    if any((folder / place).is_file() for place in patterns[1:] if not place.endswith(names[0])):
        return folder
    if any(folder.glob("*.safetensors")):  # of an earlier call
        return folder
    listed = HfApi().list_repo_files(repo, revision=revision)
    lone = [file for file in listed if file.endswith(".safetensors") and "/" not in file]
    if any(file in _WHOLE for file in listed):
        raise FileError(f"{name}: a whole model, not an adapter ({' or '.join(_WEIGHTS[:2])} is needed)")
    if len(lone) != 1:
        told = f"several safetensors files ({shorten(lone, 5)})" if lone else "no safetensors file"
        raise FileError(
            f"{name}: none of {', '.join(_WEIGHTS)} in this repository, and {told}; `hf download` fetches one of its "
            "files, which can then be named"
        )
    return Path(snapshot_download(repo, revision=revision, allow_patterns=[names[0], lone[0]]))
