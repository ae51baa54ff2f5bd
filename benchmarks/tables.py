"""Tables of the documentation, made of stored results, which pages name in markers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import dropwhile, takewhile

from benchmarks.results import STORED, Result, Sheet
from convsplit.tables import Table


def whole(results: dict[str, Result], name: str) -> str:
    """All sheets of one result, and what they were measured with."""
    sheets = (f"**{sheet.title}**\n\n{_told(sheet.table)}\n\n{sheet.notes}".strip() for sheet in results[name].sheets)
    return "\n\n".join([results[name].conditions(), *sheets])


def sheet(results: dict[str, Result], argument: str) -> str:
    """One sheet of a result and its notes, `FILE TITLE`."""
    name, _, title = argument.partition(" ")
    (found,) = (each for each in results[name].sheets if each.title == title)
    return f"{_told(found.table)}\n\n{found.notes}".strip()


def kept(results: dict[str, Result], argument: str) -> str:
    """The first table under a heading of a page of results that is no JSON, `FILE HEADING`, as it stands there."""
    name, _, heading = argument.partition(" ")
    lines = (STORED / f"{name}.md").read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if line.lstrip("#") == f" {heading}")
    rows = dropwhile(lambda line: not line.startswith("|"), lines[start:])
    return "\n".join(takewhile(lambda line: line.startswith("|"), rows))


def _told(table: Table) -> str:
    """Without columns in which nothing was measured."""
    columns = list(zip(*table.rows, strict=True))
    kept = [index for index, cells in enumerate(columns) if set(cells) - {"-", ""}]
    rows = [[row[index] for index in kept] for row in table.rows]
    return Table([table.headings[index] for index in kept], rows, table.left).markdown()


SHORT = {
    "way": "", "MACs kept": "MACs kept", "accuracy": "accuracy (95 %)",
    "recalibrated: points lost": "points lost, recalibrated",
    "eager, faster": "eager", "ONNX Runtime, faster": "ONNX Runtime",
}  # fmt: skip
IN_README = {
    "dense": "dense", "convsplit": "convsplit, no data", "convsplit, repaired": "**convsplit, repaired**",
    "slice-wise SVD, pw-dw": "slice-wise SVD (Network Decoupling)",
    "spatial SVD, k x 1 and 1 x k": "spatial SVD (AIMET)", "tensorly parafac, four modes": "tensorly, CP",
    "tensorly-torch, Tucker": "tensorly-torch, Tucker", "torch-pruning, channels": "torch-pruning",
    "torchao, int8, compiled": "torchao, int8",
}  # fmt: skip


def short(results: dict[str, Result], argument: str) -> str:
    """The rows of one budget that README shows, `FILE BUDGET`."""
    name, budget = argument.split(" ")
    (sheet,) = results[name].sheets
    rows = [[IN_README.get(cells["way"], ""), *(cells[heading] for heading in list(SHORT)[1:])]
            for cells in _records(sheet) if cells["budget"] == budget and cells["way"] in IN_README]  # fmt: skip
    return Table(list(SHORT.values()), rows, frozenset({""})).markdown()


def losses(results: dict[str, Result], argument: str) -> str:
    """Where another way beats convsplit's repaired one: by which figure, and by how much."""
    better = {
        "points lost": min, "recalibrated: points lost": min, "drift of features": min,
        "recalibrated: drift of features": min, "eager, faster": max, "ONNX Runtime, faster": max, "CPU s": min,
    }  # fmt: skip
    rows = []
    for name in argument.split(" "):
        for sheet in results[name].sheets:
            for budget in dict.fromkeys(cells["budget"] for cells in _records(sheet)):
                own, others = _at(sheet, budget)
                for heading, best in better.items():
                    ours = own.get(heading.removeprefix("recalibrated: "), "-")
                    ahead = [way for way in others if _beats(way.get(heading, "-"), ours, best)]
                    if ahead:
                        first = best(ahead, key=lambda way: _value(way[heading]))
                        rows.append([sheet.title, budget, heading, ours, f"{first['way']}: {first[heading]}",
                                     first["accuracy"], str(len(ahead))])  # fmt: skip
    headings = ["network", "budget", "figure", "convsplit, repaired", "best of the others", "its accuracy", "ahead"]
    return Table(headings, rows, frozenset({"network", "budget", "figure", "best of the others"})).markdown()


