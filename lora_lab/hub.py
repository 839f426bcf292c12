"""The Hugging Face hub: not asked again and again where there is no network."""

from __future__ import annotations

import functools
import os
import socket
from urllib.parse import urlsplit


def stay_offline_without_network() -> bool:
    """Let the hub's clients look into their caches alone where the hub cannot be connected to; whether that is so."""
    if _within_reach():
        return False
    import datasets.config
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
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
