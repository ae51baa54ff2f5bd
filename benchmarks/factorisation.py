"""CP of kernels: error against seconds for tensorly's parafac, tensorly-torch and convsplit, and whole conversions.

    python benchmarks/factorisation.py [--networks NETWORKS.py] [--parts trained curve large whole widest]

trained   every 3 x 3 layer shape of the trained networks at a half and a quarter of its parameters: relative error of
          parafac (500 iterations, best of 3 starts), of the two SVD forms and of convsplit, at equal parameters
curve     error that the curve of a layer predicts between its short fits, against the final fit there
large     512 x 512 x 3 x 3 at R = 516: seconds until parafac's error is reached
whole     convert(resnet50) and convert(vgg16) at half the parameters, random weights
widest    2048 x 2048 x 3 x 3 at R = 1024: seconds and the peak of memory

NETWORKS.py as for benchmarks/accuracy.py. Prints Markdown.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator

import tensorly as tl
import torch
from accuracy import load_networks
from tensorly.decomposition import parafac
from torch import Tensor, nn

import convsplit
from convsplit.forms import FORMS
from convsplit.lowrank import cp, cp_curve
from convsplit.spec import ConvSpec
from convsplit.tables import Table

STARTS, ITERATIONS = 3, 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", help="a file with trained networks")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--parts", nargs="+", default=["trained", "curve", "large", "whole", "widest"])
    arguments = parser.parse_args()
    parts: dict[str, Callable[[argparse.Namespace], Table]] = {
        "trained": trained, "curve": curve, "large": large, "whole": whole, "widest": widest,
    }  # fmt: skip
    for name in arguments.parts:
        print(f"## {name}\n\n{parts[name](arguments).markdown()}\n", flush=True)


def kernels(arguments: argparse.Namespace) -> Iterator[tuple[str, nn.Conv2d]]:
    """The first and the last trained layer of every shape."""
    for depth in arguments.depths:
        layers: dict[torch.Size, list[tuple[str, nn.Conv2d]]] = {}
        for name, module in load_networks(arguments.networks).resnet(depth).named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                layers.setdefault(module.weight.shape, []).append((f"ResNet-{depth} {name}", module))
        for each in layers.values():
            yield from dict.fromkeys([each[0], each[-1]])


def rank_of(spec: ConvSpec, kept: float) -> int:
    """The CP rank with that fraction of the parameters."""
    O, I, K = spec.out_channels, spec.in_channels, spec.positions
    return max(1, int(kept * O * I * K / (O + I + K)))


def timed(run: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def parafac_error(kernel: Tensor, rank: int, *, starts: int, iterations: int) -> float:
    """The relative error of tensorly's parafac from the best of some starts: the first by SVD, the others random."""
    errors = []
    with tl.backend_context("pytorch"):
        for seed in range(starts):
            init = "svd" if seed == 0 else "random"
            fit = parafac(kernel, rank, n_iter_max=iterations, init=init, tol=1e-9, random_state=seed)
            errors.append(float((tl.cp_to_tensor(fit) - kernel).norm() / kernel.norm()))
    return min(errors)


def trained(arguments: argparse.Namespace) -> Table:
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
                svd.append(form.errors(kernel[None], [components])[0] if components else 1.0)
            slow, theirs = timed(lambda: parafac_error(kernel, rank, starts=STARTS, iterations=ITERATIONS))  # noqa: B023
            fast, ours = timed(lambda: cp(kernel[None], rank).error)  # noqa: B023
            rows.append(
                [name, "x".join(map(str, conv.weight.shape)), f"{kept:g}", str(rank), *(f"{e:.4f}" for e in svd),
                 f"{theirs:.4f}", f"{ours:.4f}", f"{ours / theirs - 1:+.2%}", f"{slow:.1f}", f"{fast:.2f}"]
            )  # fmt: skip
    headings = ["layer", "kernel", "kept", "R", "dw-pw", "pw-dw", "parafac", "convsplit", "difference", "s", "s "]
    return Table(headings, rows, frozenset({"layer", "kernel"}))


KEPT = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.65, 0.8)


def curve(arguments: argparse.Namespace) -> Table:
    rows = []
    for name, conv in kernels(arguments):
        kernel = conv.weight.detach().flatten(2)[None]
        ranks = [rank_of(ConvSpec.of(conv), kept) for kept in KEPT]
        start = time.perf_counter()
        predicted = cp_curve(kernel, ranks)
        seconds = time.perf_counter() - start
        off = [p / cp(kernel, rank).error - 1 for p, rank in zip(predicted, ranks, strict=True)]
        shape = "x".join(map(str, conv.weight.shape))
        rows.append([name, shape, *(f"{each:+.1%}" for each in off), f"{seconds:.2f}"])
    headings = ["layer", "kernel", *(f"{kept:.0%}" for kept in KEPT), "s"]
    return Table(headings, rows, frozenset({"layer", "kernel"}))


