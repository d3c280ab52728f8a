"""Figures of evaluations; they need matplotlib, which is optional."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def _find_leading_number(panel: tuple[str, Any]) -> float:
    """Read the number that a title begins with, so that 2 minutes come before 10."""
    number = re.match(r"[\d.]+", panel[0])
    return float(number.group()) if number else 0.0


def draw(
    folder: Path,
    name: str,
    label: str,
    panels: dict[str, dict[str, list[tuple[Any, float]]]],
    measure: str,
    join: bool = True,
) -> str:
    """Draw panels side by side into FOLDER/NAME.png.

    Args:
        folder: where the file goes.
        name: of the file, without its suffix.
        label: of the x axis.
        panels: by title, in each of them lines of points (x, y) by name. The line `dense` is black and dashed.
        measure: label of the y axis.
        join: draw lines, over a logarithmic x axis; False: points alone, whose x are names.

    Returns:
        Markdown that shows the file, or says that matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "No plots: they need matplotlib (pip install matplotlib).\n"

    figure, axes = pyplot.subplots(1, len(panels), figsize=(1.5 + 4 * len(panels), 4), sharey=True, squeeze=False)
    values = [y for lines in panels.values() for points in lines.values() for _, y in points]
    names = sorted({line for lines in panels.values() for line in lines} - {"dense"})
    colors = {"dense": "black"} | {line: f"C{index % 10}" for index, line in enumerate(names)}
    for axis, (title, lines) in zip(axes[0], sorted(panels.items(), key=_find_leading_number), strict=True):
        for line, points in sorted(lines.items()):
            x, y = zip(*sorted(points), strict=True) if join else zip(*points, strict=True)
            style = ("o--" if line == "dense" else "o-") if join else "o"
            axis.plot(x, y, style, color=colors[line], label=line or None)
        if join:
            axis.set_xscale("log", base=2)
            places = sorted({x for points in lines.values() for x, _ in points})
            axis.set_xticks(places, [f"{place:g}" for place in places])
            axis.minorticks_off()
        if max(values) > 5 * min(values) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.set(title=title, xlabel=label)
        axis.grid(alpha=0.3, which="both")
        axis.tick_params(axis="x", rotation=0 if join else 60)
        if any(lines):
            axis.legend(fontsize="x-small")
    axes[0, 0].set_ylabel(measure)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=120)
    pyplot.close(figure)
    return f"![{measure} against {label}]({name}.png)\n"
