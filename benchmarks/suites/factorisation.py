"""CP of kernels: error against seconds for tensorly's parafac, tensorly-torch and convsplit, and whole conversions.

    python -m benchmarks factorisation [NETWORKS.py] [--parts trained curve large whole widest alternatives]

trained   every 3 x 3 layer shape of the trained networks at a half and a quarter of its parameters: relative error of
          parafac (500 iterations, best of 3 starts), of the two SVD forms and of convsplit, at equal parameters
curve     error that the curve of a layer predicts between its short fits, against the final fit there
large     512 x 512 x 3 x 3 at R = 516: seconds until parafac's error is reached
whole     convert(resnet50) and convert(vgg16) at half the parameters, random weights
alternatives  other structures of few parameters, and CP, all fitted in the same way: L-BFGS, best of 3 random starts
widest    2048 x 2048 x 3 x 3 at R = 1024: seconds and the peak of memory

NETWORKS.py as in benchmarks/subjects.py.
"""

from __future__ import annotations

import resource
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor, nn

import convsplit
from benchmarks.baselines.tensors import parafac_error
from benchmarks.clock import timed
from benchmarks.results import ERROR, FASTER, Sheet
from benchmarks.subjects import add_options, subjects
from convsplit.forms import FORMS
from convsplit.lowrank import cp, cp_curve
from convsplit.spec import ConvSpec
from convsplit.tables import Table

STARTS, ITERATIONS = 3, 500


def options(parser: ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--parts", nargs="+", default=list(parts()), choices=list(parts()))
    parser.add_argument("--starts", type=int, default=3, help="of parafac and of the other structures")
    parser.add_argument("--iterations", type=int, default=500, help="of parafac")


QUICK = {"parts": ["trained"], "starts": 1, "iterations": 25}


def parts() -> dict[str, Callable[[Namespace], Sheet]]:
    return {
        "trained": trained, "curve": curve, "large": large, "whole": whole, "widest": widest,
        "alternatives": alternatives,
    }  # fmt: skip


def measure(arguments: Namespace) -> Iterator[Sheet]:
    for name in arguments.parts:
        yield parts()[name](arguments)


def kernels(arguments: Namespace) -> Iterator[tuple[str, nn.Conv2d]]:
    """The first and the last trained layer of every shape."""
    for subject in subjects(arguments):
        layers: dict[torch.Size, list[tuple[str, nn.Conv2d]]] = {}
        for name, module in subject.model.named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels > 1:
                layers.setdefault(module.weight.shape, []).append((f"{subject.name} {name}", module))
        for each in layers.values():
            yield from dict.fromkeys([each[0], each[-1]])


def rank_of(spec: ConvSpec, kept: float) -> int:
    """The CP rank with that fraction of the parameters."""
    O, I, K = spec.out_channels, spec.in_channels, spec.positions
    return max(1, int(kept * O * I * K / (O + I + K)))


def trained(arguments: Namespace) -> Sheet:
    rows = []
    for name, conv in kernels(arguments):
        spec = ConvSpec.of(conv)
        kernel = conv.weight.detach().flatten(2)
        for kept in (0.5, 0.25):
            rank = rank_of(spec, kept)
            params = FORMS["pw-dw-pw"].params(spec, rank)
            svd = []
            for form in (FORMS["dw-pw"], FORMS["pw-dw"]):
                components = params // form.params(spec, 1)
                svd.append(form.curve(kernel[None], [components]).errors[0] if components else 1.0)
            effort = {"starts": arguments.starts, "iterations": arguments.iterations}
            slow = timed(lambda: parafac_error(kernel, rank, **effort))  # noqa: B023
            fast = timed(lambda: cp(kernel[None], rank).error)  # noqa: B023
            theirs, ours = slow.result, fast.result
            rows.append(
                [name, "x".join(map(str, conv.weight.shape)), f"{kept:g}", str(rank), *(f"{e:.4f}" for e in svd),
                 f"{theirs:.4f}", f"{ours:.4f}", f"{ours / theirs - 1:+.2%}", f"{slow.cpu:.2f}", f"{fast.cpu:.2f}"]
            )  # fmt: skip
    headings = [
        "layer", "kernel", "kept", "R", "dw-pw", "pw-dw", "parafac", "convsplit", "difference", "parafac CPU s",
        "convsplit CPU s",
    ]  # fmt: skip
    kinds = dict.fromkeys(["dw-pw", "pw-dw", "convsplit"], ERROR)
    return Sheet("trained", Table(headings, rows, frozenset({"layer", "kernel"})), ["layer", "kept"], kinds)


KEPT = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.65, 0.8)


