"""Tensors whose shape and dtype are known, and whose numbers are read or computed when an operation asks for them.

So a file larger than memory is taken apart, checked and changed by the same code as any other: what looks at shapes
costs nothing, and what computes holds one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Unread(Tensor):
    """A tensor on the CPU that keeps nothing: every operation on it reads, or computes, its numbers anew.

    What an operation gives is a plain tensor in memory. Changing it in place is refused with a TypeError, since nobody
    would see the change.
    """

    _read: Callable[[], Tensor]
    _size: torch.Size
    _kind: torch.dtype

    @staticmethod
    def __new__(cls, dtype: torch.dtype, shape: Sequence[int], read: Callable[[], Tensor]) -> Unread:
        """`read` gives the numbers: a plain tensor of this dtype and shape."""
        made: Unread = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        made._read, made._size, made._kind = read, torch.Size(shape), dtype
        return made

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], read: Callable[[], Tensor]) -> None:
        pass

    # Readers ask these some thirty times a tensor, and the way through torch takes twenty times as long.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The size of each dimension."""
        return self._size

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The type of its numbers."""
        return self._kind

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """How many dimensions it has."""
        return len(self._size)

    @property
    def itemsize(self) -> int:  # type: ignore[override]
        """Bytes of a number."""
        return self._kind.itemsize

    def numel(self) -> int:
        """How many numbers it has."""
        return self._size.numel()

    def is_floating_point(self) -> bool:
        """Whether its numbers are of a floating-point type."""
        return self._kind.is_floating_point

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The function on the numbers themselves, if it needs them."""
        kwargs = kwargs or {}
        if func in _OF_SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.to and "meta" in map(str, args[1:]):
            return torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
        name = getattr(func, "__name__", "")
        changes = args[:1] if name.endswith("_") and not name.startswith("__") else ()
        if any(isinstance(each, Unread) for each in (*changes, kwargs.get("out"))):
            raise TypeError(f"{name} would change a tensor that is not in memory")
        return func(*map(_read_all, args), **{key: _read_all(value) for key, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The same, below functions; only what is written in C++ comes here."""
        return func(*map(_read_all, args), **{key: _read_all(value) for key, value in (kwargs or {}).items()})

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


_OF_SHAPES = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("device", "layout", "requires_grad", "nbytes")),
        *(getattr(Tensor, name).__get__ for name in ("is_sparse", "is_quantized", "is_nested")),
        *(Tensor.size, Tensor.dim, Tensor.nelement, Tensor.element_size, Tensor.stride, Tensor.__len__),
        *(Tensor.is_complex, Tensor.is_contiguous, torch.is_floating_point, torch.is_complex),
    }
)
"""What is known without the numbers."""


def in_memory(value: Any) -> Any:
    """The tensor with its numbers; everything else as it is."""
    return value._read() if isinstance(value, Unread) else value


def _read_all(value: Any) -> Any:
    """An argument with the numbers of the tensors in it."""
    return type(value)(map(_read_all, value)) if isinstance(value, list | tuple) else in_memory(value)


def later(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What the function makes of the tensors; where one of them is unread, when an operation asks for it.

    The function works on tensors without numbers, too (on the device "meta"), from which dtype and shape are known.
    """
    if not any(isinstance(tensor, Unread) for tensor in tensors):
        return function(*tensors)
    example = function(*(tensor.to("meta") for tensor in tensors))
    return Unread(example.dtype, example.shape, lambda: function(*map(in_memory, tensors)))
