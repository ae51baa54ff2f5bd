"""Pictures as matplotlib figures; needs the extra `plot`.

Every function returns a new `Figure` that belongs to nobody: show it in a notebook, or `figure.savefig(path)`.
Forms differ by colour and by marker, lines by colour and by dashes, so that they survive a black and white printer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from convsplit.report import Curve, Frontier, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {
    "dw-pw": ("C0", "o", "-"),
    "pw-dw": ("C1", "s", "--"),
    "pw-dw-pw": ("C2", "^", ":"),
    "pw-pw": ("C3", "v", "-."),
}


def plot_savings(report: Report) -> Figure:
    """Parameters saved against local drift, one mark per layer."""
    figure, axes = _figure(xlabel="parameters saved", ylabel="local drift", xscale="log")
    for form, (colour, marker, _) in STYLES.items():
        layers = [layer for layer in report.layers if layer.form == form and layer.local]
        if layers:
            saved = [max(1, layer.params[0] - layer.params[1]) for layer in layers]
            drift = [layer.local.relative for layer in layers if layer.local]
            axes.scatter(saved, drift, color=colour, marker=marker, label=form)
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, "What each layer saves and what it costs")


def plot_depth(report: Report) -> Figure:
    """Local and accumulated drift along the depth of the network."""
    figure, axes = _figure(xlabel="split layers, first to last", ylabel="relative drift")
    layers = [layer for layer in report.layers if layer.local and layer.accumulated]
    places = range(1, len(layers) + 1)
    axes.plot(places, [layer.local.relative for layer in layers if layer.local], "o-", label="local")
    accumulated = [layer.accumulated.relative for layer in layers if layer.accumulated]
    axes.plot(places, accumulated, "s--", label="accumulated")
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, "How drift travels through the network")


def plot_frontier(frontier: Frontier, report: Report | None = None) -> Figure:
    """What is kept against predicted error and measured drift, before and after repair; a ring marks the knee.

    Diamonds mark the chosen point and the conversion of a report.
    """
    figure, axes = _figure(xlabel="fraction of the splittable parameters kept", ylabel="drift or error")
    kept = [point.kept for point in frontier.points]
    if frontier.measured:
        repaired = ", repaired" if frontier.repaired else ""
        drifts = [point.drift or 0.0 for point in frontier.points]
        axes.plot(kept, drifts, "o-", label=f"measured drift of the output{repaired}")
    if frontier.repaired:
        drifts = [point.unrepaired or 0.0 for point in frontier.points]
        axes.plot(kept, drifts, "^:", label="measured drift before repair")
    predicted = [point.largest_error for point in frontier.points]
    axes.plot(kept, predicted, "s--", label="predicted: largest weight error of a layer")
    if frontier.knee is not None:
        place = ([frontier.knee.kept], [frontier.knee.moved])
        axes.plot(*place, "o", markersize=16, fillstyle="none", color="black", label="knee")
    if frontier.chosen is not None:
        axes.plot([frontier.chosen.kept], [frontier.chosen.moved], "D", markersize=9, color="C3", label="chosen")
    here = None if report is None else frontier.kept_by(report.conv_params)
    if report is not None and report.drift is not None and here is not None:
        axes.plot([here], [report.drift.relative], "d", markersize=9, color="C4", label="this report")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, "Budget against drift")


def plot_curves(frontier: Frontier, report: Report | None = None) -> Figure:
    """Error against parameters of every layer, one small picture each; a report adds what was chosen."""
    from matplotlib.figure import Figure

    columns = min(4, max(1, len(frontier.curves)))
    rows = max(1, math.ceil(len(frontier.curves) / columns))
    figure = Figure(figsize=(3 * columns, 2.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    chosen = {layer.name: layer for layer in report.layers} if report else {}
    for axes, curve in zip(grid, frontier.curves, strict=False):
        _draw_curve(axes, curve, chosen.get(curve.layer))
    for axes in list(grid)[len(frontier.curves) :]:
        axes.set_axis_off()
    figure.supxlabel("fraction of the parameters kept")
    figure.supylabel("relative weight error")
    return figure


def _draw_curve(axes: Axes, curve: Curve, chosen: Any) -> None:
    for form, points in curve.forms().items():
        colour, _, dashes = STYLES[form]
        kept = [point.params / curve.params for point in points]
        axes.plot(kept, [point.error for point in points], dashes, color=colour, label=form)
    if chosen is not None:
        colour, marker, _ = STYLES[chosen.form]
        axes.plot([chosen.params[1] / chosen.params[0]], [chosen.weight_error], marker, color=colour, mec="black")
    axes.set_title(curve.layer, fontsize="small")
    axes.legend(fontsize="x-small", frameon=False)


def _figure(**settings: Any) -> tuple[Figure, Axes]:
    """A figure outside pyplot, which would keep it alive and might open a window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(**settings)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _finished(figure: Figure, axes: Axes, title: str) -> Figure:
    axes.set_title(title, loc="left")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    return figure
