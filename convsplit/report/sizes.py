"""What a model takes on disk, in the precisions in which models are kept."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsplit.model.values import stored_bytes
from convsplit.spec import ConvSpec, is_plain

PRECISIONS = ("float32", "float16", "int8")
SCALE = 4  # bytes, for each output channel


def bytes_on_disk(model: nn.Module) -> dict[str, int]:
    """Bytes of all tensors of the state_dict, were they kept in each precision; no file's header is counted.

    In "float32" and "float16" all floating-point numbers are. In "int8" the stored weights of convolutions and linear
    layers take a byte each, with a scale in float32 for each output channel; what is left stays in float32. Integers
    stay as they are.

    >>> sizes = bytes_on_disk(nn.Conv2d(8, 16, 3))  # 1,152 weights and 16 biases
    >>> list(sizes.items())
    [('float32', 4672), ('float16', 2336), ('int8', 1280)]
    """
    tensors = [value for value in model.state_dict().values() if isinstance(value, Tensor) and not is_lazy(value)]
    whole = [value for value in tensors if not value.is_floating_point()]
    floats = _numbers([value for value in tensors if value.is_floating_point()])
    weights = {id(m._parameters["weight"]): m for m in model.modules() if is_plain(m) and _is_stored(m)}
    small = _numbers([module.weight for module in weights.values()])
    scales = SCALE * sum(ConvSpec.of(module).out_channels for module in weights.values())
    rest = stored_bytes(whole)
    found = (4 * floats, 2 * floats, 4 * (floats - small) + small + scales)
    return {name: size + rest for name, size in zip(PRECISIONS, found, strict=True)}


def _numbers(tensors: Sequence[Tensor]) -> int:
    """How many numbers tensors hold, those that several of them show counted once."""
    return sum(
        stored_bytes([t for t in tensors if t.dtype == dtype]) // dtype.itemsize
        for dtype in {t.dtype for t in tensors}
    )


def _is_stored(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and not is_lazy(weight) and weight.is_floating_point()
