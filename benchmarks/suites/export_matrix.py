"""Which converted model takes which path out of eager PyTorch, as a table: the pairs of tests/export_paths.py.

    python -m benchmarks export_matrix                  # what was not run yet
    python -m benchmarks export_matrix --again small    # one model anew

Every result is kept in results/export_matrix.json at once, so a run may be stopped and continued (not with --quick). A
path that fails is tried with the dense model too, which tells whose limit it is.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.clock import timed
from benchmarks.results import STORED, Sheet
from benchmarks.subjects import ROOT
from convsplit.tables import Table

sys.path.insert(0, str(ROOT / "tests"))

import export_paths as paths

RESULTS = STORED / "export_matrix.json"
Cells = dict[str, dict[str, str | float]]


def result(name: str, path: str) -> dict[str, str | float]:
    """One cell: what failed with the converted model and with the dense one, empty where nothing did."""
    args = paths.args_for(name)
    work = timed(lambda: paths.attempt(paths.converted(name), path, args))
    failed, seconds = work.result, round(work.seconds, 1)
    dense = paths.attempt(paths.dense(name), path, args) if failed else ""
    return {"failed": failed, "dense": dense, "seconds": seconds}


def sheet(results: Cells) -> Sheet:
    """The table, and below it the reasons of what does not work."""
    names = list(paths.BUILDERS)
    rows = [[path, *(_cell(results, name, path) for name in names)] for path in paths.PATHS]
    reasons = [f"- {key}: {cell['failed']}" for key, cell in sorted(results.items()) if cell["failed"]]
    table = Table(["path", *names], rows, frozenset({"path", *names}))
    return Sheet("paths", table, ["path"], notes="\n".join([_LEGEND, "", "Reasons:", "", *reasons]))


_LEGEND = (
    "`works`: the result equals that of the converted model in eager mode (to 1e-4 of the largest value; bfloat16 "
    "to 0.1; eight bits to a cosine similarity of 0.9). `as dense`: fails, and so does the model before conversion. "
    "`fails`: only the converted model fails. `-`: not run, see NOT_RUN in tests/export_paths.py or not yet run."
)


def _cell(results: Cells, name: str, path: str) -> str:
    cell = results.get(f"{name} {path}")
    if cell is None:
        return "-"
    return "works" if not cell["failed"] else "as dense" if cell["dense"] else "**fails**"


def options(parser: ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", default=list(paths.BUILDERS), help="default: all of them")
    parser.add_argument("--paths", nargs="+", default=list(paths.PATHS), help="default: all of them")
    parser.add_argument("--again", action="store_true", help="also what was run before")
    parser.add_argument("--cells", type=Path, default=RESULTS, help="where every result is kept at once")


QUICK = {"models": ["small"], "paths": list(paths.PATHS)[:3], "cells": None}


def measure(chosen: Namespace) -> Iterator[Sheet]:
    torch.set_num_threads(1)
    known: Cells = json.loads(chosen.cells.read_text()) if chosen.cells and chosen.cells.exists() else {}
    for name in chosen.models:
        for path in chosen.paths:
            key = f"{name} {path}"
            if (name, path) in paths.NOT_RUN or (key in known and not chosen.again):
                continue
            known[key] = cell = result(name, path)
            print(f"{key}: {cell['failed'] or 'works'} ({cell['seconds']} s)", file=sys.stderr, flush=True)
            if chosen.cells:
                chosen.cells.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    yield sheet(known)
