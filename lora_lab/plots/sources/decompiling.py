"""What was drawn on Axes as the calls of plain matplotlib that draw it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

Write = Callable[[Any], str]
"""An array as Python."""


def axes_of(ax: Any, figure: Figure, numbers: Write) -> Iterator[str]:
    """The calls that draw one panel again, at the same place of the figure."""
    left, bottom, width, height = ax.bbox.transformed(figure.transFigure.inverted()).bounds
    yield f"ax = fig.add_axes([{left:.5f}, {bottom:.5f}, {width:.5f}, {height:.5f}])"
    bar = getattr(ax, "_colorbar", None)
    if bar is not None:
        norm = f"Normalize({literal(float(bar.norm.vmin))}, {literal(float(bar.norm.vmax))})"
        yield (
            f"fig.colorbar(plt.cm.ScalarMappable({norm}, {colour_map(bar.cmap)}), cax=ax, "
            f"orientation={bar.orientation!r}, label={(bar.ax.get_xlabel() or bar.ax.get_ylabel())!r})"
        )
        return
    barred = set()
    for container in ax.containers:
        if isinstance(container, BarContainer):
            barred |= set(map(id, container.patches))
            yield _bars(container, numbers)
    for patch in ax.patches:
        if isinstance(patch, Rectangle) and id(patch) not in barred:  # a span over the whole height
            box = patch.get_bbox()
            look = f"facecolor={colour(patch.get_facecolor())}, linewidth=0, zorder={patch.get_zorder():g}"
            yield f"ax.axvspan({float(box.x0)!r}, {float(box.x1)!r}, {look})"
    for image in ax.images:
        low, high = (literal(float(end)) for end in image.get_clim())
        yield (
            f"ax.imshow({numbers(image.get_array())}, cmap={colour_map(image.cmap)}, vmin={low}, vmax={high}, "
            f"extent={literal(list(map(float, image.get_extent())))}, aspect={ax.get_aspect()!r}, "
            f"interpolation={image.get_interpolation()!r})"
        )
    for collection in ax.collections:
        yield from _collection(collection, numbers)
    for line in ax.lines:
        yield _line(line, ax, numbers)
    for text in ax.texts:
        yield _text(text, ax)
    yield from _frame(ax)


def _bars(container: BarContainer, numbers: Write) -> str:
    flat = container.orientation == "horizontal"
    boxes = [patch.get_bbox() for patch in container.patches]
    at = [(box.y0 + box.y1) / 2 if flat else (box.x0 + box.x1) / 2 for box in boxes]
    size = [box.width if flat else box.height for box in boxes]
    start = [box.x0 if flat else box.y0 for box in boxes]
    patch, thick = container.patches[0], boxes[0].height if flat else boxes[0].width
    base = f", {'left' if flat else 'bottom'}={numbers(start)}" if any(start) else ""
    look = f"color={colour(patch.get_facecolor())}, edgecolor={colour(patch.get_edgecolor())}"
    look += f", linewidth={patch.get_linewidth():g}, hatch={patch.get_hatch()!r}, zorder={patch.get_zorder():g}"
    return (
        f"ax.{'barh' if flat else 'bar'}({numbers(at)}, {numbers(size)}, {thick:.6g}{base}, "
        f"label={str(container.get_label())!r}, {look})"
    )


def _collection(collection: Any, numbers: Write) -> Iterator[str]:
    widths, order = literal([float(width) for width in collection.get_linewidths()]), collection.get_zorder()
    if isinstance(collection, LineCollection):
        segments = literal([np.asarray(part, dtype=float).tolist() for part in collection.get_segments()])
        colours = f"[{', '.join(map(colour, collection.get_colors()))}]"
        yield f"ax.add_collection(LineCollection({segments}, colors={colours}, linewidths={widths}, zorder={order:g}))"
    elif isinstance(collection, ContourSet):
        paths: Any = collection.get_paths()
        outlines = ", ".join(
            f"Outline({literal(path.vertices.round(6).tolist()) if len(path.vertices) else 'np.empty((0, 2))'}, "
            f"{None if path.codes is None or not len(path.codes) else literal([int(code) for code in path.codes])})"
            for path in paths
        )
        faces, edges = (
            [colour(each) for each in part] for part in (collection.get_facecolor(), collection.get_edgecolor())
        )
        yield (
            f"ax.add_collection(PathCollection([{outlines}], facecolors=[{', '.join(faces)}], "
            f"edgecolors=[{', '.join(edges)}], linewidths={widths}, zorder={order:g}))"
        )
    elif isinstance(collection, PolyCollection):
        look = f"color={colour(collection.get_facecolor()[0])}, linewidth=0, zorder={order:g}"
        bands: Any = collection.get_paths()
        for path in bands:
            places = np.unique(path.vertices[:, 0])
            ends = [path.vertices[path.vertices[:, 0] == place, 1] for place in places]
            low, high = (numbers([end(part) for part in ends]) for end in (np.min, np.max))
            yield f"ax.fill_between({numbers(places)}, {low}, {high}, {look})"


def _line(line: Line2D, ax: Any, numbers: Write) -> str:
    x, y = (np.asarray(part) for part in line.get_data(orig=False))
    along = line.get_transform().contains_branch_seperately(ax.transData)
    look = _look(line)
    if along == (False, True):
        return f"ax.axhline({float(y[0])!r}, {look})"
    if along == (True, False):
        return f"ax.axvline({float(x[0])!r}, {look})"
    return f"ax.plot({numbers(x)}, {numbers(y)}, label={str(line.get_label())!r}, {look})"


def _look(line: Line2D) -> str:
    dashes: Any = line.get_linestyle()
    pattern = getattr(line, "_unscaled_dash_pattern", (0, None))
    if dashes == "--" and pattern[1] is not None:  # of any pattern
        dashes = (pattern[0], tuple(map(float, pattern[1])))
    look = f"color={colour(line.get_color())}, linestyle={dashes!r}, linewidth={line.get_linewidth():g}"
    if line.get_marker() not in ("None", "", None):
        face = line.get_markerfacecolor()
        look += f", marker={line.get_marker()!r}, markersize={line.get_markersize():g}"
        look += f", markerfacecolor={face!r}" if isinstance(face, str) and face == "none" else ""
        look += f", markevery={line.get_markevery()!r}" if line.get_markevery() is not None else ""
        if not isinstance(face, str) or face != "none":
            look += f", markerfacecolor={colour(face)}, markeredgecolor={colour(line.get_markeredgecolor())}"
    if line.get_alpha() is not None:
        look += f", alpha={line.get_alpha():g}"
    return f"{look}, zorder={line.get_zorder():g}"


def _text(text: Any, ax: Any) -> str:
    x, y = map(float, text.get_position())
    look = f"ha={text.get_ha()!r}, va={text.get_va()!r}, fontsize={text.get_fontsize():g}"
    look += f", color={colour(text.get_color())}"
    if isinstance(text, Annotation):
        at = literal(list(map(float, text.xy)))
        return f"ax.annotate({text.get_text()!r}, {at}, ({x!r}, {y!r}), textcoords={text.anncoords!r}, {look})"
    inside = "" if text.get_transform() == ax.transData else ", transform=ax.transAxes"
    return f"ax.text({x!r}, {y!r}, {text.get_text()!r}, {look}{inside})"


def _frame(ax: Any) -> Iterator[str]:
    """Title, labels, scales, limits and ticks of a panel."""
    if ax.get_title():
        yield f"ax.set_title({ax.get_title()!r}, fontsize={ax.title.get_fontsize():g})"
    for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        if axis.get_label_text():
            yield f"ax.set_{name}label({axis.get_label_text()!r}, fontsize={axis.label.get_fontsize():g})"
            yield from _label_place(name, axis, ax)
        scale = axis.get_scale()
        if scale != "linear":
            yield f"ax.set_{name}scale({scale!r})"
        low, high = (literal(float(end)) for end in axis.get_view_interval())
        yield f"ax.set_{name}lim({low}, {high})"
        yield _ticks(name, axis)
        own = {key: value for key, value in axis.get_tick_params().items() if key in ("length", "pad")}
        if own:
            yield f"ax.tick_params(axis={name!r}, {', '.join(f'{key}={value:g}' for key, value in own.items())})"
        if scale != "linear":
            yield f"ax.{name}axis.minorticks_off()"
        if not any(line.get_visible() for line in axis.get_gridlines()):
            yield f"ax.grid(visible=False, axis={name!r})"


def _label_place(name: str, axis: Any, ax: Any) -> Iterator[str]:
    """Where the label of an axis stands that lies elsewhere than matplotlib puts it."""
    if axis._autolabelpos:
        return
    text = axis.label
    at = text.get_transform() + ax.transAxes.inverted()
    x, y = at.transform(text.get_position())
    yield f"ax.{name}axis.set_label_coords({x:.5f}, {y:.5f})"
    yield f"ax.{name}axis.label.set(ha={text.get_ha()!r}, va={text.get_va()!r})"


def _ticks(name: str, axis: Any) -> str:
    low, high = sorted(axis.get_view_interval())
    room = 1e-9 * (high - low)
    shown = [tick for tick in axis.get_major_ticks() if low - room <= tick.get_loc() <= high + room]
    texts = [tick.label1.get_text() if tick.label1.get_visible() else "" for tick in shown]
    look = f", fontsize={shown[0].label1.get_fontsize():g}" if shown else ""
    if shown and shown[0].label1.get_rotation():
        look += f", rotation={shown[0].label1.get_rotation():g}, ha='right', rotation_mode='anchor'"
    return f"ax.set_{name}ticks({literal([float(tick.get_loc()) for tick in shown])}, {texts!r}{look})"


def furniture_of(figure: Figure) -> Iterator[str]:
    """Legends, letters and captions of a figure and of its parts."""
    parts: Any = (figure, *figure.subfigs)
    for part in parts:
        for legend in part.legends:
            box = legend.get_window_extent().transformed(figure.transFigure.inverted())
            handles = ", ".join(
                f"{_proxy(handle)[:-1]}, label={text.get_text()!r})"
                for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
            )
            yield (
                f'fig.legend(handles=[{handles}], loc="upper center", ncols={legend._ncols}, '
                f"bbox_to_anchor=({(box.x0 + box.x1) / 2:.5f}, {box.y1:.5f}), borderaxespad=0, "
                f"fontsize={legend.prop.get_size():g})"
            )
        for text in (part._suptitle, part._supxlabel):
            if text is not None and text.get_text():
                x, y = figure.transFigure.inverted().transform(text.get_transform().transform(text.get_position()))
                yield (
                    f"fig.text({x:.5f}, {y:.5f}, {text.get_text()!r}, ha={text.get_ha()!r}, va={text.get_va()!r}, "
                    f"fontsize={text.get_fontsize():g}, fontweight={text.get_fontweight()!r}, "
                    f"color={colour(text.get_color())})"
                )


def _proxy(handle: Any) -> str:
    """What stands in a legend for what was drawn."""
    if isinstance(handle, Line2D):
        return f"Line2D([], [], {_look(handle)})"
    if isinstance(handle, ErrorbarContainer):
        return _proxy(handle[0])
    if isinstance(handle, LineCollection):
        return f"Line2D([], [], color={colour(handle.get_colors()[0])})"
    if isinstance(handle, Rectangle):
        return (
            f"Patch(facecolor={colour(handle.get_facecolor())}, edgecolor={colour(handle.get_edgecolor())}, "
            f"hatch={handle.get_hatch()!r})"
        )
    found = [getattr(handle, name)() for name in ("get_facecolor", "get_edgecolor") if hasattr(handle, name)]
    colours: Any = next((part for part in found if np.size(part)), "none")
    return f"Patch(color={colour(colours if np.ndim(colours) < 2 else colours[0])})"


def literal(value: Any) -> str:
    """Numbers and texts in lists as Python, in so many digits as tell them apart."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if not isinstance(value, float):
        return repr(value)
    if not math.isfinite(value):
        return "np.nan" if math.isnan(value) else f"{'-' if value < 0 else ''}np.inf"
    return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def colour(value: Any) -> str:
    """A colour as Python, with its transparency where it has one."""
    return repr(to_hex(value, keep_alpha=to_hex(value, keep_alpha=True)[-2:] != "ff"))


def colour_map(cmap: Any) -> str:
    """A colour map by its name, or with its colours."""
    shades = np.linspace(0, 1, 9)
    if cmap.name in colormaps and np.array_equal(colormaps[cmap.name](shades), cmap(shades)):
        return repr(cmap.name)
    return f"ListedColormap({literal([to_hex(cmap(i)) for i in np.linspace(0, 1, min(cmap.N, 64))])})"