def curve(arguments: Namespace) -> Sheet:
    rows = []
    for name, conv in kernels(arguments):
        kernel = conv.weight.detach().flatten(2)[None]
        ranks = [rank_of(ConvSpec.of(conv), kept) for kept in KEPT]
        work = timed(lambda: cp_curve(kernel, ranks).errors)  # noqa: B023
        predicted, seconds = work.result, work.seconds
        off = [p / cp(kernel, rank).error - 1 for p, rank in zip(predicted, ranks, strict=True)]
        shape = "x".join(map(str, conv.weight.shape))
        rows.append([name, shape, *(f"{each:+.1%}" for each in off), f"{seconds:.2f}"])
    headings = ["layer", "kernel", *(f"{kept:.0%}" for kept in KEPT), "s"]
    return Sheet("curve", Table(headings, rows, frozenset({"layer", "kernel"})), ["layer"])


def synthetic(out_channels: int, in_channels: int) -> Tensor:
    """A kernel whose spectrum falls like a trained one's: smooth filters, channels mixed with falling weights."""
    torch.manual_seed(0)
    R = max(out_channels, in_channels)
    falling = torch.arange(1, R + 1).float() ** -0.7
    A, B, C = torch.randn(out_channels, R) * falling, torch.randn(in_channels, R), torch.randn(9, R)
    kernel = torch.einsum("or,ir,kr->oik", A, B, C)
    return kernel / kernel.norm() + 0.3 * torch.randn_like(kernel) / kernel.numel() ** 0.5


def large(arguments: Namespace) -> Sheet:
    kernel, rank = synthetic(512, 512), 516
    rows = []
    for iterations in (10, 25):
        slow = timed(lambda: parafac_error(kernel, rank, starts=1, iterations=iterations))  # noqa: B023
        for sweeps in range(1, 60):
            fast = timed(lambda: cp(kernel[None], rank, iterations=sweeps, tolerance=0))  # noqa: B023
            if fast.result.error <= slow.result:
                break
        named = f"parafac, {iterations} iterations"
        figures = [f"{slow.result:.4f}", f"{slow.seconds:.1f}", f"{fast.seconds:.1f}"]
        rows.append([named, *figures, f"{slow.seconds / fast.seconds:.0f}x"])
    rows.append(_tensorly_torch(kernel, rank))
    own = timed(lambda: cp(kernel[None], rank))
    rows.append(["convsplit, its own stop", f"{own.result.error:.4f}", f"{own.seconds:.1f}", "", ""])
    first = "512x512x3x3, R = 516"
    table = Table([first, "error", "s", "convsplit s", "faster"], rows, frozenset({first}))
    return Sheet("large", table, [first], {"error": ERROR, "faster": FASTER})


