"""Figures of adapters mixed in one layer at a time: a barrier a layer, and what exchanging it costs."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import labels
from lora_lab.plots.panels import Panels
from lora_lab.plots.primitives import Band
from lora_lab.plots.views import metrics
from lora_lab.results.result import Result

_MEASURES = (("value", " barrier"), ("exchange", ", worse at t = 1"))


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Barriers of every layer in the main metric, all other layers from one adapter and the other; several: means."""
    metric = metrics.main(results)
    rows = [row for result in results for row in result.summary["barriers"] if row["metric"] == metric]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    axes = panels.grid(2, 1 if panels.single else 2, 4.2 if panels.single else 2.5)
    for ax, (key, label) in zip(axes, _MEASURES, strict=True):
        ends = ("low", "high") if key == "value" else ("exchange_low", "exchange_high")
        bands: dict[str, Band] = {}
        for i, name in enumerate(("others from the first", "others from the second")):
            places = [[row for row in rows if (row["group"], row["index"]) == (group, i)] for group in groups]
            bands[name] = primitives.band(places, key, ends)
        primitives.named_bars(ax, bands, labels(groups), metrics.label(results, metric, label), horizontal=False)
        ax.axhline(0, color="#555555", linewidth=0.6)
    for ax in axes[-1:] if panels.single else axes:
        ax.set_xlabel(plot_style.players(results))
    panels.legend(axes[0], columns=1 if panels.single else 2)
    band = "95 % intervals over examples" if len(results) == 1 else f"±1 s.d. over {len(results)} pairs"
    panels.caption(axes[0], f"{plot_style.measured_on(results)}; bars: {band}")
    return axes
