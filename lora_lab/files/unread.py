"""Tensors whose shape and dtype are known, and whose numbers are read or computed when an operation asks for them.

So a file larger than memory is taken apart, checked and changed by the same code as any other: what looks at shapes
costs nothing, and what computes holds one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Unread(Tensor):
    """A tensor on the CPU that keeps nothing: every operation on it reads, or computes, its numbers anew.

    What an operation gives is a plain tensor in memory. Changing it in place is refused with a TypeError, since nobody
    would see the change.
    """

    _read: Callable[[], Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # plain tensors come out

    @staticmethod
    def __new__(cls, dtype: torch.dtype, shape: Sequence[int], read: Callable[[], Tensor]) -> Unread:
        """`read` gives the numbers: a plain tensor of this dtype and shape."""
        made: Unread = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        made._read = read
        return made

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], read: Callable[[], Tensor]) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The operation on the numbers themselves."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = {**dict(zip((arg.name for arg in func._schema.arguments), args, strict=False)), **kwargs}
            for arg in func._schema.arguments:
                if arg.alias_info and arg.alias_info.is_write and isinstance(given.get(arg.name), Unread):
                    raise TypeError(f"{func} would change a tensor that is not in memory")
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="meta")
        return func(*tree_map(in_memory, args), **tree_map(in_memory, kwargs))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Unread({list(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # to another process go the numbers
        return self._read().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __setitem__(self, *_: Any) -> None:
        raise TypeError("a tensor that is not in memory cannot be changed")

    def data_ptr(self) -> int:
        """TypeError: there is no memory."""
        raise TypeError("a tensor that is not in memory has no address")

    def __deepcopy__(self, memo: Any) -> Unread:  # nobody can change it
        return self

    def numpy(self, *, force: bool = False) -> Any:
        """The numbers as an array."""
        return self._read().numpy(force=force)

    def tolist(self) -> Any:
        """The numbers in lists."""
        return self._read().tolist()


def in_memory(value: Any) -> Any:
    """The tensor with its numbers; everything else as it is."""
    return value._read() if isinstance(value, Unread) else value


def later(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What the function makes of the tensors; where one of them is unread, when an operation asks for it.

    The function works on tensors without numbers, too (on the device "meta"), from which dtype and shape are known.
    """
    if not any(isinstance(tensor, Unread) for tensor in tensors):
        return function(*tensors)
    example = function(*(tensor.to("meta") for tensor in tensors))
    return Unread(example.dtype, example.shape, lambda: function(*map(in_memory, tensors)))
