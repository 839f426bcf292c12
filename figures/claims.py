"""Claims of papers put to the test on digits: every difference with its interval, beside its verdict."""

import sys
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

drawn = plots.figure([Result.load(HERE / "results" / "claims_digits.json")])
plots.save(drawn, OUT / "claims.pdf", OUT / "claims.png", force=True)
