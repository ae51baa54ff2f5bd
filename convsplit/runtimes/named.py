"""The runtimes by name, and whatever the user gives as one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from convsplit.layers.separable import ARRANGEMENTS
from convsplit.runtimes.base import Custom, Prepare, Runtime, vector_block
from convsplit.runtimes.eager import Torch
from convsplit.runtimes.onnx_runtimes import OnnxRuntime, OpenVino

_TRACED = ("stages", "repeated")  # arrangements that a recorded graph shows

RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {
        each.name: each
        for each in (
            Torch("torch", arrangements=ARRANGEMENTS, inside=True, trains=True),
            Torch("torch.compile", arrangements=_TRACED, compiled=True),
            Torch("torch.amp", arrangements=ARRANGEMENTS, autocast=True),
            Torch("torch.cuda_graph", arrangements=_TRACED, graphs=True),
            OnnxRuntime("onnxruntime", arrangements=_TRACED, block=vector_block()),
            OpenVino("openvino", arrangements=_TRACED, block=vector_block()),
        )
    }
)


def runtime_of(given: str | Runtime | Prepare) -> Runtime:
    """The runtime of a name, a runtime as it is, or one made of a function `(model, batch) -> run`.

    Raises:
        ValueError: an unknown name; says which there are.
        ImportError: a runtime that is not installed; says what to type.

    >>> runtime_of("torch").name
    'torch'
    >>> def on_my_device(model, batch):
    ...     return lambda: 1.5  # milliseconds measured over there
    >>> runtime_of(on_my_device).name, runtime_of(on_my_device).prepare(None, None)()
    ('on_my_device', 1.5)
    """
    if isinstance(given, str):
        if given not in RUNTIMES:
            raise ValueError(f"unknown runtime {given!r}; there are {', '.join(map(repr, RUNTIMES))}, or a function")
        found = RUNTIMES[given]
    elif isinstance(given, Runtime):
        found = given
    elif callable(given):
        found = Custom(getattr(given, "__name__", type(given).__name__), function=given)
    else:
        raise ValueError(
            f"runtime={given!r}: want a name ({', '.join(RUNTIMES)}) or a function (model, batch) -> run"
        )
    found.check()
    return found
