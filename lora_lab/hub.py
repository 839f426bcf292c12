"""Models, tokenizers and configurations by folder or hub id; no code from a repository is run unasked.

The hub is not asked again and again where there is no network.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from lora_lab.errors import FileError, MismatchError, TaskError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pretrained(cls: Any, name: str, *, where: str = "the model", **options: Any) -> Any:
    """`cls.from_pretrained(name)`; TaskError with one line of why not, `where` naming what asked for it.

    Code that comes with the model is run for `trust_remote_code=True` alone, and nobody is asked about it.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not os.path.exists(name):
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise TaskError(f"{where} {name!r} is missing; a folder with a model, or a hub id, is needed")
        stay_offline_without_network()
    try:
        loaded = cls.from_pretrained(name, **{"trust_remote_code": False, **options})
    except Exception as error:  # files of all kinds are read, each kind with errors of its own
        reason = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error) and not options.get("trust_remote_code"):
            raise TaskError(
                f"{where} {name!r} needs code that comes with it, which is not run; if you have read it, a task file "
                "with trust_remote_code = true runs it"
            ) from error
        if isinstance(error, ImportError):  # a package that quantised weights need
            raise TaskError(f"{where} {name!r} cannot be loaded: {reason}") from error
        if not os.path.exists(name):
            reason = f"there is no such folder here; from the hub: {reason}"
        raise TaskError(
            f"{where} {name!r} cannot be loaded ({reason}); give a folder, or a hub id where there is a network"
        ) from error
    if isinstance(loaded, nn.Module):
        _check_quantisation(loaded, f"{where} {name!r}")
    return loaded


def _check_quantisation(model: nn.Module, where: str) -> None:
    """TaskError for a model that is to be quantised by its configuration, and is not: it would score as another one."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    said: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if not said:
        return
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    method = str(getattr(method, "value", method))
    known = [*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"]
    if method not in known:
        raise TaskError(f"{where} is quantised by {method!r}, of which this version of transformers knows nothing")
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if type(module).__module__.startswith("bitsandbytes.") and weight.is_floating_point():
            raise TaskError(
                f"{where}: its configuration asks for {method}, and {name} is stored unquantised; a folder that the "
                "quantised model was saved to is needed, or one without quantization_config"
            )


def cached_folder(name: str, revision: str | None = None, *, file: str = "config.json") -> Path | None:
    """Where a repository with this file lies in the cache, in a folder called by its commit; None where it does not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # no hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def checkpoint_folder(name: str) -> Path:
    """Where the checkpoint of a folder, a file or a hub id lies on this machine; FileError where it does not."""
    if os.path.exists(name):
        return Path(name)
    folder = None if name.startswith((".", "/", "~")) else cached_folder(name)
    if folder is None:
        raise FileError(
            f"{name}: no such folder or file, nor a hub id with its files in the cache (`hf download` fetches them)"
        )
    return folder


def check_memory(name: str, dtype: torch.dtype, *, where: str, revision: str | None = None) -> None:
    """TaskError where a base's weights, in this dtype, would not fit into the free memory."""
    import psutil

    folder = Path(name) if os.path.isdir(name) else cached_folder(name, revision)
    files = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")] if folder else []
    if not files:
        return  # on the hub, where its size is not known before it is loaded
    stored = 4
    if files[0].suffix == ".safetensors":
        with files[0].open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        kinds = [entry["dtype"] for key, entry in header.items() if key != "__metadata__"]
        stored = 2 if kinds and max(kinds, key=kinds.count) in ("F16", "BF16") else 4
    needed = sum(file.stat().st_size for file in files) * dtype.itemsize / stored
    free = psutil.virtual_memory().available
    if needed > free:
        half = 'dtype = "bfloat16" takes half of it, ' if dtype.itemsize == 4 else ""
        raise TaskError(
            f"{where} {name!r} takes {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and "
            f'{free / 2**30:.1f} GiB are free; {half}device_map = "auto" spreads it over several devices'
        )


def base_model(name: str, modules: Sequence[str] = ()) -> nn.Module:
    """The model of a folder or hub id in the class that its configuration names, float32, frozen.

    With `modules`, a model that lacks any of them is refused.
    """
    import transformers

    config = pretrained(transformers.AutoConfig, name, where="the base model")
    named = [getattr(transformers, each, None) for each in getattr(config, "architectures", None) or []]
    cls = next((each for each in named if each is not None), transformers.AutoModel)
    with torch.random.fork_rng():
        model: nn.Module = pretrained(cls, name, where="the base model", dtype=torch.float32)
    known = {each for each, _ in model.named_modules()}
    missing = [each for each in modules if each not in known]
    if missing:
        raise MismatchError(f"the base model {name!r} ({cls.__name__}) has no module {missing[0]}; another base?")
    return model.requires_grad_(False).eval()


def stay_offline_without_network() -> bool:
    """Let the hub's clients look into their caches alone where the hub cannot be connected to; whether that is so."""
    if _within_reach():
        return False
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    with contextlib.suppress(ImportError):  # which the plain installation leaves out
        import datasets.config

        datasets.config.HF_HUB_OFFLINE = True
    return True


@functools.cache
def _within_reach() -> bool:
    """Whether something answers at the hub's address; behind a proxy that is left to the clients."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without what transformers logs short of errors, where it is known or of no use to who asked."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
