"""All kinds of results that have a schema."""

from __future__ import annotations

from lora_lab.results import analysis_kinds, geometry_kinds, merging_kinds, training_kinds
from lora_lab.results.schema import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (*training_kinds.KINDS, *analysis_kinds.KINDS, *merging_kinds.KINDS, *geometry_kinds.KINDS)
}
"""Name of the verb → what its results hold. What an answer hangs on lies in their `parameters`, its origin in their
`provenance`."""
