"""Where ΔW lies and points: singular triplets, subspaces and their angles, of one adapter and between several.

Knows adapters, and matrices W that it is given: no model, no data, no training. Of ΔW all is computed from rank × rank
cores, whatever the gauge.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.geometry.aligning import ProcrustesMean as ProcrustesMean
    from lora_lab.geometry.aligning import aligned as aligned
    from lora_lab.geometry.aligning import factor_distance as factor_distance
    from lora_lab.geometry.aligning import procrustes_mean as procrustes_mean
    from lora_lab.geometry.canonical import Canonical as Canonical
    from lora_lab.geometry.canonical import delta_hash as delta_hash
    from lora_lab.geometry.intruders import Inside as Inside
    from lora_lab.geometry.intruders import Weight as Weight
    from lora_lab.geometry.pairs import ModulePair as ModulePair
    from lora_lab.geometry.pairs import Side as Side
    from lora_lab.geometry.pairs import gaussian_agreement as gaussian_agreement
    from lora_lab.geometry.pairs import module_pair as module_pair
    from lora_lab.geometry.pairs import principal_angles as principal_angles
    from lora_lab.geometry.pairs import sign_agreement as sign_agreement

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "aligning": ("ProcrustesMean", "aligned", "factor_distance", "procrustes_mean"),
        "canonical": ("Canonical", "delta_hash"),
        "intruders": ("Inside", "Weight"),
        "pairs": ("ModulePair", "Side", "gaussian_agreement", "module_pair", "principal_angles", "sign_agreement"),
    },
)
