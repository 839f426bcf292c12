"""All kinds of results that have a schema."""

from __future__ import annotations

from lora_lab.results import (
    analysis_kinds,
    claims_kinds,
    geometry_kinds,
    landscape_kinds,
    merging_kinds,
    training_kinds,
)
from lora_lab.results.schema import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for room in (training_kinds, analysis_kinds, landscape_kinds, merging_kinds, geometry_kinds, claims_kinds)
    for kind in room.KINDS
}
"""Name of the verb → what its results hold. What an answer hangs on lies in their `parameters`, its origin in their
`provenance`."""
