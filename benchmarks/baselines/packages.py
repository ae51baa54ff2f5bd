"""Packages that make trained convolutional networks smaller, each called as its documentation says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace as with_fields

import tensorly as tl
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines.sequences import BASELINES, Baseline, Chain, tucker_ranks

Smaller = Callable[[float], nn.Module]  # by a part to remove
STEPS = 32  # of the search for that part


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Of the whole model for one input, as torch counts them."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def least_removed(smaller: Smaller, spent: Callable[[nn.Module], int], limit: float) -> nn.Module:
    """The model with the least removed that spends no more; what a package offers is a part to remove, not a budget.

    Parts at which the package fails on this network are passed over.
    """

    def fits(part: int) -> bool:
        try:
            return spent(smaller(_part(part))) <= limit
        except RuntimeError:
            return False

    low, high = 0, STEPS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return smaller(_part(low))


def _part(steps: int) -> float:
    return min(steps / STEPS, 0.98)


def tensorly_torch() -> tuple[Baseline, ...]:
    """Its `FactorizedConv.from_conv` at the ranks of the same decompositions of tensorly, run stage by stage."""
    by_name = {baseline.name: baseline for baseline in BASELINES}

    def factorised(kind: str, rank_of: Callable[[nn.Conv2d, int], object]) -> Callable[..., nn.Module]:
        def fit(conv: nn.Conv2d, chain: Chain, rank: int) -> nn.Module:
            import tltorch

            tl.set_backend("pytorch")  # as its import does: its layers need it whenever they run
            return tltorch.FactorizedConv.from_conv(
                conv, rank=rank_of(conv, rank), implementation="factorized", factorization=kind
            )

        return fit

    def ranks(conv: nn.Conv2d, step: int) -> tuple[int, ...]:
        return (*tucker_ranks(conv, step), *conv.kernel_size)

    return (
        with_fields(
            by_name["tensorly parafac, four modes"], name="tensorly-torch, CP",
            source="FactorizedConv.from_conv", fit=factorised("cp", lambda conv, rank: rank),
        ),
        with_fields(
            by_name["tensorly partial Tucker"], name="tensorly-torch, Tucker",
            source="FactorizedConv.from_conv", fit=factorised("tucker", ranks),
        ),
    )  # fmt: skip


def torch_pruning(model: nn.Module, image: Tensor) -> Smaller:
    """Channels of least magnitude, the same part everywhere, as in its README; the classifier's outputs stay."""
    import torch_pruning as pruning

    def pruned(part: float) -> nn.Module:
        smaller = copy.deepcopy(model)
        last = [module for module in smaller.modules() if isinstance(module, nn.Linear)][-1:]
        importance = pruning.importance.GroupMagnitudeImportance(p=2)
        pruner = pruning.pruner.MagnitudePruner(
            smaller, image, importance=importance, pruning_ratio=part, ignored_layers=last
        )
        pruner.step()
        return smaller.eval()

    return pruned


def fasterai(model: nn.Module, method: str) -> Smaller:
    """Its `Conv_Decomposer`."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer

    def decomposed(part: float) -> nn.Module:
        with torch.no_grad():
            return Conv_Decomposer().decompose(model, percent_removed=part, method=method).eval()

    return decomposed


def torchao_int8(model: nn.Module, images: list[Tensor], *, reduced: bool = False) -> nn.Module:
    """Static quantisation of weights and activations to eight bits, to be compiled: its way for CPUs.

    reduced: activations of seven bits, for processors without VNNI.
    """
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (images[0],), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config(reduce_range=reduced)
    )
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for each in images:
            prepared(each)
    return move_exported_model_to_eval(convert_pt2e(prepared))


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model as torch.compile makes it, its weights taken for constants: else they are quantised at every call."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    run: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False)
    return run