def synthetic(out_channels: int, in_channels: int) -> Tensor:
    """A kernel whose spectrum falls like a trained one's: smooth filters, channels mixed with falling weights."""
    torch.manual_seed(0)
    R = max(out_channels, in_channels)
    falling = torch.arange(1, R + 1).float() ** -0.7
    A, B, C = torch.randn(out_channels, R) * falling, torch.randn(in_channels, R), torch.randn(9, R)
    kernel = torch.einsum("or,ir,kr->oik", A, B, C)
    return kernel / kernel.norm() + 0.3 * torch.randn_like(kernel) / kernel.numel() ** 0.5


def large(arguments: argparse.Namespace) -> Table:
    kernel, rank = synthetic(512, 512), 516
    rows = []
    for iterations in (10, 25):
        slow, theirs = timed(lambda: parafac_error(kernel, rank, starts=1, iterations=iterations))  # noqa: B023
        for sweeps in range(1, 60):
            fast, fit = timed(lambda: cp(kernel[None], rank, iterations=sweeps, tolerance=0))  # noqa: B023
            if fit.error <= theirs:  # type: ignore[attr-defined]
                break
        rows.append(
            [
                f"parafac, {iterations} iterations",
                f"{theirs:.4f}",
                f"{slow:.1f}",
                f"{fast:.1f}",
                f"{slow / fast:.0f}x",
            ]
        )
    rows.append(_tensorly_torch(kernel, rank))
    seconds, fit = timed(lambda: cp(kernel[None], rank))
    rows.append(["convsplit, its own stop", f"{fit.error:.4f}", f"{seconds:.1f}", "", ""])  # type: ignore[attr-defined]
    return Table(
        ["512x512x3x3, R = 516", "error", "s", "convsplit s", "faster"], rows, frozenset({"512x512x3x3, R = 516"})
    )


def _tensorly_torch(kernel: Tensor, rank: int) -> list[str]:
    try:
        import tltorch
    except ImportError:
        return ["tensorly-torch", "not installed", "", "", ""]
    conv = nn.Conv2d(512, 512, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(kernel.reshape(512, 512, 3, 3))
    try:
        slow, factorised = timed(
            lambda: tltorch.FactorizedConv.from_conv(
                conv, rank=rank, factorization="cp", decompose_weights=True, decomposition_kwargs={"n_iter_max": 10}
            )
        )
        found = factorised.weight.to_tensor()  # type: ignore[attr-defined]
    except Exception as error:  # whatever it is, it is the figure
        return ["tensorly-torch, 4-way CP", f"{type(error).__name__}: {str(error)[:60]}", "", "", ""]
    miss = float((found - conv.weight).norm() / conv.weight.norm())
    return ["tensorly-torch, 4-way CP, 10 iterations", f"{miss:.4f}", f"{slow:.1f}", "", ""]


def whole(arguments: argparse.Namespace) -> Table:
    import torchvision

    rows = []
    for name, wanted in (("resnet18", ""), ("resnet50", "10"), ("vgg16", "20")):
        model = torchvision.models.get_model(name, weights=None).eval()
        seconds = sorted(timed(lambda: convsplit.convert(model))[0] for _ in range(3))  # noqa: B023
        rows.append([name, f"{seconds[1]:.1f}", f"{seconds[0]:.1f}", f"{seconds[2]:.1f}", wanted])
    return Table(
        ["convert, params=0.5, no data", "median s", "least", "most", "wanted"], rows, frozenset({"convert"})
    )


def widest(arguments: argparse.Namespace) -> Table:
    conv = nn.Conv2d(2048, 2048, 3, bias=False)
    seconds, layer = timed(lambda: convsplit.SeparableConv2d.from_conv(conv, form="pw-dw-pw", rank=1024))
    with torch.no_grad():
        miss = float((layer.weight - conv.weight).norm() / conv.weight.norm())  # type: ignore[attr-defined]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = ["2048x2048x3x3, R = 1024", f"{miss:.4f}", f"{seconds:.1f}", f"{peak:.1f}"]
    return Table(["random kernel", "error", "s", "peak GB, whole process"], [row], frozenset({"random kernel"}))


if __name__ == "__main__":
    main()
