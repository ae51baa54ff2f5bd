"""Sites: every convolution of a model (and linear layer, if asked), and what can be split or why it is left alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from convsplit.kinds import Equivalent, equivalent, is_convolution, is_linear
from convsplit.layers.separable import SeparableConv
from convsplit.model.graphs import LINEAR, FunctionalConv, Trace
from convsplit.model.running import Call
from convsplit.model.sharing import holders
from convsplit.model.usage import Usage
from convsplit.spec import ConvSpec, is_plain, noun

POINTWISE = '1x1 kernel: already pointwise; "pw-pw" among forms= splits it'  # a reason
SKIPPED = "skipped as asked"  # another
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WITHOUT_FLOAT64 = ("mps",)  # kinds of devices; sums of squares and small fits are in float64

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Site:
    """One convolution of a model: a module, or an `F.conv2d` in its code.

    `name` is its first name (of an `F.conv2d`, that of its node in the graph) and `aliases` are the others. `reason`
    says why it is left alone; it is empty where the convolution can be split. `calls` are its uses (empty where no
    example inputs were given). Where the model's graph shows it, `places` says in how many places of the code a
    convolution is called and `followed_by` what uses its output. `original` is what it equals, where it can be split.
    """

    name: str
    spec: ConvSpec | None
    aliases: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    reason: str = ""
    places: int | None = None
    followed_by: str = ""
    original: Equivalent | None = field(default=None, compare=False, repr=False)

    @property
    def splittable(self) -> bool:
        return not self.reason


def find_sites(
    model: nn.Module, trace: Trace, *, skip: Skip = (), bake: bool = False, pointwise: bool = False,
    linear: bool = False,
) -> list[Site]:  # fmt: skip
    """List every convolution of a model, in the order of `named_modules`, functional ones (`F.conv2d`) last.

    `skip` leaves out layers by name, by glob pattern, or by a predicate `(name, module) -> bool`. `bake` lets layers
    be split whose weight is computed at every call: the weight that runs in eval mode is then split for good.
    `pointwise` lets 1x1 kernels be split, `linear` lists linear layers and lets them be.

    Raises:
        ValueError: a name or pattern in `skip` matches no convolution.

    >>> from convsplit.model.graphs import trace
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    >>> [(site.name, site.reason) for site in find_sites(model, trace(model))]
    [('0', ''), ('1', '1x1 kernel: already pointwise; "pw-pw" among forms= splits it')]
    """
    names = _names(model)
    inside = _inside_convolutions(model)
    shared = _shared_parameters(model)
    usage, modules = Usage.of(trace), dict(model.named_modules(remove_duplicate=False))
    found: list[Site] = []
    for module in model.modules():
        if id(module) in inside or not (is_convolution(module) or (linear and is_linear(module))):
            continue
        name, *aliases = own = names[id(module)]
        original, spec, reason = _examine(module, shared, bake, pointwise)
        calls = (trace.calls or {}).get(name, ())
        follows = usage.followed_by(own, modules)
        found.append(Site(name, spec, tuple(aliases), calls, reason, usage.count(own), follows, original))
    functional = [conv for conv in trace.functional if linear or conv.function != LINEAR]
    return _skipped(_with_written(_with_functional(found, functional, trace), trace), skip, modules)


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _inside_convolutions(model: nn.Module) -> set[int]:
    """Modules that are part of a layer split before, or of another convolution (a parametrization may hold one)."""
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, SeparableConv):
            inside.update(map(id, module.modules()))
        elif is_convolution(module) or is_linear(module):
            inside.update(id(part) for part in module.modules() if part is not module)
    return inside


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters held by more than one module (or twice by one): splitting one holder would untie them."""
    return {key for key, count in holders(model).items() if count > 1}


def _examine(
    module: nn.Module, shared: set[int], bake: bool, pointwise: bool
) -> tuple[Equivalent | None, ConvSpec | None, str]:
    """What a convolution equals and its numbers, where they are known, and why it cannot be split, if so."""
    found = equivalent(module)
    if isinstance(found, str):
        if not is_plain(module) or isinstance(module, LazyModuleMixin):
            return None, None, found
        return None, ConvSpec.of(module), _shape_reason(ConvSpec.of(module), pointwise) or found
    spec, weight = ConvSpec.of(found.conv), found.conv.weight
    reason = _shape_reason(spec, pointwise)
    if not reason and found.computed and not bake:
        reason = f"{found.computed}; bake=True splits the weight that runs"
    if not reason and any(id(parameter) in shared for parameter in module.parameters()):
        reason = "shares a parameter with another module"
    return found, spec, reason or _weight_reason(weight)


