"""Calibration, and CPU seconds of training: CoTo less LoRA, DoRA, HiRA, with intervals, a figure a testbed."""

import sys
from dataclasses import replace
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result, columns

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

for path in sorted((HERE / "results").glob("claims_*.json")):
    result = Result.load(path)
    rows = [row for row in result.rows() if row["claim"].startswith(("calibration-", "time-"))]
    drawn = plots.figure([replace(result, columns=columns(rows))])
    name = path.stem.replace("claims", "calibration_and_time")
    plots.save(drawn, OUT / f"{name}.pdf", OUT / f"{name}.png", force=True)
