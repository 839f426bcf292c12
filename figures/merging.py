"""What every merge keeps of four adapters, LoRA against CoTo: at its best coefficient, and over all of them."""

import sys
from pathlib import Path

from lora_lab import plot
from lora_lab.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

result = Result.load(HERE / "results" / "merges.json")
for name, kind in (("merging", None), ("merging_coefficients", "compare-merges:coefficients")):
    drawn = plot.figure([result], kind=kind)
    plot.save(drawn, OUT / f"{name}.pdf", OUT / f"{name}.png", force=True)
