"""The page to look at: one file with its style, its plots and twenty lines of script inside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

from convsplit.report.curves import Curve, Frontier
from convsplit.report.svg import Plot, axis, legend_key, percents
from convsplit.report.values import Drift, LayerReport, Measured
from convsplit.tables import changed, count, milliseconds, percent, ratio, share, times_faster

SHAPES = {  # series and mark of each form
    "dw-pw": (0, "circle"), "pw-dw": (1, "square"), "pw-dw-pw": (2, "triangle"), "pw-pw": (3, "hanging"),
}  # fmt: skip
MOST_CURVES = 24  # small plots on a page; the largest layers come first
SIGNS = {"ready": "✓", "repair": "↻", "lost": "✕", "pointless": "–", "unknown": "?"}


@dataclass(frozen=True)
class Figure:
    """A plot with its heading, what to see in it, and its legend."""

    heading: str
    words: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()


def page(report: Measured, frontier: Frontier | None = None) -> str:
    """The HTML of a report.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ImportError('to_html needs jinja2: pip install "convsplit[report]"') from error
    source = resources.files("convsplit.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        report=report,
        verdict=report.verdict,
        sign=SIGNS[report.verdict.level],
        tiles=_tiles(report),
        figures=_figures(report, frontier),
        headings=_headings(report),
        rows=[_row(layer, timed=_timed(report)) for layer in report.layers],
        frontier=frontier,
        curves=_curves(report, frontier),
        more_curves=max(0, len(frontier.curves) - MOST_CURVES) if frontier else 0,
        forms=[(form, legend_key(kind, shape=shape, line=True)) for form, (kind, shape) in SHAPES.items()],
        count=count,
        changed=changed,
    )


def _tiles(report: Measured) -> list[dict[str, Any]]:
    """The totals: name, before, after, kept as text and as a fraction for the bar."""
    split = report.conv_params
    pairs: list[tuple[str, tuple[float, float] | None, Any, str]] = [
        ("Parameters", report.params, count, f"split layers {ratio(split[1], split[0])}"),
        ("MACs per input", report.macs, count, f"split layers {ratio(report.conv_macs[1], report.conv_macs[0])}"),
        ("Bytes stored", report.stored_bytes, count, _on_disk(report)),
        ("Milliseconds", report.milliseconds, milliseconds, "first batch, median"),
    ]
    return [
        {
            "name": name, "before": show(pair[0]), "after": show(pair[1]), "kept": ratio(pair[1], pair[0]),
            "fraction": pair[1] / pair[0], "more": more,
        }
        for name, pair, show, more in pairs
        if pair is not None and pair[0]
    ]  # fmt: skip


def _on_disk(report: Measured) -> str:
    sizes = [f"{name} {count(after)}" for name, (_, after) in report.bytes_on_disk.items() if name != "float32"]
    return f"in {', in '.join(sizes)}" if sizes else ""


def _timed(report: Measured) -> bool:
    return any(layer.milliseconds for layer in report.layers)


def _headings(report: Measured) -> list[str]:
    """Of the columns behind layer and form."""
    times = ["Milliseconds", "Faster"] if _timed(report) else []
    return ["R", "Parameters", "Kept", "MACs per input", *times, "Weight error", "Local drift", "Accumulated"]


def _row(layer: LayerReport, *, timed: bool) -> dict[str, Any]:
    """Cells as (text, value to sort by)."""
    before, after = layer.params
    macs = layer.macs or (None, None)
    local, accumulated = (drift.relative if drift else None for drift in (layer.local, layer.accumulated))
    slow, fast = layer.milliseconds or (None, None)
    times = [
        (f"{milliseconds(slow)} → {milliseconds(fast)}", slow),
        (times_faster(slow, fast), slow / fast if slow and fast else None),
    ]
    cells = [
        (str(layer.components), layer.components),
        (f"{count(before)} → {count(after)}", before),
        (ratio(after, before), after / before),
        (f"{count(macs[0])} → {count(macs[1])}", macs[0]),
        *(times if timed else []),
        (share(layer.weight_error), layer.weight_error),
        (share(local), local),
        (share(accumulated), accumulated),
    ]
    kind, shape = SHAPES[layer.form]
    return {"name": layer.name, "form": layer.form, "key": legend_key(kind, shape=shape), "cells": cells}


def _figures(report: Measured, frontier: Frontier | None) -> list[Figure]:
    figures = [_savings(report), _depth(report)] if any(_known(layer.local) for layer in report.layers) else []
    return [*figures, *([_budget(frontier, report)] if frontier and frontier.points else [])]


def _known(drift: Drift | None) -> bool:
    """Whether a drift can be drawn."""
    return drift is not None and math.isfinite(drift.relative)


def _savings(report: Measured) -> Figure:
    """Savings against drift per layer."""
    seen = [(layer, layer.local.relative) for layer in report.layers if layer.local and _known(layer.local)]
    saved = [max(1, layer.params[0] - layer.params[1]) for layer, _ in seen]
    plot = Plot(
        "Parameters saved against local drift, one mark per layer",
        axis("parameters saved (log)", saved, log=True, write=count),
        axis("local drift", [drift for _, drift in seen]),
    )
    for (layer, drift), many in zip(seen, saved, strict=True):
        kind, shape = SHAPES[layer.form]
        said = f"{layer.name}: {count(many)} parameters saved, local drift {share(drift)}"
        plot.mark((many, drift), said, kind, shape)
    worst, many = max(zip(seen, saved, strict=True), key=lambda each: each[0][1])
    plot.label((many, worst[1]), worst[0].name)
    used = {layer.form for layer in report.layers}
    legend = tuple((legend_key(kind, shape=shape), form) for form, (kind, shape) in SHAPES.items() if form in used)
    words = "Low and to the right is good: much saved, little moved. Keep dense or refit the layers high up."
    return Figure("What each layer saves and what it costs", words, plot.svg(), legend)


