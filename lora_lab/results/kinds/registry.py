"""All kinds of results that have a schema."""

from __future__ import annotations

from lora_lab.results.kinds import analysis as analysis_kinds
from lora_lab.results.kinds import claims as claims_kinds
from lora_lab.results.kinds import geometry as geometry_kinds
from lora_lab.results.kinds import landscape as landscape_kinds
from lora_lab.results.kinds import merging as merging_kinds
from lora_lab.results.kinds import training as training_kinds
from lora_lab.results.schema import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for room in (training_kinds, analysis_kinds, landscape_kinds, merging_kinds, geometry_kinds, claims_kinds)
    for kind in room.KINDS
}
"""Name of the verb → what its results hold. What an answer hangs on lies in their `parameters`, its origin in their
`provenance`."""
