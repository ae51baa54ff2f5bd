"""Which converted model takes which path out of eager PyTorch, as a table: the pairs of tests/export_paths.py.

    python benchmarks/export_matrix.py                  # what was not run yet
    python benchmarks/export_matrix.py --again small    # one model anew

Every result is kept in results/export_matrix.json at once, so a run may be stopped and continued; the table is
results/export_matrix.md. A path that fails is tried with the dense model too, which tells whose limit it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "tests"))

import export_paths as paths  # noqa: E402 (it lives with the tests)

RESULTS = ROOT / "results" / "export_matrix.json"
PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "torchao")


def result(name: str, path: str) -> dict[str, str | float]:
    """One cell: what failed with the converted model and with the dense one, empty where nothing did."""
    start, args = time.perf_counter(), paths.args_for(name)
    failed = paths.attempt(paths.converted(name), path, args)
    seconds = round(time.perf_counter() - start, 1)
    dense = paths.attempt(paths.dense(name), path, args) if failed else ""
    return {"failed": failed, "dense": dense, "seconds": seconds}


def markdown(results: dict[str, dict[str, str | float]]) -> str:
    """The table, and below it the reasons of what does not work."""
    names = list(paths.BUILDERS)
    lines = ["# Paths that converted models take", "", _versions(), "", _LEGEND, ""]
    lines += ["| path | " + " | ".join(names) + " |", "|:---" * (len(names) + 1) + "|"]
    for path in paths.PATHS:
        lines.append(f"| {path} | " + " | ".join(_cell(results, name, path) for name in names) + " |")
    lines += ["", "## Reasons", ""]
    lines += [f"- {key}: {cell['failed']}" for key, cell in sorted(results.items()) if cell["failed"]]
    return "\n".join(lines) + "\n"


_LEGEND = (
    "`works`: the result equals that of the converted model in eager mode (to 1e-4 of the largest value; bfloat16 "
    "to 0.1; eight bits to a cosine similarity of 0.9). `as dense`: fails, and so does the model before conversion. "
    "`fails`: only the converted model fails. `-`: not run, see NOT_RUN in tests/export_paths.py or not yet run."
)


def _versions() -> str:
    return "Versions: " + ", ".join(f"{package} {version(package)}" for package in PACKAGES) + "."


def _cell(results: dict[str, dict[str, str | float]], name: str, path: str) -> str:
    cell = results.get(f"{name} {path}")
    if cell is None:
        return "-"
    return "works" if not cell["failed"] else "as dense" if cell["dense"] else "**fails**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(paths.BUILDERS), help="default: all of them")
    parser.add_argument("--paths", nargs="+", default=list(paths.PATHS), help="default: all of them")
    parser.add_argument("--again", action="store_true", help="also what was run before")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.models:
        for path in chosen.paths:
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            key = f"{name} {path}"
            if (name, path) in paths.NOT_RUN or (key in results and not chosen.again):
                continue
            cell = result(name, path)
            print(f"{key}: {cell['failed'] or 'works'} ({cell['seconds']} s)", flush=True)
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps(results | {key: cell}, indent=1, sort_keys=True) + "\n")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
