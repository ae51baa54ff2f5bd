"""The commands. Each parses nothing and computes nothing: it calls the API and shows what comes back."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import convsplit.api as api
from convsplit.choose.budget import Budget
from convsplit.choose.plan import Plan
from convsplit.cli.arguments import (
    axes,
    calibration_argument,
    choice_arguments,
    forms_arguments,
    found_of,
    fractions,
    input_arguments,
    inputs_of,
    model_arguments,
    model_of,
    numbers,
    out_argument,
    output_arguments,
    plan_of,
    progress_of,
    required_inputs_of,
    runtimes,
    seed_argument,
    study_of,
)
from convsplit.cli.completion import SHELLS, completion_script
from convsplit.cli.inspection import inspect_file
from convsplit.cli.output import print_json, terminal_width, write, write_whole
from convsplit.cli.parser import command
from convsplit.cli.sources import source_of
from convsplit.exports import SUFFIXES
from convsplit.exports import export as export_model
from convsplit.layers.separable import SeparableConv
from convsplit.measure.bench import LAYOUTS, Bench
from convsplit.measure.speed import PREFERENCES
from convsplit.model.running import moved
from convsplit.repair.refitting import refit as refit_layers
from convsplit.report import Frontier, compare
from convsplit.rewrite import merge as merge_layers
from convsplit.runtimes import RUNTIMES
from convsplit.storage import load, save
from convsplit.studies import BUDGETS
from convsplit.tables import Table, count, share

WEIGHT_FILES = (".safetensors", ".pt", ".pth")


@command(
    model_arguments, choice_arguments, input_arguments, calibration_argument, seed_argument,
    out_argument("write the plan as JSON"), output_arguments,
)  # fmt: skip
def plan(args: Namespace) -> None:
    """Say what would become of every convolution.

    example: convsplit plan torchvision.models:resnet18 --budget params=0.5 --input 1x3x224x224
    """
    made = plan_of(args, study_of(args, model_of(args), inputs_of(args)))
    if args.out:
        write(args.out, made.to_json() + "\n")
    print(made.to_json() if args.json else _shown(made))


@command(
    model_arguments, choice_arguments, input_arguments, calibration_argument, seed_argument,
    out_argument("the converted model, .safetensors or what its library keeps", required=True), output_arguments,
)  # fmt: skip
def convert(args: Namespace) -> None:
    """Split the convolutions of a model and write it to a file.

    Read the file back with convsplit.load(FILE, model). Models of ultralytics may also go to a .pt file, those of
    transformers, diffusers and smp to a folder, which the library opens itself; a .onnx file becomes another one. With
    --target agreement=0.99 the smallest model is searched for that gives 99 % of the inputs of --calibrate the same
    class.

    example: convsplit convert torchvision.models:resnet18 --weights r18.pth --out smaller.safetensors
    """
    keep = keeping(args.model, args.out)
    started = time.perf_counter()
    known = study_of(args, model_of(args), inputs_of(args))
    found = found_of(args, known)
    chosen = plan_of(args, known) if found is None else found.plan
    converted = known.apply(chosen) if found is None else found.model
    converted.cpu()
    keep(converted, moved(known.example_inputs, "cpu"))
    seconds = time.perf_counter() - started
    if args.json:
        searched = {} if found is None else {"search": json.loads(found.to_json())}
        print_json(
            {"out": str(args.out), "seconds": seconds, "split": len(chosen.split), **chosen.totals(), **searched}
        )
    else:
        tried = "" if found is None else f"\n\n{found.text(terminal_width())}"
        print(f"{_shown(chosen)}{tried}\n\nwritten to {args.out} in {seconds:.1f} s")


def keeping(where: str, out: Path) -> Callable[[nn.Module, Any], object]:
    """How a converted model is written: in a file of convsplit's, or as the library that it comes from does.

    Raises:
        ValueError: `out` ends in nothing that is known.
    """
    found = source_of(where)
    if found is not None and found[0].suffix == out.suffix:
        return lambda converted, example_inputs: found[0].keep(converted, out, found[1], example_inputs)
    own = [] if found is None or found[0].suffix is None else [found[0].suffix or "no suffix, for a folder"]
    _check_suffix(out, (".safetensors", *own))
    return lambda converted, _: save(converted, out)


def _converted_argument(parser: ArgumentParser) -> None:
    parser.add_argument("converted", metavar="CONVERTED", nargs="?", type=Path, help="written by `convsplit convert`")


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page to look at")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write Markdown, for pull requests")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write one line per layer")
    parser.add_argument("--time", action="store_true", help="also measure the milliseconds of both models")


@command(
    model_arguments, _converted_argument, choice_arguments, input_arguments, calibration_argument, _report_arguments,
    seed_argument, out_argument("write the report as JSON"), output_arguments,
)  # fmt: skip
def report(args: Namespace) -> None:
    """Measure what a conversion saved and how far it moved the output.

    Without CONVERTED the model is converted first, as --budget and the others say; with --target the page also shows
    what was tried.

    example: convsplit report torchvision.models:resnet18 smaller.safetensors --input photos/ --html r.html
    """
    inputs, model = required_inputs_of(args), model_of(args)
    converted, tried = _converted(args, model, inputs)
    made = compare(converted, model, inputs, time=args.time, runtime=args.runtime, progress=progress_of(args))
    for path, text in ((args.out, made.to_json), (args.markdown, made.to_markdown), (args.csv, made.to_csv)):
        if path:
            write(path, text())
    if args.html:
        write_whole(args.html, partial(made.to_html, frontier=tried))
    print(made.to_json() if args.json else made.text(terminal_width()))


def _converted(args: Namespace, model: nn.Module, inputs: list[object]) -> tuple[nn.Module, Frontier | None]:
    """The conversion that is reported, and the curve of those that were tried where a target was searched for."""
    if args.converted is not None:
        return load(args.converted, model), None
    known = study_of(args, model, inputs)
    found = found_of(args, known)
    return (known.apply(plan_of(args, known)), None) if found is None else (found.model, found.frontier)


@command(
    model_arguments, lambda parser: parser.add_argument("converted", metavar="CONVERTED", type=Path),
    input_arguments, seed_argument, out_argument("the repaired model, .safetensors", required=True), output_arguments,
)  # fmt: skip
def refit(args: Namespace) -> None:
    """Repair a converted model from unlabelled inputs, and write it to a file.

    example: convsplit refit torchvision.models:resnet18 smaller.safetensors --input photos/ --out repaired.safetensors
    """
    _check_suffix(args.out, (".safetensors",))
    inputs, model = required_inputs_of(args), model_of(args)
    converted = load(args.converted, model)
    repaired = refit_layers(converted, model, inputs, seed=args.seed, progress=progress_of(args))
    save(converted, args.out)
    if args.json:
        print_json({"out": str(args.out), "layers": [asdict(layer) for layer in repaired]})
    else:
        rows = [[layer.name, share(layer.before), share(layer.after)] for layer in repaired]
        print(Table(["layer", "squared error before", "after"], rows, frozenset({"layer"})).text(terminal_width()))
        print(f"written to {args.out}")


@command(
    model_arguments, lambda parser: parser.add_argument("converted", metavar="CONVERTED", type=Path),
    out_argument("weights of the dense model: .safetensors, .pt or .pth", required=True), output_arguments,
)  # fmt: skip
def merge(args: Namespace) -> None:
    """Turn a converted model back into one of plain convolutions, and write its weights.

    example: convsplit merge torchvision.models:resnet18 smaller.safetensors --out dense.safetensors
    """
    _check_suffix(args.out, WEIGHT_FILES)
    converted = load(args.converted, model_of(args))
    layers = sum(isinstance(module, SeparableConv) for module in converted.modules())
    state = {key: value.contiguous().clone() for key, value in merge_layers(converted).state_dict().items()}
    store = save_file if args.out.suffix == ".safetensors" else torch.save
    write_whole(args.out, lambda path: store(state, path))
    params = sum(value.numel() for value in state.values())
    if args.json:
        print_json({"out": str(args.out), "merged": layers, "numbers": params})
    else:
        print(f"{layers} layers merged, {count(params)} numbers written to {args.out}")


def _export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--runtime", choices=tuple(SUFFIXES), default="onnxruntime", help="what is to run the file (onnxruntime)"
    )
    parser.add_argument(
        "--dynamic", metavar="AXIS,AXIS,...", type=axes, default=(), help="dimensions that may vary: 0 is the batch"
    )


@command(
    model_arguments, _converted_argument, input_arguments, _export_arguments, seed_argument,
    out_argument("the file: .onnx, .xml for openvino, .pt2 for torch", required=True), output_arguments,
)  # fmt: skip
def export(args: Namespace) -> None:
    """Write a converted model as a file for another runtime, and check what the file computes.

    Without CONVERTED the model itself is written, its batch norm folded.

    example: convsplit export torchvision.models:resnet18 smaller.safetensors --input 1x3x224x224 --out smaller.onnx
    """
    inputs, model = required_inputs_of(args), model_of(args)
    converted = model if args.converted is None else load(args.converted, model)
    done = export_model(converted, args.out, inputs[0], runtime=args.runtime, dynamic=args.dynamic)
    if args.json:
        print_json({**asdict(done), "path": str(done.path), "files": [str(file) for file in done.files]})
    else:
        print(f"written to {done}")


def _frontier_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("choice")
    group.add_argument(
        "--budgets", metavar="F,F,...", type=fractions, default=BUDGETS,
        help=f"fractions to keep ({','.join(map(str, BUDGETS))})",
    )  # fmt: skip
    group.add_argument("--kind", choices=("params", "macs", "error"), default="params", help="of what (params)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write one line per budget")


@command(
    model_arguments, input_arguments, calibration_argument, _frontier_arguments, forms_arguments, seed_argument,
    out_argument("write the curve as JSON"), output_arguments,
)  # fmt: skip
def frontier(args: Namespace) -> None:
    """Show the whole curve of budget against drift, and suggest where to stop.

    Without --input only predicted errors are given.

    example: convsplit frontier torchvision.models:resnet18 --budgets 0.75,0.5,0.25 --input photos/
    """
    inputs = inputs_of(args)
    known = study_of(args, model_of(args), inputs)
    _publish(known.frontier(inputs or None, budgets=args.budgets, kind=args.kind), args)


def _publish(made: Frontier | Bench, args: Namespace) -> None:
    """Print the result, and write the files that were asked for."""
    if args.out:
        write(args.out, made.to_json() + "\n")
    if args.csv:
        write(args.csv, made.to_csv())
    print(made.to_json() if args.json else made.text(terminal_width()))


def _bench_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("cases")
    group.add_argument(
        "--budgets", metavar="F,F,...", type=fractions, default=(0.5, 0.25), help="fractions to keep (0.5,0.25)"
    )
    group.add_argument("--kind", choices=("params", "macs", "latency"), default="macs", help="of what (macs)")
    group.add_argument("--batches", metavar="N,N,...", type=numbers, default=(1, 8), help="images at once (1,8)")
    group.add_argument("--threads", metavar="N,N,...", type=numbers, help="CPU threads (one, and all there are)")
    group.add_argument("--layout", choices=LAYOUTS, help="only this memory layout (both)")
    group.add_argument(
        "--runtime",
        metavar="NAME,NAME,...",
        type=runtimes,
        default=("torch",),
        help=f"of {', '.join(RUNTIMES)} (torch)",
    )
    group.add_argument("--deployed", action="store_true", help="fold batch norm in both models first")
    group.add_argument("--prefer", choices=PREFERENCES, default="speed", help="speed: only what is faster (speed)")
    group.add_argument("--seconds", metavar="S", type=float, default=20.0, help="for the layers of each case (20)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write one line per row")


@command(
    model_arguments, input_arguments, _bench_arguments, forms_arguments, seed_argument,
    out_argument("write the figures as JSON"), output_arguments,
)  # fmt: skip
def bench(args: Namespace) -> None:
    """Measure on this machine what conversion gains: dense against converted at several budgets.

    example: convsplit bench torchvision.models:resnet18 --input 1x3x224x224 --runtime onnxruntime,openvino,torch
    """
    inputs, model = required_inputs_of(args), model_of(args)
    made = api.bench(
        model, inputs[0], budgets=[Budget.of_kind(args.kind, each) for each in args.budgets], batch_sizes=args.batches,
        threads=args.threads, layouts=[args.layout] if args.layout else LAYOUTS, runtimes=args.runtime,
        prefer=args.prefer, forms=args.forms, skip=args.skip, deployed=args.deployed, seconds=args.seconds,
        progress=progress_of(args),
    )  # fmt: skip
    _publish(made, args)


@command(lambda parser: parser.add_argument("file", metavar="FILE", type=Path), output_arguments)
def inspect(args: Namespace) -> None:
    """Show what is in a converted model's file, a plan or a report, without the model.

    example: convsplit inspect smaller.safetensors
    """
    found = inspect_file(args.file)
    if args.json:
        print_json(found.data)
    else:
        print(found.text(terminal_width()))


@command(lambda parser: parser.add_argument("shell", choices=SHELLS))
def completion(args: Namespace) -> None:
    """Print the completion script of a shell.

    bash: source <(convsplit completion bash)
    zsh:  source <(convsplit completion zsh)
    fish: convsplit completion fish | source
    """
    print(completion_script(args.shell))


def _shown(made: Plan) -> str:
    return f"{made.table().text(terminal_width())}\n\n{made.summary()}"


def _check_suffix(path: Path, wanted: tuple[str, ...]) -> None:
    if path.suffix not in wanted:
        raise ValueError(f"--out {path}: want a name that ends in {' or '.join(wanted)}")
