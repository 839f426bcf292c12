"""Modules worked on side by side in threads, each on one core, so that the numbers are the same for any of them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Made = TypeVar("Made")

_MOST = 4
"""Threads where nothing else is said: every one may hold a dense ΔW."""


def usual_jobs() -> int:
    """As many threads as torch would use, at the most four."""
    return min(_MOST, torch.get_num_threads())


def in_order(calls: Iterable[Callable[[], Made]], jobs: int) -> Iterator[Made]:
    """What the calls return, in their order; `jobs` of them are made at a time, and few results wait."""
    if jobs == 1:
        for call in calls:
            yield call()
        return
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) > jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def one_core_each() -> Iterator[None]:
    """Torch divides no product within the context: the order of a sum, and so its last bits, hang on no machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
