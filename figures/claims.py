"""Claims of papers put to the test, a figure a testbed: every difference with its interval, beside its verdict."""

import sys
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

for path in sorted((HERE / "results").glob("claims_*.json")):
    drawn = plots.figure([Result.load(path)])
    plots.save(drawn, OUT / f"{path.stem}.pdf", OUT / f"{path.stem}.png", force=True)
