"""What every merge keeps of four adapters, LoRA against CoTo: at its best coefficient, and over all of them."""

import sys
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

# the four adapters of a set began from one A, or each from its own
for name, results in (("merging", "merges"), ("merging_separate", "merges_separate")):
    result = Result.load(HERE / "results" / f"{results}.json")
    for ending, kind in (("", None), ("_coefficients", "compare-merges:coefficients")):
        drawn = plots.figure([result], kind=kind)
        plots.save(drawn, OUT / f"{name}{ending}.pdf", OUT / f"{name}{ending}.png", force=True)
