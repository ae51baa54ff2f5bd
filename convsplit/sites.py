"""Sites: every 2-d convolution of a model, and for each either what can be split or why it is left alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from convsplit.layers import SeparableConv2d
from convsplit.spec import ConvSpec
from convsplit.trace import Call, Trace

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Site:
    """One convolution module of a model.

    `name` is its first name and `aliases` are the others. `reason` says why it is left alone; it is empty where
    the convolution can be split. `calls` are its uses (empty where no example inputs were given), `norm` is the
    name of the batch norm that scales its output.
    """

    name: str
    spec: ConvSpec | None
    aliases: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    norm: str = ""
    reason: str = ""

    @property
    def splittable(self) -> bool:
        return not self.reason


def find_sites(model: nn.Module, trace: Trace, *, skip: Skip = ()) -> list[Site]:
    """List every 2-d convolution of a model, in the order of `named_modules`.

    `skip` leaves out layers by name, by glob pattern, or by a predicate `(name, module) -> bool`.

    Raises:
        ValueError: a name or pattern in `skip` matches no convolution.

    >>> from convsplit.trace import trace
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    >>> [(site.name, site.reason) for site in find_sites(model, trace(model))]
    [('0', ''), ('1', '1x1 kernel: already pointwise')]
    """
    names = _names(model)
    inside_split = {id(m) for layer in model.modules() if isinstance(layer, SeparableConv2d) for m in layer.modules()}
    shared = _shared_parameters(model)
    found: list[Site] = []
    for module in model.modules():
        if id(module) in inside_split or not _is_convolution(module):
            continue
        name, *aliases = names[id(module)]
        spec, reason = _examine(module, shared)
        calls = (trace.calls or {}).get(name, ())
        found.append(Site(name, spec, tuple(aliases), calls, trace.norms.get(name, ""), reason))
    return _skipped(found, skip, dict(model.named_modules()))


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters held by more than one module (or twice by one): splitting one holder would untie them."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {key for key, count in holders.items() if count > 1}


def _is_convolution(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return bool(getattr(module, "original_name", "") == "Conv2d")
    quantised = type(module).__module__.startswith("torch.ao.nn") and type(module).__name__.endswith("Conv2d")
    return isinstance(module, nn.Conv2d) or quantised


def _examine(module: nn.Module, shared: set[int]) -> tuple[ConvSpec | None, str]:
    """The numbers of a convolution where they are known, and why it cannot be split, or an empty reason."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return None, "ScriptModule: its code is compiled; convert before scripting"
    if isinstance(module, LazyModuleMixin):
        return None, f"{kind.__name__} has no weight yet: run the model once first"
    if not isinstance(module, nn.Conv2d):
        return None, f"{kind.__name__} is quantised: convert before quantising"
    spec = ConvSpec.of(module)
    if parametrize.is_parametrized(module):
        return spec, f"parametrized {', '.join(module.parametrizations)}: computed anew at every call"  # type: ignore[arg-type]
    if kind is not nn.Conv2d:
        return spec, f"{kind.__module__}.{kind.__qualname__} may compute more than Conv2d does"
    if "forward" in vars(module):
        return spec, "its forward was replaced on the instance"
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            spec,
            "its weight is computed from other parameters (weight_norm, spectral_norm or a pruning mask)",
        )
    return spec, _weight_reason(weight, id(weight) in shared) or _shape_reason(spec)


def _weight_reason(weight: Tensor, tied: bool) -> str:
    if weight.is_meta:
        return "on the meta device: there are no values to factorise"
    if weight.is_complex() or not weight.is_floating_point():
        return f"weight of type {weight.dtype}"
    if tied:
        return "shares its weight with another module"
    if not bool(weight.isfinite().all()):
        return "NaN or infinite values in its weight"
    return ""


def _shape_reason(spec: ConvSpec) -> str:
    if spec.positions == 1:
        return "1x1 kernel: already pointwise"
    if spec.groups == spec.in_channels:
        return "already depthwise"
    return ""


def _skipped(sites: list[Site], skip: Skip, modules: dict[str, nn.Module]) -> list[Site]:
    if callable(skip):
        chosen = {site.name for site in sites if skip(site.name, modules[site.name])}
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
                raise ValueError(f"skip={pattern!r} matches no convolution; their names are {names}")
            chosen |= matched
    return [
        replace(site, reason="skipped as asked") if site.name in chosen and site.splittable else site
        for site in sites
    ]