def _tensorly_torch(kernel: Tensor, rank: int) -> list[str]:
    try:
        import tltorch
    except ImportError:
        return ["tensorly-torch", "not installed", "", "", ""]
    conv = nn.Conv2d(512, 512, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(kernel.reshape(512, 512, 3, 3))
    try:
        work = timed(
            lambda: tltorch.FactorizedConv.from_conv(
                conv, rank=rank, factorization="cp", decompose_weights=True, decomposition_kwargs={"n_iter_max": 10}
            )
        )
        found = work.result.weight.to_tensor()
    except Exception as error:  # whatever it is, it is the figure
        return ["tensorly-torch, 4-way CP", f"{type(error).__name__}: {str(error)[:60]}", "", "", ""]
    miss = float((found - conv.weight).norm() / conv.weight.norm())
    return ["tensorly-torch, 4-way CP, 10 iterations", f"{miss:.4f}", f"{work.seconds:.1f}", "", ""]


def whole(arguments: Namespace) -> Sheet:
    import torchvision

    rows = []
    for name, wanted in (("resnet18", ""), ("resnet50", "10"), ("vgg16", "20")):
        model = torchvision.models.get_model(name, weights=None).eval()
        seconds = sorted(timed(lambda: convsplit.convert(model)).seconds for _ in range(3))  # noqa: B023
        rows.append([name, f"{seconds[1]:.1f}", f"{seconds[0]:.1f}", f"{seconds[2]:.1f}", wanted])
    first = "convert, params=0.5, no data"
    return Sheet("whole", Table([first, "median s", "least", "most", "wanted"], rows, frozenset({first})), [first])


def widest(arguments: Namespace) -> Sheet:
    conv = nn.Conv2d(2048, 2048, 3, bias=False)
    work = timed(lambda: convsplit.SeparableConv2d.from_conv(conv, form="pw-dw-pw", rank=1024))
    with torch.no_grad():
        miss = float((work.result.weight - conv.weight).norm() / conv.weight.norm())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = ["2048x2048x3x3, R = 1024", f"{miss:.4f}", f"{work.seconds:.1f}", f"{peak:.1f}"]
    table = Table(["random kernel", "error", "s", "peak GB, whole process"], [row], frozenset({"random kernel"}))
    return Sheet("widest", table, ["random kernel"], {"error": ERROR})


# Factors as einsum, terms added up: o, i and k are the kernel's, h and w its rows and columns, j is 2 and r as large as
# the parameters allow.
CP = "pw-dw-pw (CP)"
STRUCTURES = {
    CP: ["or,ir,kr->oik"],
    "reduced dw-pw: pw, dw with multiplier 2, pw": ["orj,ir,krj->oik"],
    "reduced pw-dw: pw, dw that adds up pairs, pw": ["or,irj,krj->oik"],
    "pairs of components share a filter": ["orj,irj,kr->oik"],
    "separable filters: pw, k x 1, 1 x k, pw": ["or,ir,hr,wr->oihw"],
}
SUM = {"sum of dw-pw and pw-dw": ["oi,ki->oik", "oi,ko->oik"]}  # each of multiplier 1: of one size only


def alternatives(arguments: Namespace) -> Sheet:
    """Errors at equal parameters."""
    rows = []
    for name, conv in kernels(arguments):
        weight = conv.weight.detach().double()
        O, I, height, width = weight.shape
        if min(O, I) < 16:
            continue
        sizes = {"o": O, "i": I, "k": height * width, "h": height, "w": width, "j": 2}
        both = 2 * O * I + (O + I) * height * width
        for params, structures in (
            (weight.numel() // 4, STRUCTURES),
            (weight.numel() // 2, STRUCTURES),
            (both, {CP: STRUCTURES[CP], **SUM}),
        ):
            errors = {label: fitted(weight, terms, sizes, params) for label, terms in structures.items()}
            rows += [
                [name, f"{params / weight.numel():.2f}", label, f"{error:.4f}", f"{error / errors[CP] - 1:+.1%}"]
                for label, error in errors.items()
            ]
    keys = ["layer", "kept", "structure"]
    table = Table([*keys, "error", "against CP"], rows, frozenset({"layer", "structure"}))
    return Sheet("alternatives", table, keys, {"error": ERROR})


def fitted(weight: Tensor, terms: list[str], sizes: dict[str, int], params: int) -> float:
    """The relative error of the best of 3 fits with at most so many parameters."""
    inputs = [term.split("->")[0].split(",") for term in terms]
    unit = sum(prod(sizes[letter] for letter in factor if letter != "r") for term in inputs for factor in term)
    sizes = sizes | {"r": params // unit}
    target = (weight if terms[0].endswith("hw") else weight.flatten(2)) / weight.norm()
    errors = []
    for seed in range(STARTS):
        torch.manual_seed(seed)
        factors = [
            [torch.randn([sizes[letter] for letter in factor], dtype=weight.dtype) / 8 for factor in term]
            for term in inputs
        ]
        leaves = [factor.requires_grad_() for term in factors for factor in term]
        optimizer = torch.optim.LBFGS(leaves, max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe")
        optimizer.step(lambda: missed(target, terms, factors, leaves))  # noqa: B023
        errors.append(float(missed(target, terms, factors, leaves)) ** 0.5)
    return min(errors)


def missed(target: Tensor, terms: list[str], factors: list[list[Tensor]], leaves: list[Tensor]) -> Tensor:
    """The squared error, its gradients left at the leaves."""
    found = sum(torch.einsum(term, *each) for term, each in zip(terms, factors, strict=True))
    loss = (found - target).square().sum()
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        leaf.grad = gradient.contiguous()
    return loss.detach()
