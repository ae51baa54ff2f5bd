"""What goes into models and comes out: tensors in any nesting, how many inputs a batch holds, class scores."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Batch = Any  # a tensor, a tuple or list of positional arguments, or a dict of keyword arguments

IMAGE_DIMENSIONS = 4
_SCORES = re.compile("logit|score|class|cls|prob", re.IGNORECASE)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in any nesting of tuples, lists, dicts and dataclasses (or other plain objects), in order."""
    for _, tensor in named_tensors_in(value):
        yield tensor


def named_tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The same, each with the key or field under which it was found (empty where there was none)."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors_in(item, str(key))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from named_tensors_in(item, name)
    elif hasattr(value, "__dataclass_fields__"):
        for key in value.__dataclass_fields__:
            yield from named_tensors_in(getattr(value, key), key)


def main_tensor(batch: Batch) -> Tensor | None:
    """The images of a batch: of its tensors the first with the most dimensions, so neither masks nor labels."""
    return max(tensors_in(batch), key=Tensor.dim, default=None)


def is_empty(batch: Batch) -> bool:
    """Whether a batch holds no input."""
    images = main_tensor(batch)
    return images is not None and not images.numel()


def count_inputs(batch: Batch, seen: Sequence[int] = ()) -> int:
    """How many inputs a batch holds, told by the batch itself.

    `seen` are the images that the first convolution worked on, call by call: they decide where the batch does not tell,
    as an image on its own, a list of images and a batch of sequences all hold tensors of three dimensions.
    """
    images = main_tensor(batch)
    if images is not None and images.dim() >= IMAGE_DIMENSIONS:
        return images.shape[0]
    if seen:
        return sum(seen)
    return images.shape[0] if images is not None and images.dim() else 1


def class_scores(output: Any, inputs: int) -> Tensor | None:
    """The scores [inputs, classes] in an output; None where it holds none that are known to be that.

    A tensor of that shape under a name that speaks of classes or, without names, the only one of its shape: boxes and
    embeddings look alike and say nothing about a class.
    """
    found = [
        (name, tensor)
        for name, tensor in named_tensors_in(output)
        if tensor.dim() == 2 and tensor.shape[0] == inputs and tensor.shape[1] > 1 and tensor.is_floating_point()
    ]
    named = [tensor for name, tensor in found if _SCORES.search(name)]
    if named:
        return named[0]
    plain = [tensor for name, tensor in found if not name]
    return plain[0] if len({tensor.shape for tensor in plain}) == 1 else None


def stored_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of some tensors, memory that several of them show counted once.

    Tensors may be views of one storage, overlapping or not: each view counts once, and all of one storage together
    for no more than the storage holds.
    """
    views: dict[int, dict[tuple[Any, ...], int]] = {}
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = storage.data_ptr() or id(tensor)
        sizes[key] = storage.nbytes()
        place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        views.setdefault(key, {})[place] = math.prod(tensor.shape) * tensor.element_size()
    return sum(min(sum(each.values()), sizes[key]) for key, each in views.items())