def _shape_reason(spec: ConvSpec, pointwise: bool = False) -> str:
    if not spec.weight_params:
        return "without channels: its weight holds no numbers"
    if spec.positions == 1 and min(spec.in_channels, spec.out_channels) == spec.groups:
        return f"{'1x1 kernel with ' * (spec.axes > 0)}one input or output: of rank 1 as it is"
    if spec.positions == 1 and spec.axes and not pointwise:
        return POINTWISE
    # One input channel by itself is a bank of filters, and so is each of a depthwise layer's with a multiplier.
    if spec.groups == spec.in_channels == spec.out_channels and spec.groups > 1:
        return "already depthwise"
    return ""


@torch.no_grad()
def _weight_reason(weight: Tensor) -> str:
    if weight.is_meta:
        return "on the meta device: there are no values to factorise"
    if weight.device.type in WITHOUT_FLOAT64:
        return f"on {weight.device.type}, which has no float64: convert model.cpu(), and move the result there"
    if type(weight.data) is not Tensor or weight.layout is not torch.strided:
        return f"weight stored as {type(weight.data).__name__} with layout {weight.layout}"
    if weight.dtype not in DTYPES:
        return f"weight of type {weight.dtype}"
    if not bool(weight.isfinite().all()):
        return "NaN or infinite values in its weight"
    return ""


def _with_functional(sites: list[Site], functional: Sequence[FunctionalConv], trace: Trace) -> list[Site]:
    """Mark the modules whose weight an `F.conv2d` or the like uses, and append those that use no module's weight."""
    by_weight = {
        f"{name}.weight" if name else "weight": site for site in sites for name in (site.name, *site.aliases)
    }
    reasons: dict[str, str] = {}
    appended: list[Site] = []
    for conv in functional:
        owner = by_weight.get(conv.weight)
        if owner is not None:
            if owner.spec and conv.spec and owner.spec.transposed != conv.spec.transposed:
                continue  # the layer itself runs as it is; a tied autoencoder uses its kernel once more
            reasons[owner.name] = f"{conv.function} uses its weight ({conv.name}): the dense kernel is what runs"
        elif conv.weight:
            reason = (
                f"{conv.function} with the parameter {conv.weight}: passes.SplitConv2d splits those of GraphModules"
            )
            known = "" if conv.spec is None else _shape_reason(conv.spec)
            appended.append(Site(conv.name, conv.spec, reason=known or reason))
        else:
            appended.append(Site(conv.name, conv.spec, reason=f"{conv.function} with a weight computed in forward"))
    for name in trace.graph_weights:
        if name in by_weight:
            reasons.setdefault(by_weight[name].name, "the graph of a GraphModule reads its weight as a parameter")
    marked = [
        replace(site, reason=reasons[site.name]) if site.splittable and site.name in reasons else site
        for site in sites
    ]
    return marked + appended


def _with_written(sites: list[Site], trace: Trace) -> list[Site]:
    """Mark the modules whose weight is written to in forward: what is written then would have to reach the stages."""
    written = {
        f"{part}.{node.target}" if part else str(node.target)
        for part, graph in trace.graphs.items()
        for node in graph.find_nodes(op="get_attr")
        if any(_may_write(user) for user in node.users)
    }
    reason = "the model may write to its weight in forward, which runs on the weight that is stored"
    return [
        replace(site, reason=reason)
        if site.splittable and any(f"{n}.weight".lstrip(".") in written for n in (site.name, *site.aliases))
        else site
        for site in sites
    ]


def _may_write(user: fx.Node) -> bool:
    """Whether a node changes the weight that it reads, or takes hold of its data: assigning those leaves no node."""
    in_place = user.op == "call_method" and str(user.target).endswith("_") and not str(user.target).endswith("__")
    return in_place or (user.op == "call_function" and user.target is getattr and "data" in user.args)


def _skipped(sites: list[Site], skip: Skip, modules: dict[str, nn.Module]) -> list[Site]:
    if callable(skip):
        chosen = {site.name for site in sites if site.splittable and skip(site.name, modules[site.name])}
    else:
        chosen = set()
        for pattern in [skip] if isinstance(skip, str) else skip:
            matched = {
                site.name
                for site in sites
                if any(fnmatch.fnmatchcase(n, pattern) for n in (site.name, *site.aliases))
            }
            if not matched:
                names = ", ".join(site.name for site in sites[:8]) + (", ..." if len(sites) > 8 else "")
                kind = noun(site.spec for site in sites)
                raise ValueError(f"skip={pattern!r} matches no {kind}; their names are {names}")
            chosen |= matched
    return [replace(site, reason=SKIPPED) if site.name in chosen and site.splittable else site for site in sites]
