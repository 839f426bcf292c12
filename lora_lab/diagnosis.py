"""What of an installation is there, fits, or is missing: packages, extras, devices, and folders that it keeps."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lora_lab.extras import EXTRAS
from lora_lab.progress import size

_PACKAGE = "lora-lab"
_DATA = ("digits.safetensors", "digits_vit.safetensors", "servers.toml", "../plots/lora-lab.mplstyle")
_MOST = 200_000
"""Files of a folder whose sizes are added up."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    group: str
    """package, extra, device, folder or installation."""
    name: str
    status: str
    """right or broken; of an extra missing or outside (of the supported versions), which break nothing else."""
    found: str
    wanted: str
    """What would be right, or what it is for."""


def checks() -> Iterator[Check]:
    """Everything that is looked at, one after the other; nothing asks a network."""
    yield from _installation()
    yield from _packages()
    yield from _devices()
    yield from _folders()


def _installation() -> Iterator[Check]:
    try:
        wanted = str(metadata.metadata(_PACKAGE)["Requires-Python"] or "")
        yield Check("installation", _PACKAGE, "right", metadata.version(_PACKAGE), "")
    except metadata.PackageNotFoundError:
        yield Check("installation", _PACKAGE, "broken", "", "an installation: pip install lora-lab")
        return
    python = platform.python_version()
    yield Check("installation", "python", "right" if _fits(wanted, python) else "broken", python, wanted)
    yield Check(
        "installation", "system", "right", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", ""
    )
    data = Path(__file__).parent / "data"
    lost = [Path(name).name for name in _DATA if not (data / name).is_file()]
    yield Check(
        "installation", "its own data", "broken" if lost else "right", "", f"with {', '.join(lost)}" if lost else ""
    )


def _packages() -> Iterator[Check]:
    """The packages that are needed, then those of each extra, with what they are for."""
    required = [Requirement(text) for text in metadata.requires(_PACKAGE) or ()]
    for need in required:
        if need.marker is None:
            yield _package("package", need, "broken", "broken")
    for extra, purpose in EXTRAS.items():
        for need in required:
            if need.marker is not None and need.marker.evaluate({"extra": extra}):
                check = _package(f"extra {extra}", need, "missing", "outside")
                yield Check(check.group, check.name, check.status, check.found, f"{check.wanted} for {purpose}")


def _package(group: str, need: Requirement, missing: str, outside: str) -> Check:
    """A package and its version; `missing` and `outside` are what is said where it is not there, or another one."""
    wanted = str(need.specifier)
    try:
        found = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Check(group, need.name, missing, "", wanted)
    if not any(find_spec(module) for module in _modules(need.name)):
        return Check(group, need.name, "broken", f"{found}, without its files", wanted)
    return Check(group, need.name, "right" if _fits(wanted, found) else outside, found, wanted)


def _modules(name: str) -> set[str]:
    """What a package installs to be imported, by the list of its files; where they are not listed, its own name."""
    listed = [path for path in metadata.files(name) or () if path.suffix == ".py"]
    packages = {path.parts[0] for path in listed if len(path.parts) == 2 and path.name == "__init__.py"}
    alone = {path.stem for path in listed if len(path.parts) == 1 and not path.name.startswith("__editable__")}
    return packages | alone or {name.replace("-", "_")}


def _fits(wanted: str, found: str) -> bool:
    return SpecifierSet(wanted).contains(found, prereleases=True)


def _devices() -> Iterator[Check]:
    if find_spec("torch") is None:
        return
    try:
        import torch
    except Exception as error:  # whatever a half-installed torch raises
        yield Check("device", "torch", "broken", f"{type(error).__name__}: {error}".partition("\n")[0], "a whole torch")
        return
    threads = torch.get_num_threads()
    yield Check("device", "cpu", "right", f"{threads} thread{'s' * (threads > 1)}", "")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield Check("device", f"cuda:{i}", "right", f"{about.name}, {size(about.total_memory)}", "")
    if torch.backends.mps.is_available():
        yield Check("device", "mps", "right", "Apple GPU", "")


def _folders() -> Iterator[Check]:
    """What is kept between runs, and how large it is; one that cannot be written is broken."""
    home = Path.home()
    kept = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / _PACKAGE
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", kept / "huggingface")) / "hub")
    yield _folder("cache", kept / _PACKAGE, "what can be computed again")
    yield _folder("hub cache", hub, "models and data from the hub")
    key = "with your key" if (settings / "key").is_file() else "no key yet; the first adapter that is saved makes it"
    yield _folder("settings", settings, f"the key that says which adapters are your own: {key}")


def _folder(name: str, path: Path, purpose: str) -> Check:
    near = path
    while not near.exists() and near != near.parent:
        near = near.parent
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        return Check("folder", name, "broken", str(path), f"a folder that can be written, for {purpose}")
    count, total = 0, 0
    for place, _, names in os.walk(path):
        for each in names:
            count += 1
            total += _bytes(Path(place, each))
        if count > _MOST:
            break
    told = f"{path}, {'over ' if count > _MOST else ''}{size(total)}" if path.exists() else f"{path}, not there yet"
    return Check("folder", name, "right", told, purpose)


def _bytes(path: Path) -> int:
    try:
        return 0 if path.is_symlink() else path.stat().st_size
    except OSError:  # gone meanwhile
        return 0
