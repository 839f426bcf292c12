"""Bases and data of a record that is not the user's own: what in them leads elsewhere is refused before it is read.

A model or dataset in a folder can name further files in its turn (an adapter on top, a vocabulary, shards, patterns of
data files), which transformers and datasets would open wherever they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_lab import files
from lora_lab.errors import LoraLabError, TrustError
from lora_lab.files.trust import WAYS, Reach, is_inside, refuse_indirections

_OUTWARD = re.compile(r"[\x00-\x1f\\:]|^[/~]|(^|/)\.\.(/|$)")
"""Another root, drive or protocol, or a step upwards; patterns are fine."""


def check_base(name: str, revision: str | None, where: str) -> None:
    """TrustError for a base, a folder or a hub id, whose own files have others loaded from elsewhere."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import find_adapter_config_file

    options = {"revision": revision} if revision else {}
    try:
        adapter = find_adapter_config_file(name, **options)
        config, _ = PreTrainedConfig.get_config_dict(name, **options)
        tokenizer = get_tokenizer_config(name, **options)
    except LoraLabError:
        raise
    except Exception:  # what is missing or broken is told when it is loaded
        return
    if adapter is not None:
        raise TrustError(f"{where} {name!r}: it holds an adapter_config.json, which may name another model; {WAYS}")
    refuse_indirections(config, f"{where} {name!r}")
    for key, value in tokenizer.items():
        leads = isinstance(value, str) and ("/" in value or "\\" in value)
        if key.endswith("_file") and key != "special_tokens_map_file" and leads:
            raise TrustError(f"{where} {name!r}: its tokenizer_config.json names a file elsewhere ({key}); {WAYS}")
    for index in Path(name).glob("*.index.json"):
        for shard in set(map(str, dict(files.read_json(index).get("weight_map") or {}).values())):
            if "/" in shard or "\\" in shard:
                raise TrustError(f"{where} {name!r}: {index.name} names a shard elsewhere; {WAYS}")


def check_folder(folder: Path, reach: Reach, where: str) -> None:
    """TrustError for a folder of data whose card or state names files outside of it."""
    reach.require(folder, where)
    for path in (*folder.rglob("README.md"), *folder.rglob(".huggingface.yaml")):
        _refuse_outward(_texts(_front_matter(path).get("configs")), path, where)
    for name in ("state.json", "dataset_dict.json"):
        for path in folder.rglob(name):
            content = files.read_json(path)
            _refuse_outward(_texts([content.get("_data_files"), content.get("splits")]), path, where)


def check_repository(name: str, where: str) -> None:
    """TrustError for a name by which datasets means no repository but one of its own readers, on the current folder."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:
        raise TrustError(f"{where}: a reader of files in the current folder, no dataset on the hub; {WAYS}")


def check_files(data_files: Mapping[Any, Any] | None, name: str, reach: Reach, where: str) -> None:
    """TrustError for a data file, as datasets has resolved it, that is neither in the folder nor of the repository."""
    prefix = f"hf://datasets/{name}@"
    for path in (str(file) for split in (data_files or {}).values() for file in split):
        if not path.startswith(prefix) or "/../" in path:
            if "://" in path or "::" in path:
                raise TrustError(f"{where}: it names files of another place; {WAYS}")
            reach.require(Path(path), where)


def check_image(path: Path, reach: Reach, where: str) -> None:
    """TrustError for a picture that data names by a path outside of the folder and of the hub's caches."""
    import datasets.config
    from huggingface_hub import constants

    if reach.folder is not None:
        roots = (reach.folder, constants.HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE))
        if not any(is_inside(path, root) for root in roots):
            raise TrustError(f"{where} lies outside of {reach.folder}; {WAYS}")


def _refuse_outward(texts: Iterator[str], path: Path, where: str) -> None:
    if any(_OUTWARD.search(text) for text in texts):
        raise TrustError(f"{where}: its {path.name} names files outside of it; {WAYS}")


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the head of a card, or of a file that is nothing else; empty where it is broken."""
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff")
    if path.suffix == ".md":
        match = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
        text = match[1] if match else ""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _texts(value: Any) -> Iterator[str]:
    """Every text within lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
