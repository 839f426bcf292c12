"""What survives pruning: patterns of modules, sparsities and ranks, LoRA against CoTo, mean and spread over seeds."""

import sys
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

drawn = plots.figure([Result.load(HERE / "results" / "sweep.json")])
plots.save(drawn, OUT / "pruning.pdf", OUT / "pruning.png", force=True)