def points(results: dict[str, Result], name: str) -> str:
    """Points of accuracy lost: a row for each budget, a column for each network and way."""
    lost: dict[str, dict[str, str]] = {}
    for cells in _records(results[name].sheets[0]):
        column = f"{cells['network']}: {cells['way']}"
        lost.setdefault(_percent(cells["kept"]), {})[column] = cells["points lost"]
    columns = list(dict.fromkeys(column for row in lost.values() for column in row))
    rows = [[kept, *(row.get(column, "-") for column in columns)] for kept, row in lost.items()]
    return Table(["kept", *columns], rows, frozenset()).markdown()


def drifts(results: dict[str, Result], name: str) -> str:
    """How far outputs move with each budget, and what that does to classes."""
    rows = [[_percent(cells["kept"]), cells["drift"], cells["agreement"], cells["points lost"]]
            for cells in _records(results[name].sheets[0])]  # fmt: skip
    return Table(["weights kept", "output drift", "same top-1 class", "points lost"], rows, frozenset()).markdown()


def ways_back(results: dict[str, Result], argument: str) -> str:
    """Points of accuracy lost on each way back, means over seeds, of every run of the suite of finetuning so far."""
    from benchmarks.suites import finetuning

    shown = ["converted, no data", "refitted", "refitted, distilled", "from scratch, labels"]
    table = finetuning.table(finetuning.known())
    lost: dict[tuple[str, str], dict[str, str]] = {}
    for row in table.rows:
        cells = dict(zip(table.headings, row, strict=True))
        seeds = len(cells["by seed"].split())
        of = f"{cells['points lost']} ({seeds})" if seeds > 1 else cells["points lost"]
        lost.setdefault((cells["network"], _percent(cells["kept"])), {})[cells["way"]] = of
    rows = [[*case, *(row.get(way, "-") for way in shown)] for case, row in lost.items()]
    return Table(["network", "kept", *shown], rows, frozenset({"network"})).markdown()


IN_LATENCIES = [
    "budget", "batch", "runtime", "threads", "split", "MACs of convs", "ms of convs", "MACs", "ms", "->", "faster",
    "of promised",
]  # fmt: skip


def latencies(results: dict[str, Result], argument: str) -> str:
    """Whole networks, dense and converted, of several results of the suite of latency, `FILE FILE ...`."""
    sheets = [sheet for name in argument.split(" ") for sheet in results[name].sheets]
    rows = [[sheet.title.partition(",")[0], *(cells[heading] for heading in IN_LATENCIES)]
            for sheet in sheets for cells in _records(sheet)]  # fmt: skip
    return Table(["network", *IN_LATENCIES], rows, frozenset({"network", "budget", "runtime"})).markdown()


def _percent(fraction: str) -> str:
    return f"{100 * float(fraction):g} %"


def conditions(results: dict[str, Result], name: str) -> str:
    return results[name].conditions()


def _records(sheet: Sheet) -> list[dict[str, str]]:
    return [dict(zip(sheet.table.headings, row, strict=True)) for row in sheet.table.rows]


def _at(sheet: Sheet, budget: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """convsplit's repaired row of a budget, and those of the other packages and methods."""
    rows = [cells for cells in _records(sheet) if cells["budget"] == budget]
    own = next(cells for cells in rows if cells["way"] == "convsplit, repaired")
    return own, [cells for cells in rows if not cells["way"].startswith(("convsplit", "dense"))]


def _value(cell: str) -> float:
    from benchmarks.results import number

    return value if (value := number(cell)) is not None else float("nan")


def _beats(theirs: str, ours: str, best: Callable[..., float]) -> bool:
    return _value(theirs) < _value(ours) if best is min else _value(theirs) > _value(ours)


TABLES: dict[str, Callable[[dict[str, Result], str], str]] = {
    "whole": whole, "sheet": sheet, "kept": kept, "short": short, "losses": losses, "points": points, "drifts": drifts,
    "ways_back": ways_back, "latencies": latencies, "conditions": conditions,
}  # fmt: skip
