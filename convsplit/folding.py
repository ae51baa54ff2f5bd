"""Batch norm taken into the convolutions before it, wherever nothing else sees what passes between them."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, fx, nn

from convsplit.kinds import Equivalent, equivalent, is_convolution
from convsplit.layers.separable import SEPARABLE, SeparableConv
from convsplit.model.copies import deep_copy
from convsplit.model.graphs import trace
from convsplit.model.running import Batch, Forward, quiet_run, run_or_explain, tensors_in
from convsplit.model.sharing import holders
from convsplit.norms import NORMS, affine_of, is_norm
from convsplit.spec import CONVOLUTIONS, Convolution, axes_of

# Not linear layers: batch norm behind one may be of other axes.
_SPLIT = {SEPARABLE[kind]: kind for kind in CONVOLUTIONS}


def folded(model: nn.Module, example_inputs: Batch = None, forward: Forward | None = None) -> nn.Module:
    """A copy in eval mode, without gradients, each batch norm behind a convolution folded into it.

    Where torch.fx cannot trace the whole model, code that is not traced may look at what passes between the two: parts
    that are traced are then folded only with `example_inputs`, if outputs are seen to stay.
    """
    copied = deep_copy(model)
    copied.eval()  # not chained: a model's own train() may return nothing
    by_part = _foldable(copied)
    _fold_all(copied, by_part.pop("", []))  # where the whole is traced, so is every caller
    if by_part and example_inputs is not None:
        copied = _folded_where_outputs_stay(copied, by_part, example_inputs, forward)
    copied.requires_grad_(False)
    return copied


def biases_into_norms(
    model: nn.Module, layers: Collection[str], example_inputs: Batch = None, forward: Forward | None = None
) -> None:
    """Take the biases out of convolutions, in place, wherever a batch norm alone sees them: exact in both modes.

    As for `folded`, parts of a model that torch.fx cannot trace as a whole need `example_inputs`.
    """
    pairs = {(part, conv, norm) for part, conv, norm in _pairs(deep_copy(model)) if conv in layers}
    known = [pair[1:] for pair in pairs if not pair[0]]
    seen = [pair[1:] for pair in pairs if pair[0]]
    if seen and example_inputs is not None:
        before, candidate = _outputs(model, example_inputs, forward), deep_copy(model)
        _move_all(candidate, seen)
        known += seen if _close(_outputs(candidate, example_inputs, forward), before) else []
    _move_all(model, known)


def _move_all(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    for conv, norm in pairs:
        move_bias(model.get_submodule(conv), model.get_submodule(norm))


@torch.no_grad()
def move_bias(conv: nn.Module, norm: nn.Module) -> None:
    """Take the bias out of a convolution and into the running mean of the batch norm behind it, in place.

    (y + b) - mean = y - (mean - b); in training mode the mean of the batch takes every bias away, and the running mean
    goes on from where it would be without one. Without running mean nothing is done.
    """
    mean, bias = getattr(norm, "running_mean", None), getattr(conv, "bias", None)
    if mean is not None and bias is not None:
        mean.sub_(bias.to(mean.dtype))
        conv.register_parameter("bias", None)


def _foldable(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """By traced part: convolutions and the batch norm behind each, where nothing there sees the value between."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part, conv, norm in _pairs(model):
        found.setdefault(part, []).append((conv, norm))
    return found


