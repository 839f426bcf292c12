"""Records put into the files of adapters that were trained elsewhere; nothing else in a file is changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.reading import find_config, record_in
from lora_lab.adapters.files.writing import RECORD_KEY, SIGNATURE_KEY, signed
from lora_lab.adapters.formats.lookup import Location, locate
from lora_lab.adapters.naming import check_name
from lora_lab.errors import FileError
from lora_lab.files import trust
from lora_lab.files.ownership import RECORDED, foreign
from lora_lab.files.streamed import LazyTensors, write_safetensors
from lora_lab.options import checked
from lora_lab.results.result import finite


@dataclass(frozen=True)
class Recorded:
    """What an adapter's file says now."""

    record: Mapping[str, Any]
    dropped: Sequence[str] = ()
    """Keys of a stranger's record that are not taken over."""


@checked
def put_record(paths: Sequence[str | os.PathLike[str]], entries: Mapping[str, Any]) -> list[Recorded]:
    """Write entries (task, method, seed …) into the records of adapters' files, and sign these as the user's own.

    What somebody else has recorded is not signed, and dropped. Tensors, configuration and all other metadata stay as
    they are, bit for bit; each file takes its place whole, none before all have been read. One that was trained
    elsewhere still counts as such, so that nothing replaces it. FileError for what holds no record: pickled weights, a
    hub id, a folder of several adapters; AdapterError for one that cannot be used.
    """
    if "method" in entries:
        check_name("method", str(entries["method"]))
    places = [_place(path) for path in paths]
    for path in paths:
        Adapter.load(path)
    return [_put(place, entries) for place in places]


def _put(place: Location, entries: Mapping[str, Any]) -> Recorded:
    tensors = LazyTensors(place.weights)
    header = dict(tensors.metadata)
    settings = find_config(place, None, header)
    earlier = record_in(header)
    ours = foreign(place.weights) is None
    own = trust.is_own(header.get(SIGNATURE_KEY), earlier, tensors, signed(settings, header))
    made = finite(trust.recordable({**(earlier if own else {}), **entries}))
    header |= {} if ours else {RECORDED: "afterwards"}
    signature = trust.sign(made, tensors, signed(settings, header))
    header[RECORD_KEY] = json.dumps(made)
    header.pop(SIGNATURE_KEY, None)
    if signature is not None:
        header[SIGNATURE_KEY] = signature
    write_safetensors(place.weights, tensors, header)
    return Recorded(made, sorted(set(earlier) - set(made)))


def _place(path: str | os.PathLike[str]) -> Location:
    if not os.path.exists(os.path.expanduser(path)):
        raise FileError(f"{path}: no such file or folder; a record is put into files of this machine")
    place = locate(path)
    if place.components:
        raise FileError(
            f"{path}: holds an adapter for each of {', '.join(place.components)}; name one of these folders"
        )
    if not place.safetensors:
        raise FileError(f"{place.weights}: pickled weights hold no record; converting makes safetensors of them")
    return place