def _depth(report: Measured) -> Figure:
    """The net's depth against local and accumulated drift."""
    layers = [layer for layer in report.layers if _known(layer.local) and _known(layer.accumulated)]
    local = [(i, layer.local.relative) for i, layer in enumerate(layers, 1) if layer.local]
    accumulated = [(i, layer.accumulated.relative) for i, layer in enumerate(layers, 1) if layer.accumulated]
    plot = Plot(
        "Drift along the depth of the network, local and accumulated",
        axis("split layers, first to last", [len(layers)]),
        axis("relative drift", [y for _, y in local + accumulated]),
    )
    for kind, (shape, points) in enumerate((("circle", local), ("square", accumulated))):
        plot.line(points, kind)
        for layer, point in zip(layers, points, strict=True):
            which = ("local", "accumulated")[kind]
            plot.mark(point, f"{layer.name}: {which} drift {share(point[1])}", kind, shape)
    legend = (
        (legend_key(0, shape="circle", line=True), "local: the layer's own fault"),
        (legend_key(1, shape="square", line=True), "accumulated: with everything before it"),
    )
    words = "Where the accumulated line stays near the local one, later layers do not amplify earlier errors."
    return Figure("How drift travels through the network", words, plot.svg(), legend)


def _budget(frontier: Frontier, report: Measured) -> Figure:
    """The budget frontier of the whole net, and where this report lies."""
    here = _place(frontier, report)
    ys = [y for point in frontier.points for y in (point.largest_error, point.drift or 0, point.unrepaired or 0)]
    plot = Plot(
        "Budget against predicted error and measured drift",
        axis("parameters of the splittable layers kept", [1.0], write=percents),
        axis("drift or error", [*ys, here[1] if here else 0]),
    )
    predicted = [(point.kept, point.largest_error) for point in frontier.points]
    plot.line(predicted, 1)
    legend = [(legend_key(1, line=True), "predicted: largest weight error of a layer")]
    if frontier.measured:
        plot.line([(point.kept, point.drift or 0) for point in frontier.points])
        repaired = ", repaired" if frontier.repaired else ""
        legend.insert(0, (legend_key(0, shape="circle", line=True), f"measured drift of the output{repaired}"))
    if frontier.repaired:
        plot.line([(point.kept, point.unrepaired or 0) for point in frontier.points], 2)
        legend.append((legend_key(2, line=True), "measured drift before repair"))
    for point in frontier.points:
        said = f"{point.budget!r}: drift {share(point.drift)}, largest error {share(point.largest_error)}"
        said += f", agreement {percent(point.agreement)}"
        plot.mark((point.kept, point.moved), said, 0 if frontier.measured else 1)
    if frontier.knee is not None:
        plot.mark((frontier.knee.kept, frontier.knee.moved), f"knee: {frontier.knee.budget!r}", 0, "ring")
        plot.label((frontier.knee.kept, frontier.knee.moved), "knee", right=True)
    if frontier.chosen is not None:
        place = (frontier.chosen.kept, frontier.chosen.moved)
        plot.mark(place, f"chosen: {frontier.chosen.budget!r}, drift {share(frontier.chosen.drift)}", 3, "diamond")
        legend.append((legend_key(3, shape="diamond"), "chosen"))
    if here is not None:
        plot.mark(here, f"this report: {percents(here[0])} kept, drift {share(here[1])}", 2, "diamond")
        legend.append((legend_key(2, shape="diamond"), "this report"))
    words = "What keeping less costs. The ring marks the knee: below it drift rises faster than savings do."
    return Figure("Every budget at a glance", words, plot.svg(), tuple(legend))


def _place(frontier: Frontier, report: Measured) -> tuple[float, float] | None:
    """Where a report lies among the budgets: the fraction of the splittable parameters it keeps, and its drift."""
    kept = frontier.kept_by(report.conv_params)
    if report.drift is None or not _known(report.drift) or kept is None:
        return None
    return (kept, report.drift.relative)


def _curves(report: Measured, frontier: Frontier | None) -> list[tuple[str, str]]:
    """A small plot of error against parameters for every layer, with the chosen point ringed."""
    if frontier is None:
        return []
    chosen = {layer.name: layer for layer in report.layers}
    largest = {curve.layer for curve in sorted(frontier.curves, key=lambda c: -c.params)[:MOST_CURVES]}
    return [(c.layer, _curve(c, chosen.get(c.layer))) for c in frontier.curves if c.layer in largest and c.points]


def _curve(curve: Curve, chosen: LayerReport | None) -> str:
    plot = Plot(
        f"Error against parameters of {curve.layer}", axis("kept", [1.0], write=percents), axis("", [1.0]),
        width=230, height=160, left=32, bottom=38, right=25, top=10, ticks=2,
    )  # fmt: skip
    for form, points in curve.forms().items():
        plot.line([(point.params / curve.params, point.error) for point in points], SHAPES[form][0])
    if chosen is None:
        return plot.svg()
    kind, shape = SHAPES[chosen.form]
    point = (chosen.params[1] / chosen.params[0], chosen.weight_error)
    plot.mark(point, f"chosen: {chosen.form} {chosen.components}, error {share(chosen.weight_error)}", kind, shape)
    plot.mark(point, "chosen", kind, "ring")
    return plot.svg()