def _pairs(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    modules = dict(model.named_modules())
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    shared = holders(model)
    graphs = trace(model, whole=is_norm).graphs
    uses = Counter(
        _target(part, node) for part, graph in graphs.items() for node in graph.nodes if node.op == "call_module"
    )
    for part, graph in graphs.items():
        for node in graph.nodes:
            conv, norm = _target(part, node), _target(part, _only_user(node))
            if not is_norm(modules.get(norm)) or not _takes_norms(modules.get(conv)):
                continue
            pair = (modules[conv], modules[norm])
            alone = all(names[id(m)] == 1 and not m._forward_hooks and not m._forward_pre_hooks for m in pair)
            untied = all(shared[id(p)] == 1 for m in pair for p in m.parameters())
            if alone and untied and uses[conv] == uses[norm] == 1 and affine_of(pair[1]) is not None:
                yield part, conv, norm


def _takes_norms(module: nn.Module | None) -> bool:
    """Whether what a module answers is its weight, as stored, times its input, plus its bias: all of it is known."""
    if type(module) in _SPLIT:
        return True
    if module is None or not is_convolution(module):
        return False
    known = equivalent(module)
    return isinstance(known, Equivalent) and not known.computed and known.conv.weight is module.weight


def _target(part: str, node: fx.Node | None) -> str:
    """The full name of the module that a node calls; empty for other nodes."""
    if node is None or node.op != "call_module":
        return ""
    return f"{part}.{node.target}" if part else str(node.target)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _fold_all(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    for conv, norm in pairs:
        _fold(model, conv, norm)


def _folded_where_outputs_stay(
    model: nn.Module, by_part: dict[str, list[tuple[str, str]]], example_inputs: Batch, forward: Forward | None
) -> nn.Module:
    """Fold parts of a model that untraced code may look into: all at once, or else those that change nothing."""
    before = _outputs(model, example_inputs, forward)
    everything = [pair for pairs in by_part.values() for pair in pairs]
    for pairs in [everything, *by_part.values()]:
        candidate = deep_copy(model)
        _fold_all(candidate, pairs)
        if _close(_outputs(candidate, example_inputs, forward), before):
            if pairs is everything:
                return candidate
            model = candidate
    return model


def _outputs(model: nn.Module, example_inputs: Batch, forward: Forward | None) -> list[Tensor]:
    copied = deep_copy(model)  # what running leaves behind in a model is not deployed
    with quiet_run(copied):
        return list(tensors_in(run_or_explain(copied, example_inputs, forward)))


def _close(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether outputs differ by rounding alone: by the root of their precision times the largest value of each."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return False
    return all(_differ_by_rounding(one, other) for one, other in zip(found, expected, strict=True))


def _differ_by_rounding(one: Tensor, other: Tensor) -> bool:
    if not other.is_floating_point() or not other.numel():
        return torch.equal(one, other)
    largest = float(other.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(one, other, rtol=0, atol=torch.finfo(other.dtype).eps ** 0.5 * largest, equal_nan=True)


def _fold(model: nn.Module, conv: str, norm: str) -> None:
    layer, found = model.get_submodule(conv), affine_of(model.get_submodule(norm))
    assert found is not None
    if isinstance(layer, SeparableConv):
        layer.absorb(found.scale, found.shift)
    else:
        assert isinstance(layer, Convolution)
        _absorb(layer, found.scale, found.shift)
    model.set_submodule(norm, found.behind)


@torch.no_grad()
def _absorb(conv: Convolution, scale: Tensor, shift: Tensor) -> None:
    """`SeparableConv.absorb` for a plain convolution."""
    rows = scale.unsqueeze(1)  # [O, 1], as the weight begins
    if conv.transposed:
        rows = scale.reshape(conv.groups, -1).repeat_interleave(
            len(conv.weight) // conv.groups, 0
        )  # [I, O per group]
    weight = conv.weight * rows.reshape(*rows.shape, *[1] * axes_of(conv))
    bias = shift if conv.bias is None else conv.bias * scale + shift
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), conv.weight.requires_grad)
    conv.register_parameter("bias", nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad))


def fold_batch_norm(is_qat: bool, layer: SeparableConv, norm: nn.Module, *activation: nn.Module) -> nn.Module:
    """What `torch.ao.quantization.fuse_modules` calls for a split layer: a copy with the batch norm in its last stage.

    Raises:
        NotImplementedError: for quantisation-aware training, which keeps batch norm apart from one convolution.
    """
    if is_qat or norm.training:
        raise NotImplementedError(
            f"the batch norm behind a {type(layer).__name__} can be fused in eval mode alone: call model.eval() and "
            "fuse_modules, or convsplit.for_inference, before preparing; the stages are then convolutions like others"
        )
    layer, found = copy.deepcopy(layer), affine_of(norm)
    assert found is not None
    layer.absorb(found.scale, found.shift)
    return nn.Sequential(layer, *activation) if activation else layer


def _register_fuser() -> None:
    """Make eager-mode quantisation know split layers, where torch has loaded that with itself."""
    mappings = sys.modules.get("torch.ao.quantization.fuser_method_mappings")
    for kind, (axes, _) in _SPLIT.items():
        norm = NORMS[axes - 1]
        for sequence in ((kind, norm), (kind, norm, nn.ReLU)):
            getattr(mappings, "_DEFAULT_OP_LIST_TO_FUSER_METHOD", {}).setdefault(sequence, fold_batch_norm)


_register_fuser()
