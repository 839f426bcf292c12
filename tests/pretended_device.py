"""A device that is only pretended, on which a tensor meets no tensor of the CPU: what forgets to move one fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy")
"""One that torch has a name for, and that needs nothing to be set up."""
_INDICES = ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default")
"""Operations that take indices of the CPU on every device."""


class Pretended(Tensor):
    """A tensor that says it is on `DEVICE`; its numbers are on the CPU, and without the mode it can do nothing."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the device")

    def tolist(self) -> Any:
        """The numbers, which every device gives."""
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("no array is made of a tensor that is not on the CPU")


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        here = any(isinstance(each, Pretended) for each in tensors)
        target = kwargs.get("device")
        copies = str(func) in ("aten._to_copy.default", "aten.copy_.default")
        mixed = [each for each in tensors if not isinstance(each, Pretended) and each.ndim]
        if here and mixed and not copies and str(func) not in _INDICES:
            raise RuntimeError(f"{func}: tensors on {DEVICE} and on the CPU")
        if target is not None and torch.device(target).type == DEVICE.type:
            kwargs["device"] = torch.device("cpu")
        moved_here = target is not None and torch.device(target).type == DEVICE.type
        moved_away = target is not None and not moved_here
        made = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        self.operations += here
        if moved_away or not (here or moved_here):
            return made
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            return args[0]
        return tree_map(lambda each: Pretended(each) if isinstance(each, Tensor) else each, made)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


@contextmanager
def pretended_device() -> Iterator[_Mode]:
    """The mode, which counts the operations on the device."""
    with _Mode() as mode:
        yield mode
