"""Formats of adapter files: what a format is given to read, what it makes of it, and what it writes.

A reader brings a file into PEFT's terms, its keys and its configuration, whatever it was before; so everything above
the formats knows PEFT's alone. How the file was laid out goes along, so that it can be written in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lora_lab.brief import Brief

if TYPE_CHECKING:
    from torch import Tensor

    from lora_lab.adapters.formats.sites import Site


@dataclass(frozen=True, repr=False)
class Raw(Brief):
    """An adapter's file as it lies on disk."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, str] = field(default_factory=dict)
    """The metadata of a safetensors file."""
    settings: Mapping[str, Any] | None = None
    """adapter_config.json: given, beside the file, or in its header."""
    alpha: float | None = None
    """lora_alpha where the file says none, as the user gives it."""
    adapter_name: str | None = None
    """Which of several adapters in one file is wanted."""


@dataclass(frozen=True, repr=False)
class Layout(Brief):
    """How the file was laid out that an adapter was read from, as far as writing it again needs to know."""

    format: str = "peft"
    """A name in FORMATS (registry.py)."""
    names: str | None = ""
    """In which of a model's naming schemes the modules were named, where the format has several; None where the
    adapter was in another format before, so that its writer chooses."""
    header: Mapping[str, str] = field(default_factory=dict)
    """Metadata of its header that is kept."""
    apart: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that change no weight and that nothing here understands, by their own keys; written as they were."""


@dataclass(repr=False)
class Content(Brief):
    """What a file holds, in PEFT's terms."""

    tensors: Mapping[str, Tensor]
    """By PEFT's keys: base_model.model.MODULE.lora_A.weight …; alpha and other numbers are in the configuration."""
    config: dict[str, Any]
    """PEFT's configuration, complete: ranks, alphas and target_modules of every module."""
    layout: Layout = field(default_factory=Layout)
    notes: list[str] = field(default_factory=list)
    """What was assumed, renamed or kept apart."""
    problems: list[str] = field(default_factory=list)
    """Why the adapter cannot be used; each names the tensor, and what would be right."""


class Writable(Protocol):
    """What a writer is given: an Adapter, or what looks like one."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By PEFT's keys."""

    @property
    def config(self) -> Mapping[str, Any]:
        """PEFT's."""

    @property
    def sites(self) -> Mapping[str, Site]:
        """Module → where its tensors are."""

    @property
    def layout(self) -> Layout:
        """Of the file that it was read from."""


@dataclass(frozen=True, repr=False)
class Part(Brief):
    """One file to be written, and what is to lie beside it."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    """Content of the configuration; None where the format has none."""
    notes: Sequence[str] = ()
    """What had to be changed to be written in this format."""


@dataclass(frozen=True)
class Format:
    """A format of adapter files."""

    about: str
    """In a few words: whose it is."""
    matches: Callable[[Raw], bool]
    """Whether a file is in this format, by its keys, header and configuration; the first that matches reads it."""
    read: Callable[[Raw], Content]
    write: Callable[[Writable], Mapping[str, Part]] | None = None
    """Parts by the folder that each goes into, '' for the output itself; None: the format is only read.

    Raises TunerError or AdapterError, naming the module, for what the format cannot carry.
    """
    renamed: Callable[[Any], Any] | None = None
    """An Adapter of another format with the modules that this one has, split or joined where they are other ones.

    Raises AdapterError, with their names, for modules that it has none for.
    """
    file: str | None = None
    """Name of the weights in a folder; None for a format of lone files."""
    settings: str | None = None
    """Name of the configuration beside them, or of the key in the header of a lone file."""
