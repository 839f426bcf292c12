"""How alike adapters of LoRA and CoTo are, of one seed and of several: cosines, subspaces, distances, and a map."""

import sys
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

result = Result.load(HERE / "results" / "compare_digits.json")
for name, kind in (("likeness", "compare:groups"), ("adapters_map", "compare:map")):
    drawn = plots.figure([result], kind=kind)
    plots.save(drawn, OUT / f"{name}.pdf", OUT / f"{name}.png", force=True)
