"""Groups of arguments that commands share, and the values they stand for."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convsplit.api import study
from convsplit.choose.budget import KINDS, MINIMISED, Budget
from convsplit.choose.plan import Plan
from convsplit.cli.inputs import read_inputs
from convsplit.cli.models import argument, imported, load_model
from convsplit.cli.parser import did_you_mean
from convsplit.cli.sources import EXAMPLES
from convsplit.forms import KNOWN
from convsplit.measure.speed import PREFERENCES
from convsplit.measure.stopwatch import Stopwatch
from convsplit.model.running import moved
from convsplit.report.found import Found
from convsplit.runtimes import RUNTIMES
from convsplit.studies import Study

TARGETS = ("drift", "agreement", "lost")


def model_arguments(parser: ArgumentParser) -> None:
    """The model, its arguments and weights."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "model", metavar="MODEL",
        help="package.module:callable, such as my_package.nets:build; or a library's own, such as "
        + ", ".join(EXAMPLES.values()),
    )  # fmt: skip
    group.add_argument(
        "--model-arg", metavar="NAME=VALUE", action="append", default=[], type=_checked(argument),
        help="keyword argument of the callable; may be repeated",
    )  # fmt: skip
    group.add_argument("--weights", metavar="FILE", type=Path, help=".safetensors, or a checkpoint of plain tensors")
    group.add_argument("--download", action="store_true", help="let the library fetch what is not on this disk")
    group.add_argument(
        "--device", metavar="NAME", type=device, default=torch.device("cpu"), help="where it runs, such as cuda (cpu)"
    )


def input_arguments(parser: ArgumentParser) -> None:
    """What the model is called with."""
    group = parser.add_argument_group("inputs")
    group.add_argument(
        "--input", metavar="SOURCE", action="append", default=[],
        help="a shape (1x3x224x224), a .npy, .npz or .pt file, FILE.npz:KEY, or a folder of images; repeat it for "
        "several arguments, name them as x=1x3x32x32",
    )  # fmt: skip
    group.add_argument("--batch", metavar="N", type=_positive, default=32, help="inputs run at once (32)")
    group.add_argument("--limit", metavar="N", type=_positive, help="use the first N inputs only")
    group.add_argument("--image-size", metavar="N", type=_positive, default=224, help="for folders of images (224)")


def calibration_argument(parser: ArgumentParser) -> None:
    """What ranks are chosen on and the result is repaired with."""
    parser.add_argument(
        "--calibrate", metavar="SOURCE", action="append", default=[],
        help="unlabelled inputs, as for --input: ranks go by the outputs' error, and the result is repaired",
    )  # fmt: skip


def choice_arguments(parser: ArgumentParser) -> None:
    """What is split, and how far."""
    group = parser.add_argument_group("choice")
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--budget", metavar="KIND=FRACTION", type=budget,
        help="params=0.5, macs=0.3, latency=0.5 or error=0.05; with ,of=model of the whole model (params=0.5)",
    )  # fmt: skip
    how.add_argument(
        "--target", metavar="KIND=VALUE", type=target,
        help="what may be lost, measured on a third of --calibrate: drift=0.02, agreement=0.99, lost=0.01 (--metric)",
    )  # fmt: skip
    how.add_argument("--rank", metavar="N", type=_positive, help="the same rank in every layer")
    how.add_argument("--exact", action="store_true", help="an exact rewriting, whatever it costs")
    group.add_argument(
        "--prefer", choices=PREFERENCES, default="accuracy", help="speed: only what is measured faster (accuracy)"
    )
    runtime_argument(group)
    how.add_argument("--plan", metavar="FILE", type=Path, help="use this plan, as written by `convsplit plan --out`")
    group.add_argument(
        "--minimise", choices=MINIMISED, default="params", help="for --target: what to make small (params)"
    )
    group.add_argument(
        "--metric",
        metavar="package.module:function",
        help="for --target lost=: of a model, a number; higher is better",
    )
    group.add_argument("--lower-is-better", action="store_true", help="--metric is an error or a loss")
    group.add_argument(
        "--relative", action="store_true", help="--target lost= is a fraction of the model's own metric"
    )
    forms_arguments(parser)


def runtime_argument(group: Any) -> None:
    """Where time is measured."""
    group.add_argument("--runtime", choices=RUNTIMES, default="torch", help="where milliseconds are measured (torch)")


def forms_arguments(parser: ArgumentParser) -> None:
    """Limits of the choice."""
    group = parser.add_argument_group("limits")
    group.add_argument("--forms", type=forms, help=f"only these ({','.join(KNOWN)})")
    group.add_argument(
        "--skip", metavar="NAME", action="append", default=[], help="leave this layer alone; a pattern; repeatable"
    )
    group.add_argument("--linear", action="store_true", help="also split linear layers")


def seed_argument(parser: ArgumentParser) -> None:
    """The one number all randomness comes from."""
    parser.add_argument("--seed", type=int, default=0, help="of the factorisation and of random inputs (0)")


def out_argument(what: str, *, required: bool = False) -> Any:
    """The argument --out, said to be `what`."""
    return lambda parser: parser.add_argument("--out", metavar="FILE", type=Path, help=what, required=required)


