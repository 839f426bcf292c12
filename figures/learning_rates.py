"""Accuracy over the learning rates tried, and the largest rates by the curvature where training ends: LoRA and CoTo."""

import sys
from pathlib import Path

from matplotlib.patches import Patch

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
METHODS = {"LoRA": ("#0072B2", (0.5, 1.0)), "CoTo": ("#D55E00", (0.0, 0.5))}
"""Colours of the style sheet, and the part of the panel's height that the band has."""

tried = [Result.load(HERE / "results" / f"rates_{method.lower()}.json") for method in METHODS]
figure = plots.figure(tried)
(ax,) = figure.axes
bands = []
for method, (colour, (low, high)) in METHODS.items():
    # 38 / the largest eigenvalue of the preconditioned Hessian (Cohen et al. 2022, arXiv:2207.14484)
    rows = Result.load(HERE / "results" / f"sharpness_{method.lower()}.json").rows(at="trained")
    rates = [row["rate_adam"] for row in rows]
    ax.axvspan(min(rates), max(rates), low, high, color=colour, alpha=0.3, linewidth=0)
    bands.append(
        Patch(color=colour, alpha=0.3, linewidth=0, label=f"{method}: largest stable rate by λmax, {len(rates)} seeds")
    )
ax.legend(handles=bands, loc="lower left", fontsize=7, frameon=False)
plots.save(figure, OUT / "learning_rates.pdf", OUT / "learning_rates.png", force=True)
