"""Gates by row: what adapted modules add to the rows of one pass, for several variants one after another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.models.attached import NAME
from lora_lab.scoring.layout import Variant


class ApartError(Exception):
    """Why variants cannot go through one pass together; they are scored one after another then."""


class RowGates:
    """Gates on plain LoRA modules in passes over K variants × rows, all rows of the first variant first.

    A gate multiplies what comes out of A, [rows, …, rank], so that PEFT's s · B(g · A x) is s · B(A x) where g is 1,
    and 0 where it is 0; a gate of a rank multiplies that rank alone. They lie in one buffer [K, gates] that is written
    in place, so that a compiled model stays what it is.
    """

    def __init__(self, layers: Mapping[str, Any], variants: Sequence[Variant]) -> None:
        """For the modules that are not wholly on in all of these variants; ApartError names one that has no gate."""
        self.seen: dict[str, list[int]] | None = None
        """Module → rows of each of its calls, while it is a dictionary."""
        self._modules: list[tuple[int, int, int]] = []
        """Number of a module, and where its gates begin and end."""
        self._hooks: list[tuple[nn.Module, Any]] = []
        self._width, kinds = 0, {}
        for i, (name, layer) in enumerate(layers.items()):
            states = {variant[i] for variant in variants}
            if states == {1.0}:
                continue
            A, by_rank = _place_of(name, layer), any(isinstance(state, tuple) for state in states)
            start, self._width = self._width, self._width + (len(A.weight) if by_rank else 1)
            self._modules.append((i, start, self._width))
            self._hooks.append((A, self._gate(name, A, start, self._width)))
            kinds[A.weight.dtype, A.weight.device] = name
        if len(kinds) != 1:
            odd = "; ".join(f"{name} is {dtype} on {device}" for (dtype, device), name in kinds.items())
            raise ApartError(f"adapters of one dtype on one device are needed: {odd}" if kinds else "nothing is off")
        (self._dtype, self.device) = next(iter(kinds))
        self.reserve(1)
        self._now: Tensor | None = None

    def cover(self, variants: Sequence[Variant]) -> bool:
        """Whether these variants leave all other modules, and ranks of modules that have one gate, wholly on."""
        columns = {i: end - start for i, start, end in self._modules}
        states = [{variant[i] for variant in variants} for i in range(len(variants[0]))]
        return all(
            (i in columns or each == {1.0}) and not (columns.get(i) == 1 and any(isinstance(s, tuple) for s in each))
            for i, each in enumerate(states)
        )

    def reserve(self, most: int) -> None:
        """Have room for so many variants, all on."""
        self._buffer = torch.ones(most, self._width, dtype=self._dtype, device=self.device)

    def stay(self) -> None:
        """Tell a compiler that the buffer stays where it is, and is written in place."""
        torch._dynamo.mark_static_address(self._buffer)

    def write(self, variants: Sequence[Variant]) -> None:
        """For the next pass: its variants."""
        if len(variants) > len(self._buffer):
            self.reserve(len(variants))
        values = [
            [
                state[k] if isinstance(state, tuple) else state
                for i, start, end in self._modules
                for state in (variant[i],)
                for k in range(end - start)
            ]
            for variant in variants
        ]
        self._buffer[: len(values)].copy_(torch.tensor(values, dtype=self._buffer.dtype))

    @contextlib.contextmanager
    def on(self, count: int) -> Iterator[None]:
        """Rows are those of the first `count` variants while the context lasts; without it, nothing is gated."""
        self._now = self._buffer if count == len(self._buffer) else self._buffer[:count]
        try:
            yield
        finally:
            self._now = None

    @contextlib.contextmanager
    def only(self, places: Tensor) -> Iterator[None]:
        """Rows are those of the variants at these places while the context lasts."""
        before, self._now = self._now, self._buffer.index_select(0, places)
        try:
            yield
        finally:
            self._now = before

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """The gates are on the modules while the context lasts."""
        with contextlib.ExitStack() as stack:
            for A, gate in self._hooks:
                stack.callback(A.register_forward_hook(gate).remove)
            yield

    def _gate(self, name: str, A: nn.Module, start: int, end: int) -> Any:
        convolution = isinstance(A, nn.Conv1d | nn.Conv2d | nn.Conv3d)

        def gate(_: nn.Module, __: Any, out: Tensor) -> Tensor | None:
            if self.seen is not None:
                self.seen.setdefault(name, []).append(len(out))
            if self._now is None:
                return None
            count = len(self._now)
            if len(out) % count:
                raise ApartError(f"{name}: its {len(out)} rows are not those of {count} variants")
            rows = by_variant(out, count)  # [variants, rows, …, ranks], or [variants, rows, ranks, …]
            shape = [count, *[1] * (rows.ndim - 1)]
            shape[2 if convolution else -1] = end - start
            gates: Tensor = self._now[:, start:end].reshape(shape).to(out.dtype)
            return (rows * gates).flatten(0, 1)

        return gate


def by_variant(tensor: Tensor, count: int) -> Tensor:
    """[count, rows of each, …] of a tensor [count · rows, …]; a view."""
    return torch.unflatten(tensor, 0, (count, len(tensor) // count))


def _place_of(name: str, layer: Any) -> Any:
    """A of a module whose update is s · B(A x) and nothing else."""
    from peft.tuners.lora import layer as lora

    kind = type(layer).__name__
    if type(layer).forward not in (lora.Linear.forward, lora._ConvNd.forward):
        raise ApartError(f"{name}: a gate by row has no place in {type(layer).__module__}.{kind}")
    if NAME in layer.lora_variant:
        raise ApartError(f"{name}: a gate by row has no place in a {type(layer.lora_variant[NAME]).__name__}")
    if layer.merged:
        raise ApartError(f"{name}: its update is merged into its weight")
    if layer.lora_B[NAME].bias is not None:
        raise ApartError(f"{name}: its B has a bias, which a gate after A does not reach")
    return layer.lora_A[NAME]