def output_arguments(parser: ArgumentParser) -> None:
    """How results are shown."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def model_of(args: Namespace) -> nn.Module:
    """The model a command line names, on its device."""
    model = load_model(args.model, dict(args.model_arg), args.weights, download=args.download)
    model.to(args.device)  # not chained: a model's own may return nothing
    return model


def inputs_of(args: Namespace) -> list[Any]:
    """The batches a command line names."""
    return _batches_of(args, args.input)


def _batches_of(args: Namespace, sources: list[str]) -> list[Any]:
    batches = read_inputs(sources, batch=args.batch, limit=args.limit, size=args.image_size, seed=args.seed)
    return [moved(batch, args.device) for batch in batches]


def required_inputs_of(args: Namespace) -> list[Any]:
    """Likewise, for commands that have to run the model."""
    if not args.input:
        args.parser.error("this command runs the model: give --input, such as --input 1x3x224x224")
    return inputs_of(args)


def progress_of(args: Namespace) -> bool | None:
    """Whether to show a progress bar: no, or on a terminal."""
    return False if args.quiet else None


def study_of(args: Namespace, model: nn.Module, inputs: list[Any]) -> Study[nn.Module]:
    """What a command line asks to be known of a model."""
    calibration = _batches_of(args, args.calibrate)
    return study(
        model, inputs[0] if inputs else None, calibration=calibration or None, forms=args.forms, skip=args.skip,
        linear=args.linear, seed=args.seed, progress=progress_of(args),
    )  # fmt: skip


def plan_of(args: Namespace, known: Study[nn.Module]) -> Plan:
    """The plan a command line names or describes."""
    if args.plan is not None:
        return Plan.load(args.plan)
    return known.plan(
        quality_of(args) or args.budget, rank=args.rank, exact=args.exact, prefer=args.prefer,
        stopwatch=Stopwatch(runtime=args.runtime),
    )  # fmt: skip


def found_of(args: Namespace, known: Study[nn.Module]) -> Found | None:
    """What is found for the --target of a command line, if there is one.

    Raises:
        ValueError: it cannot be met.
    """
    quality = quality_of(args)
    if quality is None:
        return None
    return known.search(quality, prefer=args.prefer, stopwatch=Stopwatch(runtime=args.runtime)).checked()


def quality_of(args: Namespace) -> Budget | None:
    """The budget of quality a command line asks for, if it does."""
    if args.target is None:
        if args.metric is not None:
            args.parser.error("--metric needs to know how much may be lost: --target lost=0.01")
        return None
    kind, value = args.target
    if kind != "lost":
        return Budget(**{kind: value}, minimise=args.minimise)
    if args.metric is None:
        args.parser.error("--target lost= is of a metric: say --metric package.module:function")
    metric = imported(args.metric, "metric", "my_package.validation:accuracy")
    return Budget(
        metric=metric,
        lost=value,
        relative=args.relative,
        lower_is_better=args.lower_is_better,
        minimise=args.minimise,
    )


def target(text: str) -> tuple[str, float]:
    """Read `agreement=0.99`."""
    key, equals, value = text.partition("=")
    if not equals or key not in TARGETS:
        raise ArgumentTypeError(f"{text!r}: want {'=, '.join(TARGETS)}= with a number{did_you_mean(key, TARGETS)}")
    return key, _number(value)


def budget(text: str) -> Budget:
    """Read `params=0.5` or `params=0.5,of=model`."""
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in (*KINDS, "of"):
            near = did_you_mean(key, KINDS)
            raise ArgumentTypeError(f"{part!r}: want {'=, '.join(KINDS)}= with a fraction: params=0.5{near}")
        given[key] = value if key == "of" else _number(value)
    try:
        return Budget(**given)
    except (ValueError, TypeError) as error:
        raise ArgumentTypeError(str(error)) from error


def device(text: str) -> torch.device:
    """Read `cuda` or `cuda:1`, of a device that is here."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentTypeError(f"{text!r} is no device of this machine: {str(error).splitlines()[0]}") from error
    return found


def forms(text: str) -> tuple[str, ...]:
    """Read `dw-pw,pw-dw-pw`."""
    names = tuple(text.split(","))
    for name in names:
        if name not in KNOWN:
            near = did_you_mean(name, KNOWN)
            raise ArgumentTypeError(f"unknown form {name!r}; the forms are {', '.join(KNOWN)}{near}")
    return names


def runtimes(text: str) -> tuple[str, ...]:
    """Read `onnxruntime,openvino,torch`."""
    names = tuple(text.split(","))
    for name in names:
        if name not in RUNTIMES:
            near = did_you_mean(name, RUNTIMES)
            raise ArgumentTypeError(f"unknown runtime {name!r}; the runtimes are {', '.join(RUNTIMES)}{near}")
    return names


def axes(text: str) -> tuple[int, ...]:
    """Read `0,2,3`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: want numbers of dimensions, such as 0 or 0,2,3") from error


def fractions(text: str) -> tuple[float, ...]:
    """Read `0.75,0.5,0.25`."""
    return tuple(_number(part) for part in text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    """Read `1,8`."""
    return tuple(_positive(part) for part in text.split(","))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a number") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}: want a whole number above 0")
    return int(text)


def _checked(read: Any) -> Any:
    """Let argparse print the message of a ValueError instead of its own."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked
