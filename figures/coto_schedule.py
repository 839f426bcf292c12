"""p(t) of a CoTo run, the masks that were drawn under it, and the loss; plain LoRA beside it."""

import sys
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

results = [Result.load(HERE / "results" / f"train_{method}.json") for method in ("lora", "coto", "coto-h")]
plots.save(plots.figure(results), OUT / "coto_schedule.pdf", OUT / "coto_schedule.png", force=True)
