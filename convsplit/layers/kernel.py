"""The dense kernel of a split layer: computed when asked for, yet nothing that is written to it is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Write = Callable[[Tensor], None]

_SET_DATA = vars(torch._C.TensorBase)["data"].__set__


class Kernel(Tensor):
    """A computed tensor whose in-place changes, through views and `.data` too, are handed on to `write`.

    Everything else gives what it gives for a plain tensor; a new tensor made of it, a copy, a pickle and an
    `nn.Parameter` are plain.

    >>> kernel = kernel_of(torch.ones(2, 2), lambda new: print("written:", new.tolist()))
    >>> kernel.data[0] = 3.0
    written: [[3.0, 3.0], [1.0, 1.0]]
    >>> type(kernel * 2).__name__
    'Tensor'
    """

    _write: Write
    _whole: Tensor  # the plain tensor whose memory this shows, or a part of
    _assignable: bool  # whether this is what the layer gave out: `.data` of a view may be assigned without effect

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        kernels = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Kernel)]
        with torch._C.DisableTorchFunctionSubclass():
            if func == _SET_DATA and isinstance(args[0], Kernel) and args[0]._assignable:
                args[0]._write(args[1])
                args[0]._whole.detach().copy_(args[1])
                return None
            before = [kernel._version for kernel in kernels]
            result = func(*args, **kwargs)
            for kernel, version in zip(kernels, before, strict=True):
                if kernel._version != version:
                    _hand_on(kernel)
            if type(result) in (Tensor, tuple, list):
                return tree_map(lambda each: _linked(each, kernels), result)
            return _read_only(result) if func in (Tensor.numpy, Tensor.__array__) else result

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # What nn.Parameter sets on the detached alias that it was given: from here on a parameter of its own.
        self.__dict__.clear()
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(_plain(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def kernel_of(tensor: Tensor, write: Write) -> Tensor:
    """`tensor` as a `Kernel`; as it is where a graph is recorded of it, or where it has no memory to write to."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or tensor.is_meta:
        return tensor
    if type(tensor) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return tensor
    if tensor.is_inference():  # such tensors do not count their versions
        with torch.inference_mode(False), torch.no_grad():
            tensor = tensor.clone()
    return _link(tensor, write, tensor, True)


def _link(tensor: Tensor, write: Write, whole: Tensor, assignable: bool) -> Kernel:
    kernel = tensor.as_subclass(Kernel)
    kernel._write, kernel._whole, kernel._assignable = write, whole, assignable
    return kernel


def _linked(result: Any, kernels: list[Kernel]) -> Any:
    """A view of a kernel is one, too; other results stay what they are."""
    if type(result) is not Tensor:
        return result
    for kernel in kernels:
        if result.untyped_storage()._cdata == kernel._whole.untyped_storage()._cdata:
            return _link(result, kernel._write, kernel._whole, False)
    return result


def _hand_on(kernel: Kernel) -> None:
    """Hand on what an operation has just written, where a parameter would have taken it."""
    if torch.is_grad_enabled() and kernel.requires_grad:
        raise RuntimeError("written in place to a weight that requires gradients: do it under torch.no_grad()")
    kernel._write(kernel._whole.detach())


def _plain(kernel: Kernel) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return kernel.as_subclass(Tensor)


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array
