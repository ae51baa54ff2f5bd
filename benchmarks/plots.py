"""Pictures of the documentation, drawn from stored results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Result, Sheet, number

MARKS = {"convsplit": "o", "tensorly": "s", "fasterai": "v", "slice-wise": "^", "spatial": "D", "torch-pruning": "X"}
SPEED = {"eager, faster": "eager PyTorch", "ONNX Runtime, faster": "ONNX Runtime"}


def peers(results: dict[str, Result], chosen: list[tuple[str, str]], path: Path) -> None:
    """Points lost after each way's repair against its speed; a line for each budget, a column for each runtime."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(chosen), 2, figsize=(10, 3.6 * len(chosen)), squeeze=False)
    for line, (name, budget) in zip(axes, chosen, strict=True):
        (sheet,) = results[name].sheets
        for axis, (heading, runtime) in zip(line, SPEED.items(), strict=True):
            for index, (way, points, speed) in enumerate(_points(sheet, budget, heading)):
                ours = way.startswith("convsplit")
                mark = next((MARKS[start] for start in MARKS if way.startswith(start)), "P")
                size, color = (110, "C3") if ours else (55, f"C{index % 10 if index % 10 != 3 else 0}")
                face = "none" if way == "convsplit" else color
                axis.scatter(
                    speed, points, size, face, marker=mark, edgecolors=color, label=way, zorder=3 if ours else 2
                )
            axis.axvline(1, color="0.6", linewidth=1)
            axis.set_yscale("symlog", linthresh=2)
            axis.set(title=f"{sheet.title}, {budget}, {runtime}", xlabel="times as fast as dense")
            axis.set_ylim(-0.5, 110)
            axis.set_yticks([0, 1, 2, 5, 10, 20, 50, 80], ["0", "1", "2", "5", "10", "20", "50", "80"])
            axis.grid(alpha=0.3)
        line[0].set_ylabel("points lost, repaired or\nbatch norm recalibrated")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.1 if len(chosen) > 1 else 0.2, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _points(sheet: Sheet, budget: str, heading: str) -> list[tuple[str, float, float]]:
    """Way, points lost after the repair that it has, and speed; ways that do not run there are left out."""
    found = []
    for row in sheet.table.rows:
        cells = dict(zip(sheet.table.headings, row, strict=True))
        speed, again = number(cells[heading]), number(cells["recalibrated: points lost"])
        lost = again if again is not None else number(cells["points lost"])
        if cells["budget"] == budget and cells["way"] != "dense" and speed is not None and lost is not None:
            found.append((cells["way"], lost, speed))
    return found
